"""Whether a model's own attention can read a memory of keys and values, found out by trying."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .decoder import find_decoder
from .key_values import KeyValueLayer
from .rotation import KeyLayout, close, find_layout


TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
TOLERANCE_OF_HALF = 0.08
# Keys that were moved are rounded twice more, which large scores make much of: in bfloat16 the logits of Gemma 3 270M
# then differ by 0.13 of the largest one.
TOLERANCE_OF_HALF_LOGITS = 0.25
DISTANCE = 5
TOLD, ASKED = 7, 5


class NotServedError(ValueError):
    """A model that cannot read a memory of keys and values; the message says why."""


# What was found out about a model; nothing of any memory.
_found: "weakref.WeakKeyDictionary[nn.Module, tuple[list[KeyLayout | None], nn.Module | None]]" = (
    weakref.WeakKeyDictionary()
)


@torch.no_grad()
def layouts_of(
    model: PreTrainedModel, remembers: Callable[[Tensor, list[KeyLayout | None], nn.Module | None], Any]
) -> tuple[list[KeyLayout | None], nn.Module | None]:
    """What every cache layer of a model holds, and its rotary module, None where keys carry no position.

    A few tokens are read at two places, which tells how keys carry positions; then some are read after others, once as
    one context and once as memory and context, which must be the same.

    Args:
        remembers: Given ids [1, T], layouts and the rotary module, a cache that holds all of them as memory.

    Raises:
        NotServedError: naming the model and the reason.
    """
    if model not in _found:
        try:
            with evaluating(model):
                _found[model] = try_out(model, remembers)
        except NotServedError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise refusal(model, f"trying it out failed ({type(error).__name__}: {error})") from error
    return _found[model]


def try_out(
    model: PreTrainedModel, remembers: Callable[[Tensor, list[KeyLayout | None], nn.Module | None], Any]
) -> tuple[list[KeyLayout | None], nn.Module | None]:
    check_kind(model)
    config = model.config.get_text_config(decoder=True)
    decoder = find_decoder(model)
    vocabulary = config.vocab_size
    ids = (torch.arange(TOLD + ASKED, device=model.device) * 37 + 11)[None] % max(vocabulary - 3, 1)
    tolerance = TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF)
    told, asked = ids[:, :TOLD], ids[:, TOLD:]
    rotary = getattr(decoder, "rotary_emb", None)
    layouts = find_layouts(model, decoder, told, rotary, tolerance)
    whole = model(input_ids=ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).logits[:, TOLD:]
    memory = remembers(told, layouts, rotary)
    ours = model(input_ids=asked, past_key_values=memory).logits
    if not close(ours, whole, TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF_LOGITS)):
        raise refusal(model, "with memory before the context its logits are not those of one longer context")
    return layouts, rotary


def check_kind(model: PreTrainedModel) -> None:
    """NotServedError for models of whose caches it is known that keys and values are not all they hold."""
    config: Any = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise refusal(model, "it has an encoder")
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        raise refusal(
            model, "flash attention takes no memory before the context; load it with attn_implementation='sdpa'"
        )
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked:
        raise refusal(model, "its chunked attention starts anew at fixed positions")
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for kind in (str(entry.get("rope_type", "default")) for entry in kinds):
        if kind in ("dynamic", "longrope"):
            raise refusal(model, f"its rotary embedding ({kind}) changes with the length of the context")
    for layer in DynamicCache(config=model.config).layers:
        try:
            KeyValueLayer.like(layer)
        except ValueError as error:
            raise refusal(model, str(error)) from error


def find_layouts(
    model: PreTrainedModel, decoder: nn.Module, ids: Tensor, rotary: nn.Module | None, tolerance: float
) -> list[KeyLayout | None]:
    """The layout of every cache layer."""
    config: Any = model.config.get_text_config(decoder=True)
    here, there = (read_at(model, decoder, ids, start) for start in (0, DISTANCE))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    layouts: list[KeyLayout | None] = []
    for ours, theirs in zip(here.layers, there.layers, strict=True):
        if not ours.is_initialized or ours.keys is None or ours.keys.dim() != 4:
            layouts.append(None)  # it reads another layer's keys and values
            continue
        layout = find_layout(
            (ours.keys, ours.values), (theirs.keys, theirs.values), DISTANCE, rotary, [None, *kinds], tolerance
        )
        if layout is None:
            reason = "a token's keys and values depend on its position in a way other than a rotary embedding"
            raise refusal(model, reason)
        layouts.append(layout)
    if not any(layouts):
        raise refusal(model, "no layer of its cache holds keys and values")
    return layouts


def read_at(model: PreTrainedModel, decoder: nn.Module, ids: Tensor, start: int) -> Any:
    """The cache of a text whose first token has position `start`."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    try:
        decoder(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except TypeError:  # a model without position_ids: its attention knows distances at most
        cache = DynamicCache(config=model.config)
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, and every module as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refusal(model: PreTrainedModel, reason: str) -> NotServedError:
    return NotServedError(
        f"{type(model).__name__} cannot have a memory without training: {reason}. A memory adapter is for such models: "
        "get_peft_model(model, senri_hf.MemoryAdapterConfig(...))"
    )
