"""Training of a language model with a bank: its router losses, learning rates, and what is logged."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ..files import write_json
from ..memory.bank_reader import router_record
from ..memory.router_loss import router_loss_kept, share_of_batch, take_router_loss
from .arguments import MemoryTrainingArguments
from .groups import kind_of, parameter_groups
from .schedule import FlooredSchedule


BASE_PARAMETERS = "base_parameters.safetensors"


class RouterLossMixin:
    """Adds router losses to a trainer's own loss: put it before a trainer's class.

    `class BankSFTTrainer(RouterLossMixin, SFTTrainer)` trains a bank with TRL, which computes its loss from hidden
    states and leaves the one of the model's forward unused. Where a trainer uses that one nothing comes twice. Several
    processes learn what one would of all their tokens: routers spread them all over the chapters, not each process its
    own.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.get("labels")
        parent: Any = super()
        trainer: Any = self
        over_processes = model.training and trainer.accelerator.num_processes > 1
        with router_loss_kept(model, over_processes):
            result = parent.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        waiting = take_router_loss(model)
        if waiting is None:
            return result
        loss = result[0] if return_outputs else result
        share = share_of_batch(labels, num_items_in_batch) if isinstance(labels, Tensor) else 1.0
        if over_processes:  # how much each process's own tokens count is in the loss already
            share = trainer.accelerator.reduce(torch.as_tensor(share, device=loss.device).float(), reduction="mean")
        loss = loss + waiting.to(loss.device) * share * self._processes(num_items_in_batch)
        return (loss, *result[1:]) if return_outputs else loss

    def _processes(self, num_items_in_batch: Any) -> int:
        """What a trainer multiplies a loss by whose items are those of all processes, over which it is averaged."""
        trainer: Any = self
        if num_items_in_batch is None or not trainer.args.average_tokens_across_devices:
            return 1
        processes: int = trainer.accelerator.num_processes // trainer.get_tp_size()
        return processes


class LanguageModelTrainer(RouterLossMixin, FlooredSchedule):
    """A `Trainer` for next tokens, of a memory transformer or of a model with a bank and LoRA beside it.

    Learning rates are `memory_lr`, `lora_lr` and `base_model_lr`, and end at `min_lr_ratio` of themselves. Logged are
    the entropy of routers and the share of reads that the busiest chapter gets.
    """

    args: MemoryTrainingArguments

    def create_accelerator_and_postprocess(self) -> None:
        state = self.args.distributed_state
        on_cpus = state is not None and state.distributed_type == DistributedType.MULTI_CPU
        if self.args.fsdp and on_cpus and not torch.accelerator.is_available():
            # Accelerate drops an FSDP plugin in silence unless the processes have GPUs or the like, though PyTorch
            # shards on CPUs as well. Device and backend are settled by now; this lets the plugin through, no more.
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"FSDP was asked for, but processes of the kind {self.accelerator.distributed_type.value} would not "
                "shard the model; start the run without --cpu, or use distributed_strategy=ddp"
            )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.activation_checkpointing and hasattr(self.model, "peft_config"):
            raise ValueError(
                "FSDP's activation checkpointing was asked for, but it calls layers again with their hooks, by which "
                "adapters act, when the pass that they belong to is over; use gradient_checkpointing=true instead"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with a learning rate for every kind of parameter."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(
                trained.named_parameters(), self.args, set(self.get_decay_parameter_names(trained))
            )
            if not groups:
                raise ValueError(
                    "Nothing would be trained: the base model is frozen, and neither memory nor LoRA is added to it. "
                    "Set freeze_base_model=false, or add memory or LoRA"
                )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.model is not None:
            record = router_record(self.model)
            if record is not None:
                logs["router_entropy"] = record.entropy.item()
                logs["busiest_chapter"] = record.usage.max().item()
        super().log(logs, *args, **kwargs)

    # An adapter's checkpoint holds the adapter alone; where the base model is trained too, it goes beside it.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        trained = trained_base_parameters(self.model)
        if trained and self.args.should_save:
            values = trained if state_dict is None else state_dict  # which is whole where parameters are sharded
            held = {name: values[name].detach().cpu().contiguous() for name in trained}
            save_file(held, folder / BASE_PARAMETERS)
        if self.args.should_save and (trained or (folder / "lora").is_dir()):
            # By its name the base model would be loaded with the memory alone: not at all is better.
            name_base(folder, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_base_parameters(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            load_base_parameters(self.model, self.state.best_model_checkpoint)


def name_base(folder: Path, base: str | None) -> None:
    """Let the adapter in a folder name the base that it belongs to, by which Auto classes load it; None for none."""
    path = folder / "adapter_config.json"
    if path.is_file():
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base})


def trained_base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a base model that are trained beside its adapters, by name; none without adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and kind_of(n) == "base_model"}


def load_base_parameters(model: Any, folder: str | Path) -> None:
    """Load what a run trained of its base model, where there is any.

    Raises:
        ValueError: where it is not this model's; the model is then as it was.
    """
    path = Path(folder) / BASE_PARAMETERS
    if not path.is_file():
        return
    trained: dict[str, Any] = load_file(path)
    own = model.state_dict()
    wrong = [name for name, value in trained.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{path} does not fit this model, which has no parameters of the names and shapes of {wrong[:3]}; load it "
            "into the base model and adapters that were trained"
        )
    # Adapters and what was frozen are not in it; where parameters are sharded, each process takes its share.
    set_model_state_dict(model, trained, options=StateDictOptions(full_state_dict=True, strict=False))
