"""Training of sparse autoencoders on streamed activations."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import write_json
from .activations import ActivationStream
from .sparse_autoencoder import SparseAutoencoder, SparseAutoencoderOutput


# Activations among which those with a large error are looked for.
RESAMPLE_FROM = 8192
STREAM_FILE = "activation_stream.json"


@dataclass
class SparseAutoencoderTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what sparse autoencoders need; `max_steps` has to be said, as a stream has no end.

    Args:
        learning_rate: Of Adam, without weight decay.
        sparsity_warmup_steps: Steps in which the sparsity penalty rises from nothing.
        find_dead_every: Steps between looks at which latents are dead.
        resample_every: Steps between those at which dead latents are taken to where the error is, in the first half
            of training; 0 leaves that out.
        fit_scale: Whether scale and decoder bias are taken from the first activations before training, where the
            autoencoder has none yet: one that was trained before, or imported, keeps its own.
        directions: Where latents point at first: `"random"`, or at `"activations"` drawn at random, which leaves fewer
            of them dead where activations fill few of their dimensions.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})
    sparsity_warmup_steps: int = field(default=0, metadata={"help": "Steps in which the penalty rises."})
    find_dead_every: int = field(default=50, metadata={"help": "Steps between looks at which latents are dead."})
    resample_every: int = field(default=0, metadata={"help": "Steps between resamplings of dead latents; 0: none."})
    fit_scale: bool = field(default=True, metadata={"help": "Fit scale and decoder bias before training."})
    directions: str = field(default="random", metadata={"help": "First directions: 'random' or 'activations'."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        # The stream itself goes on where it was.
        self.ignore_data_skip = True
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} was given, but a stream has no end: say how many steps")
        if self.directions not in ("random", "activations"):
            raise ValueError(f"directions={self.directions!r} was given, but it must be 'random' or 'activations'")
        for name, least in (("sparsity_warmup_steps", 0), ("find_dead_every", 1), ("resample_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must be at least {least}")


class SparseAutoencoderTrainer(Trainer):
    """A `Trainer` of a `SparseAutoencoder` on an `ActivationStream`.

    The decoder keeps the norms of its rows, 1 but for imported ones, and its gradient goes across them. Logged beside
    the loss: `l0`, latents active per activation; `explained_variance` of the batches since the last entry; `dead`, the
    share of dead latents.

    Raises:
        ValueError: with several processes: each would train on activations of its own model.
    """

    def __init__(
        self,
        model: SparseAutoencoder,
        args: SparseAutoencoderTrainingArguments,
        train_dataset: ActivationStream,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1:
            raise ValueError(f"{args.world_size} processes were started, but a sparse autoencoder is trained by one")
        self.stream = train_dataset
        self._sums: dict[str, Tensor] = {}
        self._before = {"seconds": 0.0, "cpu_seconds": 0.0}
        self._began = time.perf_counter(), time.process_time()
        callbacks = [_KeepNorm(), _Resample(train_dataset), *(callbacks or [])]
        super().__init__(model=model, args=args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)

    def elapsed(self) -> dict[str, float]:
        """`seconds` on the clock and `cpu_seconds` of the processor since this was made.

        When it goes on at a checkpoint, with those that earlier runs took up to it.
        """
        now = time.perf_counter(), time.process_time()
        return {name: self._before[name] + now[i] - self._began[i] for i, name in enumerate(("seconds", "cpu_seconds"))}

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream, batch_size=None)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if not resume_from_checkpoint:
            assert isinstance(self.args, SparseAutoencoderTrainingArguments)
            sae = cast(SparseAutoencoder, self.model)
            if self.args.fit_scale and not sae.has_scale:
                sae.fit_scale(self.stream.peek())
            if self.args.directions == "activations":
                sae.point_at(self.stream.peek().to(self.args.device))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert isinstance(self.args, SparseAutoencoderTrainingArguments)
        warmup = self.args.sparsity_warmup_steps
        weight = min(1.0, (self.state.global_step + 1) / warmup) if warmup else 1.0
        output: SparseAutoencoderOutput = model(inputs["activations"], sparsity_weight=weight)
        with torch.no_grad():
            self._note(inputs["activations"], output)
        return (output.loss, output) if return_outputs else output.loss

    def _note(self, activations: Tensor, output: SparseAutoencoderOutput) -> None:
        assert output.latents is not None and output.reconstruction is not None
        x = activations.to(output.reconstruction.dtype)
        for name, value in (
            ("batches", x.new_ones(())),
            ("active", (output.latents > 0).sum(-1).float().mean()),
            ("error", (x - output.reconstruction).square().sum()),
            ("variance", (x - x.mean(0)).square().sum()),
        ):
            self._sums[name] = self._sums.get(name, 0) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            sums = {name: value.item() for name, value in self._sums.items()}
            sae = cast(SparseAutoencoder, self.model)
            dead = sae.silent_for >= sae.config.dead_after
            logs["l0"] = sums["active"] / sums["batches"]
            logs["explained_variance"] = 1 - sums["error"] / max(sums["variance"], 1e-30)
            logs["dead"] = dead.float().mean().item()
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        write_json(folder / STREAM_FILE, {**self.stream.state(), "elapsed": self.elapsed()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STREAM_FILE
        if not path.exists():
            raise ValueError(f"{resume_from_checkpoint} has no {STREAM_FILE}: it is no checkpoint of this trainer")
        state = json.loads(path.read_text())
        self.stream.resume(state)
        self._before = state.get("elapsed", self._before)


class _KeepNorm(TrainerCallback):
    """Keeps the decoder's norms around every optimizer step, and looks for dead latents."""

    norms: Tensor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.norms = model.W_dec.detach().norm(dim=-1, keepdim=True)
        model.find_dead()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model.remove_parallel_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model.project(self.norms)
        assert isinstance(args, SparseAutoencoderTrainingArguments)
        if state.global_step % args.find_dead_every == 0:
            model.find_dead()


class _Resample(TrainerCallback):
    """Takes dead latents to where the error is, and lets the optimizer forget what it knew of them."""

    def __init__(self, stream: ActivationStream) -> None:
        self.stream = stream

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        assert isinstance(args, SparseAutoencoderTrainingArguments)
        every = args.resample_every
        if not every or state.global_step % every or state.global_step > state.max_steps // 2:
            return
        dead = model.find_dead()
        model.explain_errors(self.stream.peek()[:RESAMPLE_FROM].to(model.device), dead)
        model.find_dead()
        optimizer = kwargs["optimizer"]
        for name, parameter in model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                held = optimizer.state.get(parameter, {}).get(moment)
                if held is not None and name == "W_enc":
                    held[:, dead] = 0
                elif held is not None and name != "b_dec":
                    held[dead] = 0
