"""Schedules of the learning rate that end above zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from .arguments import MemoryTrainingArguments


class FlooredSchedule(Trainer):
    """A `Trainer` whose learning rates end at `min_lr_ratio` of themselves."""

    args: MemoryTrainingArguments

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of `args`, which after its rise falls to `min_lr_ratio` instead of to zero."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        floor, warmup = self.args.min_lr_ratio, self.args.get_warmup_steps(num_training_steps)
        if floor and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [floored(factor, floor, warmup) for factor in scheduler.lr_lambdas]
        return scheduler


def floored(factor: Callable[[int], float], floor: float, warmup: float) -> Callable[[int], float]:
    """A factor of the learning rate that after the rise goes from 1 to `floor` as `factor` goes from 1 to 0."""

    # A function, of which a checkpoint of the schedule holds nothing.
    def scaled(step: int) -> float:
        return float(factor(step)) if step < warmup else floor + (1 - floor) * float(factor(step))

    return scaled
