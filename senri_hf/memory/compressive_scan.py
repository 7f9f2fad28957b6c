"""The one part of the compressive mechanism that runs chunk after chunk: how the matrix goes through them.

Its gradient is written out, so that neither way does more in a step than two products of matrices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scan(
    memory: Tensor, keys: Tensor, new: Tensor, old: Tensor | None, carry: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """M = c M + K^T U chunk after chunk, with U = A - B M where something is taken away and U = A where not.

    N chunks of C tokens, G heads of all rows.

    Args:
        memory: [G, d_k, d_v] before the first chunk.
        keys: [N, G, C, d_k] K.
        new: [N, G, C, d_v] A. old: [N, G, C, d_k] B; None for none.
        carry: [N, G, 1, 1] c, what is left of the matrix; None for all of it.

    Returns:
        The matrix that each chunk finds, [N, G, d_k, d_v]; U, [N, G, C, d_v]; the matrix after the last chunk.
    """
    if len(keys) == 1:
        updates = new if old is None else torch.baddbmm(new[0], old[0], memory, alpha=-1)[None]
        left = memory if carry is None else memory * carry[0]
        return memory[None], updates, torch.baddbmm(left, keys[0].transpose(1, 2), updates[0])
    return Scan.apply(memory, keys, new, old, carry)  # type: ignore[no-any-return,no-untyped-call]


class Scan(torch.autograd.Function):
    """`scan` with its gradient, which cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, memory: Tensor, keys: Tensor, new: Tensor, old: Tensor | None, carry: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        found, updates = memory.new_empty(len(keys) + 1, *memory.shape), new.clone()
        found[0] = memory
        for index in range(len(keys)):
            before, after = found[index], found[index + 1]
            if old is not None:
                updates[index].baddbmm_(old[index], before, alpha=-1)
            after.copy_(before if carry is None else before * carry[index])
            after.baddbmm_(keys[index].transpose(1, 2), updates[index])
        ctx.save_for_backward(keys, updates, old, carry, found)
        return found[:-1], updates, found[-1].clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_found: Tensor, of_updates: Tensor, of_memory: Tensor) -> tuple[Tensor | None, ...]:
        """With G the gradient of the matrix after a chunk: dU gets K G, and the matrix before it c G - B^T dU."""
        keys, updates, old, carry, found = ctx.saved_tensors
        of_matrix, of_new = torch.cat([of_found, of_memory[None]]), of_updates.clone()
        for index in reversed(range(len(keys))):
            before, after = of_matrix[index], of_matrix[index + 1]
            of_new[index].baddbmm_(keys[index], after)
            before.add_(after if carry is None else after * carry[index])
            if old is not None:
                before.baddbmm_(old[index].transpose(1, 2), of_new[index], alpha=-1)
        found, of_after = found[:-1], of_matrix[1:]
        return (
            of_matrix[0],
            updates @ of_after.transpose(-1, -2),
            of_new,
            None if old is None else -(of_new @ found.transpose(-1, -2)),
            None if carry is None else (found * of_after).sum((-2, -1), keepdim=True),
        )
