"""The models of the examples, declared where they stand: tensor memory, and a standard Transformer of the same size."""

import torch
from settings import (
    FADING_16,
    FADING_32,
    LASTING_32,
    ORDER_VOCABULARY,
    RECALL_HEADS,
    RECALL_HIDDEN,
    RECALL_INTERMEDIATE,
    RECALL_VOCABULARY,
    ROTARY,
    SEED,
    SLOW_16,
    TEXT_HEADS,
    TEXT_HIDDEN,
    TEXT_INTERMEDIATE,
    TEXT_VOCABULARY,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from senri_hf import TensorMemory, TensorMemoryForCausalLM, TensorMemoryLayer


torch.manual_seed(SEED)

TEXT = TensorMemoryForCausalLM.from_layers(
    vocab_size=TEXT_VOCABULARY,
    layers=[
        TensorMemoryLayer(
            [TensorMemory(FADING_32), TensorMemory(FADING_32), TensorMemory(LASTING_32), TensorMemory(LASTING_32)],
            hidden_size=TEXT_HIDDEN,
            intermediate_size=TEXT_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
        TensorMemoryLayer(
            [TensorMemory(FADING_32), TensorMemory(FADING_32), TensorMemory(LASTING_32), TensorMemory(LASTING_32)],
            hidden_size=TEXT_HIDDEN,
            intermediate_size=TEXT_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
        TensorMemoryLayer(
            [TensorMemory(LASTING_32), TensorMemory(LASTING_32), TensorMemory(LASTING_32), TensorMemory(LASTING_32)],
            hidden_size=TEXT_HIDDEN,
            intermediate_size=TEXT_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
    ],
)

TEXT_TRANSFORMER = GPTNeoXForCausalLM(
    GPTNeoXConfig(
        vocab_size=TEXT_VOCABULARY,
        hidden_size=TEXT_HIDDEN,
        intermediate_size=TEXT_INTERMEDIATE,
        num_hidden_layers=3,
        num_attention_heads=TEXT_HEADS,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters=ROTARY,
        initializer_range=TEXT_HIDDEN**-0.5,
    )
)

RECALL = TensorMemoryForCausalLM.from_layers(
    vocab_size=RECALL_VOCABULARY,
    layers=[
        TensorMemoryLayer(
            [TensorMemory(FADING_16), TensorMemory(FADING_16), TensorMemory(FADING_16), TensorMemory(FADING_16)],
            hidden_size=RECALL_HIDDEN,
            intermediate_size=RECALL_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
        TensorMemoryLayer(
            [TensorMemory(LASTING_32), TensorMemory(LASTING_32)],
            hidden_size=RECALL_HIDDEN,
            intermediate_size=RECALL_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
    ],
)

RECALL_TRANSFORMER = GPTNeoXForCausalLM(
    GPTNeoXConfig(
        vocab_size=RECALL_VOCABULARY,
        hidden_size=RECALL_HIDDEN,
        intermediate_size=RECALL_INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=RECALL_HEADS,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters=ROTARY,
        initializer_range=RECALL_HIDDEN**-0.5,
    )
)

ORDER = TensorMemoryForCausalLM.from_layers(
    vocab_size=ORDER_VOCABULARY,
    layers=[
        TensorMemoryLayer(
            [TensorMemory(FADING_16), TensorMemory(FADING_16), TensorMemory(SLOW_16), TensorMemory(SLOW_16)],
            hidden_size=RECALL_HIDDEN,
            intermediate_size=RECALL_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
        TensorMemoryLayer(
            [TensorMemory(SLOW_16), TensorMemory(SLOW_16), TensorMemory(LASTING_32)],
            hidden_size=RECALL_HIDDEN,
            intermediate_size=RECALL_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
    ],
)

# Not trained: to see what heads that do not fade can tell of an order.
ORDER_LASTING = TensorMemoryForCausalLM.from_layers(
    vocab_size=ORDER_VOCABULARY,
    layers=[
        TensorMemoryLayer(
            [TensorMemory(LASTING_32), TensorMemory(LASTING_32)],
            hidden_size=RECALL_HIDDEN,
            intermediate_size=RECALL_INTERMEDIATE,
            bias=True,
            normalize_qkv=False,
        ),
    ],
)
