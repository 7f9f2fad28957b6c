"""Where a memory's tokens stand in a batch: padding and packing taken apart once, for all layers."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How columns [B, T] become streams [R, L] in which real tokens stand together, padding last.

    R is B, or the number of packed documents.

    Attributes:
        index: [R, L] places in the flattened batch, with B * T for none; None where nothing has to move.
        valid: [R, L] bool.
        real: [B, T] bool.
    """

    index: Tensor | None
    valid: Tensor
    real: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Self:
        """The tokens real [B, T] are no padding; one stream for every row."""
        batch, length = real.shape
        if length == 1 or bool(real.all()):
            return cls(None, real, real)
        order = (~real).long().argsort(dim=1, stable=True)
        valid = torch.arange(length, device=real.device) < real.sum(1, keepdim=True)
        row = torch.arange(batch, device=real.device)[:, None] * length
        return cls((row + order).where(valid, batch * length), valid, real)

    @classmethod
    def packed(cls, document: Tensor) -> Self:
        """Several documents stand in a row, document [B, T] int64 numbers them from 0 in order, -1 for padding."""
        batch, length = document.shape
        count = int(document.max()) + 1
        row = torch.arange(batch, device=document.device)[:, None]
        flat = torch.where(document < 0, batch * count, row * count + document).flatten()
        sizes = torch.bincount(flat, minlength=batch * count + 1)[: batch * count]
        longest = int(sizes.max())
        start = sizes.cumsum(0) - sizes
        columns = torch.arange(longest, device=document.device)
        valid = columns < sizes[:, None]
        order = flat.argsort(stable=True)
        place = order[(start[:, None] + columns).clamp_max(order.shape[0] - 1)]
        kept = sizes > 0
        return cls(place.where(valid, batch * length)[kept], valid[kept], document >= 0)

    def gather(self, columns: Tensor) -> Tensor:
        """[B, T, ...] to [R, L, ...], zero where no token stands."""
        if self.index is None:
            return columns
        flat = columns.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.index]

    def scatter(self, streams: Tensor) -> Tensor:
        """[R, L, ...] to [B, T, ...], zero where no token is real."""
        if self.index is None:
            return streams
        batch, length = self.real.shape
        flat = streams.new_zeros(batch * length + 1, *streams.shape[2:])
        flat = flat.index_copy(0, self.index.flatten(), streams.flatten(0, 1))
        return flat[:-1].unflatten(0, (batch, length))
