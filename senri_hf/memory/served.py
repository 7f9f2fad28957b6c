"""Whether a model's own attention can read a memory of keys and values, found out by trying."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .decoder import find_decoder
from .key_values import KeyValueLayer
from .layer import MemoryLayer
from .real_tokens import special_ids
from .rotation import KeyLayout, close, find_layout
from .surprise import logits_of


TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
TOLERANCE_OF_HALF = 0.08
# Keys that were moved are rounded twice more, which large scores make much of: in bfloat16 the logits of Gemma 3 270M
# then differ by 0.13 of the largest one.
TOLERANCE_OF_HALF_LOGITS = 0.25
DISTANCE = 5
TOLD, ASKED = 7, 5
LONGEST_TRIED = TOLD + max(ASKED, DISTANCE)
PADDING = 2
# Ids above are not tried: what models have beside words, such as places of images, mostly has high ones.
LARGEST_ID = 1024


class NotServedError(ValueError):
    """A model that cannot read a memory of keys and values; the message says why."""


@dataclass(frozen=True)
class Served:
    """What was found out about a model; nothing of any memory.

    Attributes:
        layouts: What every cache layer holds, None for those that hold nothing of their own.
        rotary: The model's rotary module, None where keys carry no position.
        tells_surprise: Whether the logits of a token are known from its last hidden state.
    """

    layouts: list[KeyLayout | None]
    rotary: nn.Module | None
    tells_surprise: bool


# A model may be given other weights or attention; each of them is tried out by itself.
_found: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, str], Served]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def try_out(
    model: PreTrainedModel, remembers: Callable[[Tensor, list[KeyLayout | None], nn.Module | None], Any]
) -> Served:
    """What a memory needs to know of a model, found out with a few tokens, once.

    They are read at two places, which tells how keys carry positions; then some are read after others, once as one
    context and once as memory and context, which must be the same, also for a padded row and in `generate()`.

    Args:
        remembers: Given ids [B, T], layouts and the rotary module, a cache that holds all of them as memory.

    Raises:
        NotServedError: naming the model and the reason.
    """
    found = _found.setdefault(model, {})
    kind = model.dtype, str(getattr(model.config, "_attn_implementation", ""))
    if kind not in found:
        try:
            with evaluating(model):
                found[kind] = find(model, remembers)
        except NotServedError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise refusal(model, f"trying it out failed ({type(error).__name__}: {error})") from error
    return found[kind]


def find(
    model: PreTrainedModel, remembers: Callable[[Tensor, list[KeyLayout | None], nn.Module | None], Any]
) -> Served:
    check_kind(model)
    decoder = find_decoder(model)
    ids = ordinary_ids(model, TOLD + ASKED)
    told, asked = ids[:, :TOLD], ids[:, TOLD:]
    rotary = getattr(decoder, "rotary_emb", None)
    layouts = find_layouts(model, decoder, told, rotary, TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF))
    with last_hidden_states(decoder) as hidden:
        whole = model(input_ids=ids, use_cache=True, past_key_values=DynamicCache(config=model.config)).logits
    tells_surprise = close(logits_of(model, hidden[0]), whole, TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF))
    ours = model(input_ids=asked, past_key_values=remembers(told, layouts, rotary)).logits
    if not close(ours, whole[:, TOLD:], TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF_LOGITS)):
        raise refusal(model, "with memory before the context its logits are not those of one longer context")
    memory, short = remembers(told, layouts, rotary), asked[:, PADDING:]
    alone = next_logits(model, memory, short, torch.ones_like(short))
    if memory.get_seq_length() != short.shape[1] + 1:
        raise refusal(model, "generate() feeds it the whole text at every step, which memory would take in every time")
    mask = torch.ones_like(asked).repeat(2, 1)
    mask[1, :PADDING] = 0
    batch = next_logits(model, remembers(told.repeat(2, 1), layouts, rotary), asked.repeat(2, 1), mask)
    expected = torch.cat([ours[:, -1], alone]).to(batch)
    if not close(batch, expected, TOLERANCE.get(model.dtype, TOLERANCE_OF_HALF_LOGITS)):
        raise refusal(model, "with memory before the context a padded row is not read as it is alone")
    return Served(layouts, rotary, tells_surprise)


def ordinary_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Ids [1, count] of which none begins, ends or pads a text: those mean something else to memory."""
    config: Any = model.config.get_text_config(decoder=True)
    configs = getattr(model, "generation_config", None), config
    special = {token for kind in ("bos", "eos", "pad") for one in configs for token in special_ids(kind, one)}
    ordinary = [token for token in range(min(config.vocab_size, LARGEST_ID)) if token not in special]
    if not ordinary:
        raise refusal(model, f"all {config.vocab_size} tokens of its vocabulary are special")
    return torch.tensor([[ordinary[(37 * n + 11) % len(ordinary)] for n in range(count)]], device=model.device)


@contextlib.contextmanager
def last_hidden_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden states of every pass inside."""
    states: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    hook = decoder.register_forward_hook(note)
    try:
        yield states
    finally:
        hook.remove()


def next_logits(model: PreTrainedModel, memory: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits [B, vocabulary] of the first of two tokens that `generate()` adds to ids [B, T]."""
    generated: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        past_key_values=memory,
        max_new_tokens=2,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return generated.logits[0]


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
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest < LONGEST_TRIED:
        raise refusal(model, f"it reads {longest} tokens at most, and {LONGEST_TRIED} are needed to try it out")
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
        if isinstance(ours, MemoryLayer):
            continue  # a memory of the model's own
        if not ours.is_initialized or ours.keys is None or ours.keys.dim() != 4:
            layouts.append(None)  # it reads another layer's keys and values
            continue
        layout = find_layout(
            (ours.keys, ours.values), (theirs.keys, theirs.values), DISTANCE, rotary, [None, *kinds], tolerance
        )
        if layout is None and rotary is None:
            raise refusal(
                model, "a token's keys or values depend on its position, and it has no rotary module that moves keys"
            )
        if layout is None and not close(ours.values, theirs.values, tolerance):
            raise refusal(model, "what its cache holds as a token's values depends on the token's position")
        if layout is None:
            raise refusal(
                model, "a token's keys and values depend on its position otherwise than its rotary module says"
            )
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
