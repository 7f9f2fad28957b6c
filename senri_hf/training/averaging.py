"""The mean of the weights that training passes through."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import whole


class WeightAverage(TrainerCallback):
    """Ends training with the mean of the trained weights after each of its last steps.

    Weights between those that a high learning rate passes through often serve better than any of them: Izmailov et al.
    2018, "Averaging weights leads to wider optima and better generalization", algorithm 1 with one step a cycle. Every
    process needs whole parameters: not for FSDP.

    Args:
        start: Share of the steps after which averaging starts, at least 0 and below 1.
        model: What is trained; its parameters that have a gradient are averaged, in float32 or wider.

    Raises:
        ValueError: when `start` is not such a share; while training, when a checkpoint that is resumed from was made
            past the start of averaging and holds no average.
    """

    NAME = "average.safetensors"

    def __init__(self, start: float, model: nn.Module) -> None:
        if not 0 <= start < 1:
            raise ValueError(
                f"start={start!r} was given, but averaging starts after a share of the steps, 0 to below 1"
            )
        self.start = start
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean: dict[str, Tensor] = {}
        self.count = 0

    def after(self, state: TrainerState) -> int:
        """The last step that does not count."""
        return int(self.start * state.max_steps)

    def folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint of the present step."""
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mean, self.count = {}, max(0, state.global_step - self.after(state))
        if self.count:
            path = self.folder(args, state) / self.NAME
            if not path.exists():
                raise ValueError(
                    f"{path} is missing: training goes on from step {state.global_step}, and weights are averaged "
                    f"since step {self.after(state)}; resume from an earlier checkpoint or average from later on"
                )
            self.mean = load_file(path)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step <= self.after(state):
            return
        self.count += 1
        for name, parameter in self.trained.items():
            now = parameter.detach().to("cpu", torch.promote_types(parameter.dtype, torch.float32))
            self.mean[name] = self.mean[name].lerp_(now, 1 / self.count) if name in self.mean else now.clone()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.mean and state.is_world_process_zero:
            with whole(self.folder(args, state) / self.NAME) as scratch:
                save_file(self.mean, scratch)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, mean in self.mean.items():
            self.trained[name].copy_(mean)
