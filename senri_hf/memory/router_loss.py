"""How the losses of routers reach the loss that is trained.

A decoder leaves the router loss of its last training pass with itself. Whoever computes the loss takes it: the causal
language model's own forward where it is given labels, or a trainer. A trainer that may leave the loss of the model's
forward unused keeps it from being taken there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn


class RouterLossSlot:
    """The router loss of one training pass until it is taken; a copy of a model starts without one."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.is_kept = False
        self.over_processes = False  # whether it is to be that of the tokens of all processes

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def take(self) -> Tensor | None:
        """The loss, once; None while it is kept."""
        if self.is_kept:
            return None
        loss, self.loss = self.loss, None
        return loss


def slots_of(model: nn.Module) -> list[RouterLossSlot]:
    """The places in a model where router losses wait."""
    found = (vars(module).get("router_loss") for module in model.modules())
    return [slot for slot in found if isinstance(slot, RouterLossSlot)]


@contextmanager
def router_loss_kept(model: nn.Module, over_processes: bool = False) -> Iterator[None]:
    """Within it nobody takes the router loss of a model's passes, which waits for whoever asks afterwards.

    Args:
        over_processes: Whether it is that of the tokens of all processes, which then all have to make the same passes.
    """
    slots = slots_of(model)
    try:
        for slot in slots:
            slot.is_kept, slot.over_processes = True, over_processes
        yield
    finally:
        for slot in slots:
            slot.is_kept, slot.over_processes = False, False


def take_router_loss(model: nn.Module) -> Tensor | None:
    """The router loss that a model's last training pass left and nobody took yet; None where there is none."""
    taken = [slot.take() for slot in slots_of(model)]
    losses = [loss for loss in taken if loss is not None]
    return sum((loss.to(losses[0].device) for loss in losses[1:]), losses[0]) if losses else None


def share_of_batch(labels: Tensor, num_items_in_batch: Any) -> Tensor | float:
    """The weight of this pass's labels in a batch that is accumulated over several passes.

    A loss that is a sum over labelled items divided by `num_items_in_batch` adds up to a mean over passes; a loss that
    is a mean has to be weighed by its share to do so too.

    Args:
        labels: [B, T] next tokens, of which the first is predicted by none; or classes [B] or values of whole rows.
    """
    if num_items_in_batch is None:
        return 1.0
    names_tokens = labels.dim() > 1 and not labels.is_floating_point()  # else classes or values of whole rows
    learned = labels[..., 1:] if names_tokens else labels
    return (learned != -100).sum() / num_items_in_batch


def with_router_loss(loss: Tensor, waiting: Tensor | None, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of a pass and that of its routers, if one waits, weighed by its share of the batch."""
    if waiting is None:
        return loss
    share = torch.as_tensor(share_of_batch(labels, num_items_in_batch), device=loss.device)
    return loss + waiting.to(loss.device) * share
