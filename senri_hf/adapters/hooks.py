"""How memory reaches a model's forward pass: hooks on the decoder and on its layers.

Hooks are functions of this module (closures would break deepcopy and pickle) and find what they need on the modules.
They run outside of gradient checkpointing, which recomputes `forward` only, so that nothing is written twice.
"""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..memory import EpisodicLayer, EpisodicReader, MemoryCache
from ..memory.episodic_layer import Tokens
from .layer import MemoryAdapterLayer


LOGITS_AT_ONCE = 256


@dataclass
class Written:
    """What a layer's hook leaves to be written when the model's surprise is known."""

    layer: EpisodicLayer
    hidden: Tensor
    access: Tensor


@dataclass
class ForwardContext:
    """What the hooks of one model share during a forward pass; empty between passes.

    Attributes:
        num_heads: Attention heads of the model; `model`'s output embeddings and `softcap` make logits of hidden states.
        pad_id, end_ids: Tokens that follow a finished row, and those that finish one.
        memory: The cache of this pass, if it is a memory cache.
        real: [B, T] the tokens that are no padding; `all_real` when that needs no look.
        generated: Whether this pass continues a context the way decoding does.
    """

    num_heads: int
    model: PreTrainedModel | None = None
    softcap: float | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    memory: MemoryCache | None = None
    real: Tensor | None = None
    all_real: bool = True
    generated: bool = False
    ids: Tensor | None = None
    waiting: list[Written] = field(default_factory=list)

    def clear(self) -> None:
        self.memory, self.real, self.ids, self.all_real, self.generated = None, None, None, True, False
        self.waiting = []


def decoder_pre_hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note this pass's memory cache and which tokens are real."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    context.clear()
    given = dict(zip(argument_names(type(decoder)), args, strict=False)) | kwargs
    cache = next((value for value in given.values() if isinstance(value, Cache)), None)
    if not isinstance(cache, MemoryCache):
        return
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens: Any = ids if ids is not None else embeds
    for layer in cache.memory_layers:  # before attention has taken anything in
        layer.check_rows(tokens.shape[0])
    real, all_real = real_tokens(tokens, given.get("attention_mask"), given.get("position_ids"), given)
    if ids is not None and context.pad_id is not None:
        real = real & ~padding_after_end(ids, cache.recent_ids, context)
        all_real = all_real and ids.shape[1] == 1
    context.memory, context.real, context.all_real, context.ids = cache, real, all_real, ids
    continues = cache.get_seq_length() > 0
    context.generated = continues and (tokens.shape[1] == 1 or cache.is_recording)


def decoder_hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Write what waited for the model's own surprise, and forget this pass."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    if context.memory is not None and output is not None:
        memory, real = context.memory, context.real
        assert real is not None
        if context.waiting:
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            with torch.no_grad():
                surprise = negative_log_likelihood(context, hidden)
            for write in context.waiting:
                write.layer.append(Tokens(write.hidden, surprise, write.access, written(write.layer, context)))
        memory.note_tokens(context.ids)
    context.clear()


def layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Read memory into a decoder layer's output, and write the layer's input into memory."""
    adapter = cast(MemoryAdapterLayer, layer.memory_adapter)
    context: ForwardContext = adapter.context
    if context.memory is None or not adapter.readers:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    result = output[0] if isinstance(output, tuple) else output
    for name, reader in adapter.readers.items():
        memory = context.memory.memory_layer(adapter.layer_idx, name)
        if not isinstance(memory, EpisodicLayer):
            raise ValueError(
                f"This memory has no layer {adapter.layer_idx} for the adapter {name!r}. Make one for the model as it "
                "is now: MemoryCache.for_model(model)"
            )
        memory.check_rows(hidden.shape[0])
        read = read_and_write(reader, memory, hidden, context)
        if read is not None:
            result = result + read.to(result.dtype)
    return (result, *output[1:]) if isinstance(output, tuple) else result


def read_and_write(
    reader: EpisodicReader, memory: EpisodicLayer, hidden: Tensor, context: ForwardContext
) -> Tensor | None:
    """What the memory adds to hidden [B, T, D], None where it is blank; the tokens are handed to it to be written."""
    encoded = reader.encode(hidden)
    real = written(memory, context)
    if memory.config.read_scope == "conversation" or encoded.shape[1] == 1:
        return read_then_write(reader, memory, encoded, real, context)
    reads = []
    for start, stop in memory.blocks(real):
        # Copies: what waits for its segment would keep the whole alive.
        piece = encoded[:, start:stop].clone()
        read = read_then_write(reader, memory, piece, real[:, start:stop].clone(), context)
        reads.append(torch.zeros_like(piece) if read is None else read)
    return torch.cat(reads, dim=1)


def read_then_write(
    reader: EpisodicReader, memory: EpisodicLayer, encoded: Tensor, real: Tensor, context: ForwardContext
) -> Tensor | None:
    """Read first, then hand the same tokens over to be written."""
    view = reader.view_of(memory)
    if view is None:
        read, access = None, encoded.new_zeros(*real.shape, memory.config.store_slots, dtype=torch.float32)
    else:
        read, access = reader(encoded, view)
    if reader.predictor is None:
        context.waiting.append(Written(memory, encoded, access))
    else:
        write_predicted(
            reader, memory, Tokens(encoded, torch.zeros_like(encoded[..., 0]), access, real), context.all_real
        )
    return read


def write_predicted(reader: EpisodicReader, memory: EpisodicLayer, tokens: Tokens, all_real: bool) -> None:
    """Write tokens with the surprise that the reader's predictor finds in them; where it trains, keep its loss."""
    assert reader.predictor is not None
    encoded, real = tokens.hidden.detach(), tokens.real
    previous = shift(encoded, real, memory.previous(encoded), all_real)
    # Where the predictor learns it does so from every token read, those of conversations without a loss included.
    learns = reader.training and next(reader.predictor.parameters()).requires_grad
    with torch.set_grad_enabled(learns):
        error = reader.prediction_error(encoded, previous)
    if learns:
        memory.losses.append((error.square() * real).sum() / real.sum().clamp_min(1))
    memory.append(replace(tokens, surprise=error.detach()))


