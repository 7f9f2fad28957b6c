"""How much of its attention an open conversation gave to what memory holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .layer import ROLLBACK_TOKENS, too_far_back


@dataclass(frozen=True)
class Reads:
    """What memory's slots got of the conversation's tokens: of its last ones one by one, of those before in sum.

    Nothing is ever changed in place.

    Attributes:
        settled: [B, M] float32, what those got that can no longer be taken back; None for nothing.
        until: The column of the conversation at which these end.
        recent: Columns [B, t, M] float32 after that, and the first of them.
    """

    settled: Tensor | None = None
    until: int = 0
    recent: tuple[tuple[int, Tensor], ...] = ()

    def add(self, start: int, read: Tensor) -> Self:
        """And what the columns [B, T, M] from `start` on read; columns that read nothing may be left out."""
        recent = (*self.recent, (start, read))
        stop = start + read.shape[1]
        if stop - recent[0][0] <= 2 * ROLLBACK_TOKENS:
            return type(self)(self.settled, self.until, recent)
        until, settled, later = stop - ROLLBACK_TOKENS, self.settled, []
        for first, columns in recent:
            count = min(max(until - first, 0), columns.shape[1])
            if count:
                total = columns[:, :count].sum(1)
                settled = total if settled is None else settled + total
            if count < columns.shape[1]:
                later.append((first + count, columns[:, count:].clone()))  # so that the others can go
        return type(self)(settled, until, tuple(later))

    def before(self, column: int, length: int) -> Self:
        """Without what was read from a column on, of a conversation of `length`; ValueError if too far back."""
        if column < self.until:
            raise too_far_back(length - column, length - self.until)
        recent = tuple((first, columns[:, : column - first]) for first, columns in self.recent if first < column)
        return type(self)(self.settled, self.until, recent)

    @property
    def total(self) -> Tensor | None:
        """[B, M] what every slot got, None for nothing."""
        parts = [columns.sum(1) for _, columns in self.recent]
        parts = parts if self.settled is None else [self.settled, *parts]
        return torch.stack(parts).sum(0) if parts else None

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` applied to every tensor; each has the batch as first dimension."""
        settled = None if self.settled is None else function(self.settled)
        return type(self)(settled, self.until, tuple((first, function(columns)) for first, columns in self.recent))
