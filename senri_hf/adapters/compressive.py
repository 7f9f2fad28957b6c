"""The compressive mechanism as an adapter."""

import copy
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..configuration import CompressiveConfig
from ..configuration.compressive import check_choice
from ..memory import AttentionWeights, CompressiveLayer, CompressiveMemory, MemoryLayer
from .block import MemoryBlock
from .config import MemoryAdapterConfig
from .context import ForwardContext
from .decoder import attention_weights, input_norm, output_scale


INITIALISATIONS = ("base_attention", "zero")


@dataclass
class CompressiveAdapterConfig(CompressiveConfig, MemoryAdapterConfig):
    """`MemoryAdapterConfig(mechanism="compressive")`: its settings are those of `CompressiveConfig`, and three more.

    Some have other defaults than in a model that has the memory built in: the rule is `"gated_delta"`, without an
    activation, and heads are as large as those of the layer's own attention.

    Args:
        init: `"base_attention"`: queries, keys and values start as the layer's own attention projections, without
            biases and rotary positions, and heads are that attention's. With `"gated_delta"` the output does so too,
            the convolution starts by passing every token on and the gate at zero; with other rules the output starts at
            zero. `"zero"`: random projections, and an output of zero.
        read_scope: `"conversation"`: a token reads what past conversations left. `"tokens"`: it also reads every token
            of its own conversation before it.
        write_generated: Whether tokens that `generate()` produced are written too. When False, tokens with which
            a call continues a context one at a time, as decoding does, and candidates of assisted decoding are only
            read.
    """

    mechanism: str = "compressive"
    update_rule: str = "gated_delta"
    activation: str = "none"
    init: str = field(default="base_attention", metadata={"help": f"One of {INITIALISATIONS}."})
    read_scope: str = field(default="conversation", metadata={"help": "'conversation' or 'tokens'."})
    write_generated: bool = field(default=True, metadata={"help": "Whether generated tokens are written."})

    def validate(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        super().validate()
        check_choice("init", self.init, INITIALISATIONS)
        check_choice("read_scope", self.read_scope, ("conversation", "tokens"))

    def new_block(
        self, decoder_layer: nn.Module, hidden_size: int, num_heads: int, layer_idx: int
    ) -> "CompressiveBlock":
        if self.init == "zero":
            size = self.memory_head_dim or hidden_size // num_heads
            block = CompressiveBlock(replace(self, memory_head_dim=size), decoder_layer, hidden_size)
            nn.init.zeros_(block.o_proj.weight)
            return block
        attention = attention_weights(decoder_layer)
        if self.memory_head_dim not in (None, attention.head_dim):
            raise ValueError(
                f"memory_head_dim={self.memory_head_dim} was given with init='base_attention', but heads of this "
                f"layer's own attention are of {attention.head_dim}; leave it out, or use init='zero'"
            )
        if attention.v.shape != attention.k.shape:
            raise ValueError(
                f"Values of this layer's own attention are {tuple(attention.v.shape)} and keys "
                f"{tuple(attention.k.shape)}, but a compressive memory has both of one size; use init='zero'"
            )
        heads = attention.num_heads, attention.head_dim
        block = CompressiveBlock(self, decoder_layer, hidden_size, heads)
        block.start_as(attention, output_scale(decoder_layer))
        return block


class CompressiveBlock(CompressiveMemory, MemoryBlock):
    """A compressive memory beside a decoder layer: its input, normalised, is read with and written."""

    def __init__(
        self,
        config: CompressiveAdapterConfig,
        decoder_layer: nn.Module,
        hidden_size: int,
        heads: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(hidden_size, CompressiveConfig.of(config), heads)
        self.reads_past_only = config.read_scope == "conversation"
        self.writes_generated = config.write_generated
        self.norm = input_norm(decoder_layer, hidden_size)

    @torch.no_grad()
    def start_as(self, attention: AttentionWeights, output_scale: Tensor | None) -> None:
        """Begin as a layer's own attention, whose output may be scaled by channel [D], and add nothing."""
        shared = attention.num_heads // attention.num_key_value_heads
        keys, values = (
            weight.unflatten(0, (attention.num_key_value_heads, -1)).repeat_interleave(shared, 0).flatten(0, 1)
            for weight in (attention.k, attention.v)
        )
        size = attention.head_dim
        for projection, weight, norm in (
            (self.q_proj, attention.q, attention.q_norm),
            (self.k_proj, keys, attention.k_norm),
            (self.v_proj, values, None),
        ):
            scale = 1.0 if norm is None else norm_scale(norm, size).repeat(attention.num_heads)[:, None]
            projection.weight.copy_(weight * scale)
        if not self.is_gated:
            nn.init.zeros_(self.o_proj.weight)
            return
        self.o_proj.weight.copy_(attention.o if output_scale is None else attention.o * output_scale[:, None])
        nn.init.zeros_(self.conv1d.weight)[..., -1] = 1.0
        nn.init.zeros_(self.g_proj.weight)

    def new_cache_layer(self, layer_idx: int, adapter_name: str) -> MemoryLayer:
        return CompressiveLayer(self.shape, layer_idx, adapter_name, self.reads_past_only, self.writes_generated)

    def read_and_write(
        self, hidden: Tensor, output: Tensor, memory: MemoryLayer | None, context: ForwardContext
    ) -> Tensor | None:
        if memory is None:
            return None
        layer, reads = cast(CompressiveLayer, memory), []
        encoded = self.norm(hidden.to(self.o_proj.weight.dtype))
        for columns, writes in context.stretches(layer):
            point, part = layer.point(self.shape, hidden.shape[0], hidden.device), encoded[:, columns]
            read, step = self(part, point, context.layout(columns), writes=writes)
            layer.commit(step, part.shape[1])
            reads.append(read)
        if self.reads_past_only and point.blank:
            return None
        return reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)


def norm_scale(norm: nn.Module, size: int) -> Tensor:
    """What a norm multiplies the channels [size] of a head with, once that is of length one."""
    signs = torch.ones(size)
    signs[1::2] = -1  # no mean, which some norms take off
    scale: Tensor = copy.deepcopy(norm).float()(signs) * signs
    return scale
