"""What a mechanism is to a decoder layer: one interface for all of them."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..memory import MemoryLayer
from .context import ForwardContext


class MemoryBlock(ABC):
    """Mixin of the modules that adapters put beside decoder layers: one for every adapter and layer.

    Its parameters are the adapter's, under the names that they have in it. Whatever outlives a forward pass is in its
    cache layer, never in the block.

    Attributes:
        has_memory: Whether it has state in the memory cache.
        keeps_context: Whether that state is a part of the context, as keys and values are: any cache then carries it.
    """

    has_memory: ClassVar[bool] = True
    keeps_context: ClassVar[bool] = False
    config: Any

    @abstractmethod
    def new_cache_layer(self, layer_idx: int, adapter_name: str) -> MemoryLayer:
        """A blank cache layer for the state that it reads and writes; asked for where `has_memory`."""

    @property
    def takes_ids_for(self) -> str | None:
        """What it cannot do in a pass that is given embeddings alone; None where it takes them as well."""
        return None

    @abstractmethod
    def read_and_write(
        self, hidden: Tensor, output: Tensor, memory: MemoryLayer | None, context: ForwardContext
    ) -> Tensor | None:
        """Read first, then write.

        Args:
            hidden: [B, T, D] the decoder layer's input.
            output: [B, T, D] its output, with what other adapters added.
            memory: Its cache layer; None in a pass without a memory cache, or without `has_memory`.
            context: The pass: which tokens are real, which are written.

        Returns:
            What is added to the residual stream, [B, T, D]; None for nothing at all.
        """
