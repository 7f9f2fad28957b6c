"""Asking a model what it was told, through `generate()`: with its memory, and without it for comparison."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..memory import MemoryCache
from ..memory.decoder import find_decoder
from .collator import EpisodeCollator


Conversation = list[dict[str, Any]]


@torch.no_grad()
def tell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    told: list[list[Conversation]],
    memory: MemoryCache | None = None,
) -> MemoryCache:
    """A memory, one row per person, of conversations that were read one after another.

    Args:
        told: For every person the conversations in order; people may have different numbers of them.
        memory: Where to go on; a new, empty memory when None.
    """
    memory = MemoryCache.for_model(model) if memory is None else memory
    decoder = find_decoder(model)  # what is said next is not asked for
    batch = EpisodeCollator(tokenizer)([{"conversations": conversations} for conversations in told])
    for conversation in batch["conversations"]:
        inputs = {name: conversation[name].to(model.device) for name in ("input_ids", "attention_mask")}
        decoder(**inputs, past_key_values=memory, use_cache=True)
        memory.clear_context()
    return memory


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Conversation],
    memory: MemoryCache | None = None,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy replies to questions, one per row, each in a conversation of its own.

    Args:
        questions: Chat messages, the user's question last.
        memory: What is remembered, one row per question; it is read and left as it is. None asks the base model.
    """
    cache = DynamicCache(config=model.config) if memory is None else memory.snapshot()
    return answer(model, tokenizer, asked(model, tokenizer, questions), cache, max_new_tokens)


def asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Conversation]
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T] of conversations that the assistant is to go on with, padded left."""
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    finally:
        tokenizer.padding_side = side
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def read(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache, columns: int) -> None:
    """Read what of the first columns of inputs [B, T] a cache does not hold yet, without logits."""
    start = cache.get_seq_length()
    mask = inputs["attention_mask"][:, :columns]
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, start:]
    ids = inputs["input_ids"][:, start:columns]
    find_decoder(model)(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    cache: Cache,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy replies to what `asked` gave, of which the cache may hold the first columns; it goes on with them."""
    # All but the last token are read here: the logits of many rows' last tokens, cut out of longer rows as `generate`
    # does, take minutes in bfloat16 on a CPU.
    read(model, inputs, cache, inputs["input_ids"].shape[1] - 1)
    generator: Any = model
    output = generator.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
