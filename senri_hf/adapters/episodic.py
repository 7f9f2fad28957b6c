"""The episodic mechanism as an adapter."""

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..configuration import EpisodicConfig
from ..memory import AttentionWeights, EpisodicLayer, EpisodicReader, MemoryLayer
from ..memory.episodic_layer import Tokens
from ..memory.surprise import token_surprise
from .block import MemoryBlock
from .config import MemoryAdapterConfig
from .context import ForwardContext
from .decoder import attention_weights, input_norm, output_scale


@dataclass
class EpisodicAdapterConfig(EpisodicConfig, MemoryAdapterConfig):
    """`MemoryAdapterConfig(mechanism="episodic")`: its settings are those of `EpisodicConfig`."""

    mechanism: str = "episodic"

    def new_block(self, decoder_layer: nn.Module, hidden_size: int, num_heads: int, layer_idx: int) -> "EpisodicBlock":
        return EpisodicBlock.beside(decoder_layer, EpisodicConfig.of(self), hidden_size, num_heads)


@dataclass
class Written:
    """What a block leaves to be written when the model's surprise is known."""

    layer: EpisodicLayer
    hidden: Tensor
    access: Tensor
    asked: Tensor


class EpisodicBlock(EpisodicReader, MemoryBlock):
    """The reader of an episodic memory beside a decoder layer, which hands it the layer's inputs to be written."""

    hidden_size: int

    @classmethod
    def beside(cls, decoder_layer: nn.Module, config: EpisodicConfig, hidden_size: int, num_heads: int) -> Self:
        """A new one, which starts as `config.init` says."""
        if config.init == "base_attention":
            attention = attention_weights(decoder_layer)
            scale = output_scale(decoder_layer)
            if scale is not None:
                attention.o = attention.o.float() * scale[:, None]
        else:
            attention = AttentionWeights.random(hidden_size, config.num_heads or num_heads)
        block = cls(config, input_norm(decoder_layer, hidden_size), attention)
        block.hidden_size = hidden_size
        return block

    def new_cache_layer(self, layer_idx: int, adapter_name: str) -> MemoryLayer:
        return EpisodicLayer(self.config, layer_idx, adapter_name, self.hidden_size)

    @property
    def takes_ids_for(self) -> str | None:
        return "surprise='nll'" if self.predictor is None else None

    def read_and_write(
        self, hidden: Tensor, output: Tensor, memory: MemoryLayer | None, context: ForwardContext
    ) -> Tensor | None:
        if memory is None:
            return None
        layer = cast(EpisodicLayer, memory)
        encoded = self.encode(hidden)
        real, asked = context.written(layer), self.asked_parts(encoded, context.real)
        if self.config.read_scope == "conversation" or encoded.shape[1] == 1:
            return self.read_then_write(layer, encoded, real, asked, context)
        reads = []
        for start, stop in layer.blocks(real):
            # Copies: what waits for its segment would keep the whole alive.
            piece = encoded[:, start:stop].clone()
            written, parts = real[:, start:stop].clone(), asked[:, start:stop].clone()
            read = self.read_then_write(layer, piece, written, parts, context)
            reads.append(torch.zeros_like(piece) if read is None else read)
        return torch.cat(reads, dim=1)

    def read_then_write(
        self, memory: EpisodicLayer, encoded: Tensor, real: Tensor, asked: Tensor, context: ForwardContext
    ) -> Tensor | None:
        """What memory adds to encoded [B, T, D], None where it is blank; the same tokens are then written."""
        view = self.view_of(memory)
        if view is None:
            read, access = None, encoded.new_zeros(*real.shape, memory.config.store_slots, dtype=torch.float32)
        else:
            reading = self(encoded, view, memory.asked_upto(asked))
            read, access = reading.added, reading.access
            memory.conversation_scores = reading.conversation_scores
        if self.predictor is None:
            context.at_end(write_surprised, Written(memory, encoded, access, asked))
            return read
        tokens = Tokens(encoded, torch.zeros_like(encoded[..., 0]), access, asked, real)
        at_once = self.training or torch.is_grad_enabled() or self.config.read_scope == "committed_segments"
        if encoded.shape[1] > 1 or at_once:
            self.write_predicted(memory, tokens, context.all_real)
        else:
            memory.defer(tokens, self.write_predicted)
        return read

    def write_predicted(
        self, memory: EpisodicLayer, tokens: Tokens, all_real: bool = False, whole: bool = False
    ) -> None:
        """Write tokens with the surprise that the predictor finds in them; where it trains, keep its loss.

        Args:
            whole: Whether these are all tokens of a conversation, which is over with them.
        """
        assert self.predictor is not None
        encoded, real = tokens.hidden.detach(), tokens.real
        previous = shift(encoded, real, memory.previous(encoded), all_real)
        # Where the predictor learns it does so from every token read, those of conversations without a loss included.
        learns = self.training and next(self.predictor.parameters()).requires_grad
        with torch.set_grad_enabled(learns):
            error = self.prediction_error(encoded, previous)
        if learns:
            memory.losses.append((error.square() * real).sum() / real.sum().clamp_min(1))
        (memory.append_whole if whole else memory.append)(replace(tokens, surprise=error.detach()))


def write_surprised(items: list[Any], hidden: Tensor, context: ForwardContext) -> None:
    """Write what waited for the model's own surprise, given its last hidden states [B, T, D]."""
    with torch.no_grad():
        surprise = negative_log_likelihood(context, hidden)
    for write in items:
        write.layer.append(Tokens(write.hidden, surprise, write.access, write.asked, context.written(write.layer)))


def shift(hidden: Tensor, real: Tensor, before: Tensor, all_real: bool) -> Tensor:
    """For every token of hidden [B, T, D] the last real one before it, `before` [B, D] at the start."""
    columns = torch.cat([before[:, None].to(hidden.dtype), hidden], dim=1)
    if all_real:
        return columns[:, :-1]
    length = real.shape[1]
    position = torch.where(real, torch.arange(1, length + 1, device=real.device), 0).cummax(1).values
    position = torch.cat([torch.zeros_like(position[:, :1]), position[:, :-1]], dim=1)
    return columns.gather(1, position[..., None].expand(-1, -1, columns.shape[-1]))


def negative_log_likelihood(context: ForwardContext, hidden: Tensor) -> Tensor:
    """-log p of every token [B, T] under the model, from the hidden state of the real token before; 0 at the start."""
    memory, real, ids = context.memory, context.real, context.ids
    assert memory is not None and ids is not None and context.model is not None
    if memory.recent_hidden is None or memory.recent_real is None:
        past, past_real = hidden[:, :0], real[:, :0]
    else:
        past, past_real = memory.recent_hidden, memory.recent_real
    columns, seen = torch.cat([past, hidden], dim=1), torch.cat([past_real, real], dim=1)
    start = columns.shape[1] - hidden.shape[1]
    before = columns.new_zeros(columns.shape[0], columns.shape[-1])
    source = shift(columns, seen, before, all_real=False)[:, start:]
    known = (seen.long().cumsum(1) - seen.long())[:, start:] > 0
    memory.note_hidden(hidden, real)
    return token_surprise(context.model, source, ids).masked_fill(~known, 0.0)
