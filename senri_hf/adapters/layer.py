"""The memory of one decoder layer: the module that PEFT sees."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..memory import MemoryLayer, MemoryOwner
from .block import MemoryBlock
from .config import MemoryAdapterConfig
from .context import ForwardContext


class MemoryAdapterLayer(nn.Module, BaseTunerLayer, MemoryOwner):
    """Child `memory_adapter` of a decoder layer: the blocks of its memory, one for each adapter by name.

    It has no base layer: a forward hook on the decoder layer calls it, and the decoder layer stays what it was.
    """

    adapter_layer_names = ("senri_block",)
    other_param_names = ()

    def __init__(self, layer_idx: int, hidden_size: int, context: ForwardContext) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size = hidden_size
        self.context = context
        self.senri_block: Any = nn.ModuleDict()
        self.handle: Any = None  # of the decoder layer's hook
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, name: str, config: MemoryAdapterConfig, decoder_layer: nn.Module) -> None:
        """Add the block of an adapter."""
        block: Any = config.new_block(decoder_layer, self.hidden_size, self.context.num_heads, self.layer_idx)
        device = next((p.device for p in decoder_layer.parameters() if not p.is_meta), None)
        if device is not None and not any(p.is_meta for p in block.parameters()):
            block = block.to(device)
        self.senri_block[name] = block

    def memory_layers(self) -> list[MemoryLayer]:
        return [
            block.new_cache_layer(self.layer_idx, name) for name, block in self.senri_block.items() if block.has_memory
        ]

    def memory_modules(self) -> dict[str, nn.Module]:
        return dict(self.senri_block.items())

    @property
    def blocks(self) -> dict[str, MemoryBlock]:
        """The blocks of the active adapters by name; none while adapters are disabled."""
        if self.disable_adapters:
            return {}
        return {name: self.senri_block[name] for name in self.active_adapters if name in self.senri_block}

    # What PEFT asks of a tuner layer, where it takes a base layer for granted.

    def get_base_layer(self) -> nn.Module:
        return self

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        parameter = next(self.parameters(), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        return None

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise merging()

    def unmerge(self) -> None:
        raise merging()


def merging() -> NotImplementedError:
    return NotImplementedError(
        "A memory adapter cannot be merged into the base model's weights: what it adds depends on what was remembered. "
        "Keep it as an adapter, or remove it with unload()"
    )