def shift(hidden: Tensor, real: Tensor, before: Tensor, all_real: bool) -> Tensor:
    """For every token of hidden [B, T, D] the last real one before it, `before` [B, D] at the start."""
    columns = torch.cat([before[:, None].to(hidden.dtype), hidden], dim=1)
    if all_real:
        return columns[:, :-1]
    length = real.shape[1]
    position = torch.where(real, torch.arange(1, length + 1, device=real.device), 0).cummax(1).values
    position = torch.cat([torch.zeros_like(position[:, :1]), position[:, :-1]], dim=1)
    return columns.gather(1, position[..., None].expand(-1, -1, columns.shape[-1]))


def written(memory: EpisodicLayer, context: ForwardContext) -> Tensor:
    """[B, T] the tokens of this pass that this memory takes in."""
    assert context.real is not None
    if memory.is_read_only or (context.generated and not memory.config.write_generated):
        return torch.zeros_like(context.real)
    return context.real


def real_tokens(tokens: Tensor, mask: Any, position_ids: Tensor | None, given: dict[str, Any]) -> tuple[Tensor, bool]:
    """Which tokens [B, T] of this pass are no padding, and whether all of them are without having looked.

    Raises:
        ValueError: for packed documents, several of which share a row and could not have memories of their own.
    """
    batch, length = tokens.shape[:2]
    everything = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if given.get("cu_seq_lens_q") is not None or given.get("seq_idx") is not None:
        raise packed()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:] != 0, False
    if position_ids is None or position_ids.dim() != 2 or length == 1:
        return everything, True
    step = position_ids[:, 1:] - position_ids[:, :-1]
    if mask is None:
        if bool((step < 0).any()):
            raise packed()
        return everything, True
    # A mask that says which token sees which (static caches): a token is real where positions go on after it.
    real = everything.clone()
    real[:, :-1] = (step == 1).expand(batch, -1)
    return real, False


def packed() -> ValueError:
    return ValueError(
        "Several documents are packed into one row, but a memory belongs to a row: they would share it. Pass one "
        "document per row, with padding"
    )


def padding_after_end(ids: Tensor, recent: Tensor | None, context: ForwardContext) -> Tensor:
    """[B, T] the padding that `generate()` feeds to a row that has ended, and marks as real.

    A padding token after an end or after another padding token is such padding.
    """
    assert context.pad_id is not None
    before = ids.new_full((ids.shape[0], 1), -1) if recent is None or not recent.shape[1] else recent[:, -1:]
    previous = torch.cat([before, ids[:, :-1]], dim=1)
    ended = previous == context.pad_id
    for end_id in context.end_ids:
        ended = ended | (previous == end_id)
    return ended & (ids == context.pad_id)


def negative_log_likelihood(context: ForwardContext, hidden: Tensor) -> Tensor:
    """-log p of every token [B, T] under the model, from the hidden state of the real token before; 0 at the start."""
    memory, real, ids = context.memory, context.real, context.ids
    assert memory is not None and real is not None and context.model is not None
    if ids is None:
        raise ValueError(
            "surprise='nll' needs token ids, but inputs_embeds were given; pass input_ids or use surprise='predictor'"
        )
    if memory.recent_hidden is None or memory.recent_real is None:
        past, past_real = hidden[:, :0], real[:, :0]
    else:
        past, past_real = memory.recent_hidden, memory.recent_real
    columns, seen = torch.cat([past, hidden], dim=1), torch.cat([past_real, real], dim=1)
    start = columns.shape[1] - hidden.shape[1]
    before = columns.new_zeros(columns.shape[0], columns.shape[-1])
    source = shift(columns, seen, before, all_real=False)[:, start:]
    known = (seen.long().cumsum(1) - seen.long())[:, start:] > 0
    # Looked up now: adapters and resizing put other modules there.
    output_embeddings = context.model.get_output_embeddings()
    surprise = []
    for piece, target in zip(source.split(LOGITS_AT_ONCE, 1), ids.split(LOGITS_AT_ONCE, 1), strict=True):
        logits = output_embeddings(piece).float()
        if context.softcap is not None:
            logits = (logits / context.softcap).tanh() * context.softcap
        surprise.append(logits.logsumexp(-1) - logits.gather(-1, target[..., None])[..., 0])
    memory.note_hidden(hidden, real)
    return torch.cat(surprise, dim=1).masked_fill(~known, 0.0)


def argument_names(decoder_class: type[nn.Module]) -> list[str]:
    """Names of the positional arguments of a decoder's forward."""
    return list(inspect.signature(decoder_class.forward).parameters)[1:]
