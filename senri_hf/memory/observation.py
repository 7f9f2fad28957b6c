"""How a model without an adapter tells its memory what was said, and attention where memory is: two hooks.

They are functions of this module, so that a model with them can be copied and pickled, and find everything in the cache
of the pass: a pass with another cache, or none, is left as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .attention_layer import AttentionMemoryLayer, Columns
from .decoder import find_decoder, named_arguments
from .real_tokens import padding_after_end, real_tokens


def observe(model: PreTrainedModel) -> None:
    """Put the hooks on a model's decoder, once."""
    decoder: Any = find_decoder(model)
    if not hasattr(decoder, "attention_memory_ends"):
        config = model.config.get_text_config(decoder=True)
        generation = getattr(model, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        ends = config.eos_token_id if ends is None else ends
        pad = getattr(generation, "pad_token_id", None)
        decoder.attention_memory_pad = config.pad_token_id if pad is None else pad
        decoder.attention_memory_ends = (
            tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
        )
        # Before other hooks: they are to see the mask that attention gets.
        decoder.register_forward_pre_hook(show_memory, with_kwargs=True, prepend=True)
        decoder.register_forward_hook(note_tokens, with_kwargs=True)


def memory_of(given: dict[str, Any]) -> tuple[Any, AttentionMemoryLayer | None]:
    """The pass's cache, and the attention memory in it."""
    cache: Any = next((value for value in given.values() if isinstance(value, Cache)), None)
    layers = getattr(cache, "memory_layers", ())
    return cache, next((layer for layer in layers if isinstance(layer, AttentionMemoryLayer)), None)


def show_memory(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a pass: refuse what memory could not take in, and put memory's columns into the attention mask."""
    given = named_arguments(decoder, args, kwargs)
    cache, layer = memory_of(given)
    if layer is None:
        return None
    tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    layer.check_rows(tokens.shape[0])
    mask = given.get("attention_mask")
    real_tokens(tokens, mask, given.get("position_ids"), given)
    if isinstance(mask, dict):
        raise ValueError(
            "attention_mask is a dict of masks that were made without memory; pass a mask [batch, tokens], or none"
        )
    wide = layer.widen(mask, cache.get_seq_length() + tokens.shape[1])
    if wide is mask:
        return None
    return (), given | {"attention_mask": wide}


def note_tokens(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After a pass: have its tokens remembered until the conversation ends."""
    given = named_arguments(decoder, args, kwargs)
    cache, layer = memory_of(given)
    if layer is None:
        return
    hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    ids = given.get("input_ids")
    if ids is None and layer.config.policy == "surprise":
        raise ValueError(
            "What surprises is known of token ids only, but inputs_embeds were given; pass input_ids, or make the "
            "memory with policy='recent'"
        )
    tokens = hidden if ids is None else ids
    real, _ = real_tokens(tokens, given.get("attention_mask"), given.get("position_ids"), given)
    if ids is not None and decoder.attention_memory_pad is not None:
        last = layer.said[-1].token[:, -1:] if layer.said else None
        real = real & ~padding_after_end(ids, last, decoder.attention_memory_pad, decoder.attention_memory_ends)
    position = given.get("position_ids")
    if position is None:
        start = cache.get_seq_length() - hidden.shape[1]
        position = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
    layer.note(
        Columns(
            token=torch.full(real.shape, -1, device=real.device) if ids is None else ids,
            position=position.expand(real.shape[0], -1).to(torch.long),
            real=real,
            written=torch.zeros_like(real) if layer.is_read_only else real,
            hidden=hidden.detach(),
        )
    )
