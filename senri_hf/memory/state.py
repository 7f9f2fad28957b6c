"""Tensors that belong to the rows of a batch: the form in which every memory is held."""

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor


class RowState:
    """Base of frozen dataclasses whose fields are tensors with the batch as first dimension.

    Nothing is ever changed in place: an update makes a new object, so that a snapshot is a reference and rolling back
    is taking the older object.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `function` applied to every tensor."""
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors().values())).shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def detach(self) -> Self:
        return self.map(torch.Tensor.detach)


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """ValueError naming the first of `tensors` that is not finite or has not `expected`'s name, shape or dtype."""
    if tensors.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ValueError(
            f"The memory of {where} does not fit: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}"
        )
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"The memory of {where} does not fit: {name} is {tensor.dtype} {list(tensor.shape)}, but this model's "
                f"is {wanted.dtype} {list(wanted.shape)}. It was made with other settings or by another model"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"The memory of {where} is damaged: {name} holds NaN or infinity. Use an earlier copy")
