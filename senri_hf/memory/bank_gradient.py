"""The gradient of a bank's rows: one dense tensor, into which all that reads the rows adds."""

from typing import Any

import torch
from torch import Tensor


class RowGradient:
    """Sums of a backward pass, by row.

    A table is opened once a forward pass, and read by many layers. Each would give a gradient as large as the table, or
    a sparse one, and autograd would add them; here they add into one tensor, and autograd gets none of them.
    """

    def __init__(self) -> None:
        # One a backward pass: of one that did not come to the table's own gradient, nothing may be left for the next.
        self.sums: dict[int, Tensor] = {}

    def of(self, rows: Tensor) -> Tensor:
        """The sum of this backward pass, with the shape of rows, in at least float32; to be added to in place."""
        current = torch._C._current_graph_task_id()
        if current not in self.sums:
            self.sums[current] = torch.zeros_like(rows, dtype=accumulator(rows))
        return self.sums[current]

    def take(self) -> Tensor | None:
        """The sum of this backward pass, None where nothing was added."""
        return self.sums.pop(torch._C._current_graph_task_id(), None)


class _Open(torch.autograd.Function):
    """The identity, whose gradient is what was added and what autograd found."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: RowGradient) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, rows.dtype
        ctx.set_materialize_grads(False)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        added: Tensor | None = ctx.gradient.take()
        if added is None:
            return grad, None
        return (added if grad is None else added.add_(grad)).to(ctx.dtype), None


class _TakeChapters(torch.autograd.Function):
    """Chapters [A] of rows [C * T, D] as [A, T, D]; their gradient is added."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, chapters: Tensor, length: int, gradient: RowGradient) -> Tensor:
        ctx.save_for_backward(rows, chapters)
        ctx.length, ctx.gradient = length, gradient
        return rows.unflatten(0, (-1, length))[chapters]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        rows, chapters = ctx.saved_tensors
        sums = ctx.gradient.of(rows).unflatten(0, (-1, ctx.length))
        sums.index_add_(0, chapters, grad.to(sums.dtype))
        return None, None, None, None


def open_rows(rows: Tensor, gradient: RowGradient) -> Tensor:
    """Rows [R, D] as a forward pass reads them, `gradient` being where what reads them adds."""
    opened: Tensor = _Open.apply(rows, gradient)  # type: ignore[no-untyped-call]
    return opened


def take_chapters(rows: Tensor, chapters: Tensor, length: int, gradient: RowGradient) -> Tensor:
    """Chapters [A] of `length` of these opened rows each: [A, length, D]."""
    taken: Tensor = _TakeChapters.apply(rows, chapters, length, gradient)  # type: ignore[no-untyped-call]
    return taken


def accumulator(x: Tensor) -> torch.dtype:
    """The type in which sums of x are kept."""
    return torch.promote_types(x.dtype, torch.float32)
