"""The cache layer of a memory whose heads may differ: heads of equal settings are one tensor, a group."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .cache import BUILT_IN
from .compressive_layer import CompressiveLayer, Progress, Step
from .compressive_state import CompressiveState, MemoryShape
from .layer import CountsContext, MemoryLayer
from .state import check_tensors


class HeadGroupsLayer(MemoryLayer):
    """Compressive memory of one layer, a `CompressiveLayer` for every group of equal heads.

    Args:
        shapes: What the groups are made of. None in a cache that was made from a config alone: the model says it then.
        layer_idx: Of the decoder layer; None for the first.
        adapter_name: Of the adapter it belongs to; None for the model itself.
    """

    _layer_type = "tensor_memory"

    def __init__(
        self,
        shapes: tuple[MemoryShape, ...] | None = None,
        layer_idx: int | None = None,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(0 if layer_idx is None else layer_idx, BUILT_IN if adapter_name is None else adapter_name)
        self.groups = [CompressiveLayer(shape, self.layer_idx, self.adapter_name) for shape in shapes or ()]
        # In a static cache masks span all of its columns, and transformers asks all layers whether it is one.
        self.is_compileable = "max_cache_len" in kwargs

    # What the module that reads and writes asks.

    def point(self, shapes: tuple[MemoryShape, ...], batch_size: int, device: torch.device) -> tuple[Progress, ...]:
        """Where the conversation stands in every group, for a batch of as many rows."""
        self.check_rows(batch_size)
        if not self.groups:
            self.groups = [CompressiveLayer(shape, self.layer_idx, self.adapter_name) for shape in shapes]
        return tuple(group.point(shape, batch_size, device) for group, shape in zip(self.groups, shapes, strict=True))

    def commit(self, steps: tuple[Step, ...], columns: int) -> None:
        """Take in what a pass over `columns` columns left."""
        for group, step in zip(self.groups, steps, strict=True):
            group.commit(step, columns)

    # What the cache asks.

    @property
    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.groups for rule in group.rules]

    @property
    def columns(self) -> int:
        """Columns of the open conversation."""
        return self.groups[0].columns if self.groups else 0

    def rollback(self, tokens: int) -> None:
        for group in self.groups:
            group.rollback(tokens)

    def clear_context(self) -> None:
        for group in self.groups:
            group.clear_context()

    def reset(self) -> None:
        for group in self.groups:
            group.reset()

    def decay(self, cycles: int) -> None:
        """Nothing: this memory forgets by what is written into it, not by time."""

    def detach(self) -> None:
        for group in self.groups:
            group.detach()

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        for group in self.groups:
            group.map_rows(function)

    def copy(self) -> "HeadGroupsLayer":
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__, losses=[], groups=[group.copy() for group in self.groups])
        return layer

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}_{index}": tensor
            for index, group in enumerate(self.groups)
            for name, tensor in group.state_dict().items()
        }

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        if not self.groups:
            raise ValueError("This cache was made without its model. Use MemoryCache.for_model(model)")
        rows = tensors["tokens_0"].numel() if "tokens_0" in tensors else 1
        expected = {}
        for index, group in enumerate(self.groups):
            assert group.shape is not None
            empty = CompressiveState.empty(rows, group.shape, torch.device("meta"))
            expected.update({f"{name}_{index}": tensor for name, tensor in empty.tensors().items()})
        check_tensors(tensors, expected, f"layer {self.layer_idx}")

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for index, group in enumerate(self.groups):
            end = f"_{index}"
            group.load_state_dict({n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)})

    @property
    def rows(self) -> int | None:
        return self.groups[0].rows if self.groups else None

    @property
    def device(self) -> torch.device | None:
        return self.groups[0].device if self.groups else None

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @property
    def nbytes_per_row(self) -> int:
        """Bytes that a row's memory takes once something is written."""
        return sum(group.nbytes_per_row for group in self.groups)

    @property
    def tokens_seen(self) -> Tensor | None:
        return self.groups[0].tokens_seen if self.groups else None

    @property
    def is_blank(self) -> bool:
        return all(group.is_blank for group in self.groups)

    def summary(self) -> dict[str, float]:
        """As of a `CompressiveLayer`, for each group; numbered from 0 where there are several."""
        if len(self.groups) == 1:
            return self.groups[0].summary()
        return {
            f"{name} of heads {index}": value
            for index, group in enumerate(self.groups)
            for name, value in group.summary().items()
        }


class CountingHeadGroupsLayer(CountsContext, HeadGroupsLayer, CacheLayerMixin):
    """The first of them in a model: it says how long the context is."""

    _layer_type = "counting_tensor_memory"  # type: ignore[misc]
