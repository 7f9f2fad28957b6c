"""The compressive mechanism as an adapter."""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..configuration import CompressiveConfig
from ..configuration.compressive import check_choice
from ..memory import CompressiveLayer, CompressiveMemory, MemoryLayer
from .block import MemoryBlock
from .config import MemoryAdapterConfig
from .context import ForwardContext
from .decoder import input_norm


@dataclass
class CompressiveAdapterConfig(CompressiveConfig, MemoryAdapterConfig):
    """`MemoryAdapterConfig(mechanism="compressive")`: its settings are those of `CompressiveConfig`, and two more.

    Rule and head size have other defaults than in a model that has the memory built in: `"gated_delta"` and 64.

    Args:
        read_scope: `"conversation"`: a token reads what past conversations left. `"tokens"`: it also reads every token
            of its own conversation before it.
        write_generated: Whether tokens that `generate()` produced are written too. When False, tokens with which
            a call continues a context one at a time, as decoding does (and a last chunk of one token of a prompt fed
            in chunks), and candidates of assisted decoding are only read.
    """

    mechanism: str = "compressive"
    update_rule: str = "gated_delta"
    memory_head_dim: int | None = 64
    read_scope: str = field(default="conversation", metadata={"help": "'conversation' or 'tokens'."})
    write_generated: bool = field(default=True, metadata={"help": "Whether generated tokens are written."})

    def validate(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        super().validate()
        check_choice("read_scope", self.read_scope, ("conversation", "tokens"))

    def new_block(
        self, decoder_layer: nn.Module, hidden_size: int, num_heads: int, layer_idx: int
    ) -> "CompressiveBlock":
        return CompressiveBlock(self, decoder_layer, hidden_size)


class CompressiveBlock(CompressiveMemory, MemoryBlock):
    """A compressive memory beside a decoder layer: its input, normalised, is read with and written."""

    def __init__(self, config: CompressiveAdapterConfig, decoder_layer: nn.Module, hidden_size: int) -> None:
        super().__init__(hidden_size, CompressiveConfig.of(config))
        self.reads_past_only = config.read_scope == "conversation"
        self.writes_generated = config.write_generated
        self.norm = input_norm(decoder_layer, hidden_size)
        nn.init.zeros_(self.o_proj.weight)

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
