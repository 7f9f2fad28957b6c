"""How a model without an adapter tells its memory what was said and read, and attention where memory is: by hooks.

They are functions of this module, so that a model with them can be copied and pickled, and find everything in the cache
of the pass: a pass with another cache, or none, is left as it is.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .attention_layer import AttentionMemoryLayer, Columns
from .attention_mass import AttentionMass, attention_modules, start_watching, stop_watching
from .decoder import find_decoder, named_arguments
from .real_tokens import AfterEnd, real_tokens, special_ids


def observe(model: PreTrainedModel) -> Callable[[], None]:
    """Put the hooks on a model's decoder, once.

    Returns:
        What undoes it; nothing for a model that was observed before.
    """
    decoder: Any = find_decoder(model)
    undo = contextlib.ExitStack()
    if not getattr(decoder, "has_attention_memory", False):
        decoder.has_attention_memory = True
        undo.callback(delattr, decoder, "has_attention_memory")
        # Before other hooks: they are to see the mask that attention gets.
        hooks = [
            decoder.register_forward_pre_hook(show_memory, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(note_tokens, with_kwargs=True),
        ]
        watched = attention_modules(decoder)
        if watched:
            middle = watched[len(watched) // 2]  # as where tokens are held to be the same
            hooks.append(middle.register_forward_pre_hook(watch_attention, with_kwargs=True))
            hooks.append(middle.register_forward_hook(note_attention, with_kwargs=True, always_call=True))
        for hook in hooks:
            undo.callback(hook.remove)
    return undo.close


def memory_of(given: dict[Any, Any]) -> tuple[Any, AttentionMemoryLayer | None]:
    """The pass's cache, and the attention memory in it."""
    cache: Any = next((value for value in given.values() if isinstance(value, Cache)), None)
    layers = getattr(cache, "memory_layers", ())
    return cache, next((layer for layer in layers if isinstance(layer, AttentionMemoryLayer)), None)


def show_memory(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a pass: refuse what memory could not take in, and put memory's columns into the attention mask."""
    given = named_arguments(decoder, args, kwargs)
    cache, layer = memory_of(given)
    if layer is None:
        return None
    ids = given.get("input_ids")
    tokens = given["inputs_embeds"] if ids is None else ids
    layer.check_rows(tokens.shape[0])
    mask = given.get("attention_mask")
    if isinstance(mask, dict):
        raise ValueError(
            "attention_mask is a dict of masks that were made without memory; pass a mask [batch, tokens], or none"
        )
    if ids is None and layer.needs_surprise:
        raise ValueError(
            "What surprises is known of token ids only, but inputs_embeds were given; pass input_ids, or make the "
            "memory with policy='recent'"
        )
    layer.coming_read = None  # of a pass that failed
    layer.coming = what_comes(decoder, layer, given, tokens, cache.get_seq_length())
    wide: Any = layer.widen(mask, layer.coming)
    if wide is mask:
        return None
    slides = any(attention.is_sliding for attention in layer.attention)
    if slides and wide.dim() == 2 and not bool(wide.all()):
        wide = sliding_masks(layer, layer.coming.position, wide, decoder)
    return (), given | {"attention_mask": wide}


def what_comes(decoder: Any, layer: AttentionMemoryLayer, given: dict[str, Any], tokens: Tensor, start: int) -> Columns:
    """The columns of a pass whose first token is the context's `start`-th, without what it will make of them."""
    ids = given.get("input_ids")
    real, _ = real_tokens(tokens, given.get("attention_mask"), given.get("position_ids"), given, start)
    # Asked anew in every pass, as a model's configs may change.
    configs = getattr(layer.model(), "generation_config", None), decoder.config.get_text_config(decoder=True)
    if ids is not None:
        last = layer.said[-1].token[:, -1:] if layer.said else None
        real = real & ~AfterEnd.of(*configs).among(ids, last)
    repeated = torch.zeros_like(real) if ids is None else layer.repeats(ids, real, special_ids("bos", *configs))
    real = real & ~repeated
    position = given.get("position_ids")
    if position is None:
        position = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    return Columns(
        token=torch.full(real.shape, -1, device=real.device) if ids is None else ids,
        position=position.expand(tokens.shape[0], -1).to(torch.long),
        real=real,
        written=torch.zeros_like(real) if layer.is_read_only else real,
        repeated=repeated,
        hidden=tokens.new_zeros(*real.shape, 0),
    )


def sliding_masks(layer: AttentionMemoryLayer, position: Tensor, seen: Tensor, decoder: Any) -> Any:
    """Masks in which a sliding window slides over positions: padding between memory and context takes none of it.

    Args:
        position: [B, T] of the pass's tokens. seen: [B, M + ctx + T] the columns that are no padding.

    Returns:
        A mask [B, 1, T, columns], added to scores; one for every type of layer where the model has several.
    """
    assert layer.slots is not None
    memory = torch.arange(-layer.slots.size, 0, device=position.device).expand(position.shape[0], -1)
    columns = torch.cat([memory, *(said.position for said in layer.said), position], dim=1)
    count, length = columns.shape[1], position.shape[1]
    place = torch.arange(count, device=position.device)
    allowed = seen[:, None].bool() & (place <= place[count - length :, None])
    dtype = decoder.dtype

    def added(mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
            :, None
        ]

    # One window for all sliding layers, as in transformers' own masks.
    window = next(attention.sliding_window for attention in layer.attention if attention.sliding_window is not None)
    near = allowed & (position[:, :, None] - columns[:, None] < window)
    masks = {"full_attention": added(allowed), "sliding_attention": added(near)}
    several = getattr(decoder.config, "layer_types", None)
    return {kind: masks[kind] for kind in dict.fromkeys(several)} if several else masks["sliding_attention"]


def note_tokens(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After a pass: have its tokens remembered until the conversation ends."""
    _, layer = memory_of(named_arguments(decoder, args, kwargs))
    if layer is not None and layer.coming is not None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        layer.note(replace(layer.coming, hidden=hidden.detach()) if layer.needs_surprise else layer.coming)


def watch_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before attention in the middle of the model: watch how much of it goes to memory."""
    _, layer = memory_of(dict(enumerate(args)) | kwargs)
    if layer is not None and layer.coming is not None and layer.watches_attention:
        count, length = layer.coming.token.shape[1], layer.memory_length
        start_watching(AttentionMass(count, length + layer.context_length + count, length))


def note_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also when it raised an exception."""
    _, layer = memory_of(dict(enumerate(args)) | kwargs)
    found = stop_watching()
    if layer is not None and layer.coming is not None and found is not None:
        layer.coming_read = found
