"""Asking a model what it was told, through `generate()`: with its memory, and without it for comparison."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..memory import MemoryCache
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
    batch = EpisodeCollator(tokenizer)([{"conversations": conversations} for conversations in told])
    for conversation in batch["conversations"]:
        inputs = {name: conversation[name].to(model.device) for name in ("input_ids", "attention_mask")}
        model(**inputs, past_key_values=memory, logits_to_keep=1)
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
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    finally:
        tokenizer.padding_side = side
    cache = None if memory is None else memory.snapshot()
    generator: Any = model
    output = generator.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
