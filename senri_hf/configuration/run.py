"""A training run as a file: three sections of settings, checked when they are read."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import yaml
from transformers.training_args import OptimizerNames

from .bank import BankConfig, check_choice, check_whole
from .memory_transformer import PLACEMENTS, SIZES, VARIANTS, resolve_placement


TRAINING_MODES = ("instruction_finetuning", "pretraining")
DISTRIBUTED = ("ddp", "fsdp")
SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP")
PRECISIONS = ("no", "bf16", "fp16")
SAVED_PRECISIONS = ("fp32", "fp16", "bf16")
# What a model that exists decides itself, and what its own config calls it.
ARCHITECTURE = {**SIZES, "vocab_size": "vocab_size"}
POSITIONS_AND_NORMS = ("use_rope", "rope_theta", "use_rms_norm")
OPTIMIZERS = {"adamw": "adamw_torch"}
# Those of transformers that need no arguments of their own; `min_lr_ratio` is where they end.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup",
)  # fmt: skip


@dataclass
class MemorySection(BankConfig):
    """What memory a model has: `BankConfig`'s settings, where memory is, and LoRA beside it.

    Args:
        vanilla_mode: No memory at all.
        use_memory_adapter: Memory cross-attention.
        memory_layer_placement, memory_layer_k, memory_layer_n, memory_layer_indices, memory_block_variant: As in
            `MemoryTransformerConfig`.
        use_lora: A LoRA instead of memory, of `lora_rank`, `lora_alpha`, `lora_dropout` on `lora_targets`.
        use_both_memory_and_lora: Both.
    """

    vanilla_mode: bool = False
    use_memory_adapter: bool = True
    memory_layer_placement: str = "all"
    memory_layer_k: int = 5
    memory_layer_n: int = 3
    memory_layer_indices: list[int] | None = None
    memory_block_variant: str = "A"
    use_lora: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    use_both_memory_and_lora: bool = False

    @property
    def has_memory(self) -> bool:
        """Whether there is memory cross-attention."""
        return not self.vanilla_mode and (self.use_memory_adapter or self.use_both_memory_and_lora)

    @property
    def has_lora(self) -> bool:
        """Whether there is a LoRA."""
        return self.use_lora or self.use_both_memory_and_lora

    def check(self) -> None:
        """Raise ValueError naming the first setting that is out of its range or contradicts another."""
        self.check_bank()
        check_choice("memory_layer_placement", self.memory_layer_placement, PLACEMENTS)
        check_choice("memory_block_variant", self.memory_block_variant, VARIANTS)
        for name in ("memory_layer_k", "memory_layer_n", "lora_rank", "lora_alpha"):
            check_whole(name, getattr(self, name), 1)
        check_number("lora_dropout", self.lora_dropout, 0, 1)
        if not self.lora_targets:
            raise ValueError("lora_targets is empty; name the layers that get a LoRA, for example [q_proj, v_proj]")
        if self.vanilla_mode and self.use_both_memory_and_lora:
            raise ValueError("use_both_memory_and_lora=true was given with vanilla_mode=true, which leaves memory out")
        if self.use_lora and not self.use_both_memory_and_lora and not self.vanilla_mode and self.use_memory_adapter:
            raise ValueError(
                "use_lora=true was given with use_memory_adapter=true: set use_both_memory_and_lora=true for both, or "
                "use_memory_adapter=false for LoRA alone"
            )

    def layers(self, count: int) -> list[int]:
        """The memory layers of a model with `count` layers."""
        return resolve_placement(
            self.memory_layer_placement,
            self.memory_layer_k,
            self.memory_layer_n,
            self.memory_layer_indices,
            count,
        )


@dataclass
class ModelSection:
    """The model: a new one of these sizes, or one that exists.

    Args:
        hidden_dim, num_heads, num_layers, intermediate_dim, vocab_size, max_seq_len: Sizes of a new model.
        tokenizer_name: Tokenizer of a new model, or another one for a model that exists. A new model without one gets a
            byte-level BPE of `vocab_size` that is trained on the run's own text.
        use_rope, rope_theta, use_rms_norm, norm_eps: Positions and norms of a new model.
        dropout: On embeddings, sublayers and memory; of a model that exists, on memory only.
        attention_dropout: On attention weights.
        base_model_name: A model that exists: a name of `senri_hf.base_names()`, a folder or a Hub id.
        freeze_base_model: Train what is added to it only.
        use_flash_attention: Fused attention: FlashAttention 2 where it is installed and documents are not packed, else
            PyTorch's; otherwise eager.
    """

    hidden_dim: int = 768
    num_heads: int = 12
    num_layers: int = 12
    intermediate_dim: int = 3072
    vocab_size: int = 32000
    max_seq_len: int = 8192
    tokenizer_name: str | None = None
    use_rope: bool = True
    rope_theta: float = 10000.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-6
    use_rms_norm: bool = True
    base_model_name: str | None = None
    freeze_base_model: bool = True
    use_flash_attention: bool = True

    def check(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        for name in ("hidden_dim", "num_heads", "num_layers", "intermediate_dim", "vocab_size", "max_seq_len"):
            check_whole(name, getattr(self, name), 1)
        check_number("dropout", self.dropout, 0, 1)
        check_number("attention_dropout", self.attention_dropout, 0, 1)
        check_number("norm_eps", self.norm_eps, 0, 1)
        check_number("rope_theta", self.rope_theta, 1, float("inf"))
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} was given, but it must divide hidden_dim={self.hidden_dim}")


@dataclass
class TrainingSection:
    """How it is trained.

    Args:
        memory_lr, lora_lr, base_model_lr: Learning rates of memory, of LoRA, and of everything else.
        training_mode: `"instruction_finetuning"`: chats through the model's chat template, of which the assistant's
            answers are learned. `"pretraining"`: text, documents packed into rows of `max_length` without seeing each
            other.
        dataset_name: `ordinary_text` (books that a package ships; `dataset_subset` names one, see
            `senri_hf.tasks.text.TEXT_SOURCES`), `recall` (chats about people), a .txt, .json, .jsonl, .csv or .parquet
            file, or a data set on the Hub.
        dataset_subset, dataset_split, eval_split: Its subset and splits, in the language of `datasets`.
        text_field: The column of texts or of chat messages.
        max_length: Tokens of a row.
        distributed_strategy, num_gpus, fsdp_sharding_strategy: How the processes of `accelerate launch` share the work.
        batch_size: Rows per process and step. gradient_accumulation_steps: Steps that are added up.
        max_steps, warmup_steps: Length of the run and of the rise of the learning rate.
        optimizer: One of transformers' names, or `"adamw"`.
        scheduler, min_lr_ratio: Shape of the learning rate, and the share of it that is left at the end.
        mixed_precision: `"bf16"`, `"fp16"` or `"no"`.
        save_precision: Of the final model: `"fp32"`, `"fp16"` or `"bf16"`; as it is when None.
        save_best_model: Keep the checkpoint of the lowest evaluation loss, and end with it.
        early_stopping, early_stopping_patience, early_stopping_threshold: End when evaluations no longer improve.
        resume_from_checkpoint: A checkpoint to go on from, or the folder of a run, for its latest one.
        seed: Of weights and data order.
    """

    memory_lr: float = 1e-4
    lora_lr: float = 1e-4
    base_model_lr: float = 1e-5
    training_mode: str = "instruction_finetuning"
    dataset_name: str | None = None
    dataset_subset: str | None = None
    dataset_split: str = "train"
    eval_split: str | None = "test"
    text_field: str = "messages"
    max_length: int = 8192
    distributed_strategy: str = "ddp"
    num_gpus: int = 1
    fsdp_sharding_strategy: str = "FULL_SHARD"
    batch_size: int = 4
    gradient_accumulation_steps: int = 4
    max_steps: int = 10000
    warmup_steps: int = 100
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    min_lr_ratio: float = 0.1
    mixed_precision: str = "bf16"
    save_precision: str | None = None
    gradient_checkpointing: bool = True
    save_steps: int = 500
    eval_steps: int = 500
    save_total_limit: int = 3
    save_best_model: bool = True
    early_stopping: bool = False
    early_stopping_patience: int = 5
    early_stopping_threshold: float = 0.0
    logging_steps: int = 10
    log_to_wandb: bool = False
    wandb_run_name: str | None = None
    output_dir: str = "./outputs"
    resume_from_checkpoint: str | None = None
    seed: int = 42

    def check(self) -> None:
        """Raise ValueError naming the first setting that is out of its range or contradicts another."""
        for name, allowed in (
            ("training_mode", TRAINING_MODES),
            ("distributed_strategy", DISTRIBUTED),
            ("fsdp_sharding_strategy", SHARDING),
            ("mixed_precision", PRECISIONS),
            ("optimizer", (*OPTIMIZERS, *(name.value for name in OptimizerNames))),
            ("scheduler", SCHEDULERS),
        ):
            check_choice(name, getattr(self, name), allowed)
        if self.save_precision is not None:
            check_choice("save_precision", self.save_precision, SAVED_PRECISIONS)
        for name in (
            "num_gpus", "batch_size", "gradient_accumulation_steps", "max_steps", "save_steps",
            "eval_steps", "save_total_limit", "early_stopping_patience", "logging_steps",
        ):  # fmt: skip
            check_whole(name, getattr(self, name), 1)
        check_whole("max_length", self.max_length, 2)  # the first token of a row is never predicted
        check_whole("warmup_steps", self.warmup_steps, 0)
        for name in ("memory_lr", "lora_lr", "base_model_lr", "weight_decay", "max_grad_norm"):
            check_number(name, getattr(self, name), 0, float("inf"))
        check_number("min_lr_ratio", self.min_lr_ratio, 0, 1)
        check_number("early_stopping_threshold", self.early_stopping_threshold, 0, float("inf"))
        if self.eval_split is None and (self.save_best_model or self.early_stopping):
            raise ValueError(
                "eval_split=null was given with save_best_model or early_stopping, which go by an evaluation; set both "
                "to false, or name a split"
            )
        if self.early_stopping and not self.save_best_model:
            raise ValueError("early_stopping=true was given with save_best_model=false, whose checkpoints it ends with")
        if self.save_best_model and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps={self.save_steps} was given, but with save_best_model it must be a multiple of eval_steps="
                f"{self.eval_steps}"
            )


@dataclass
class RunConfig:
    """The sections `memory`, `model` and `training` of a run.

    Attributes:
        given: The keys that were given, of all sections; the others have their defaults.
    """

    memory: MemorySection = field(default_factory=MemorySection)
    model: ModelSection = field(default_factory=ModelSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    given: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a YAML file, with `key=value` or `section.key=value` over it.

        Raises:
            OSError: when there is no such file.
            ValueError: naming the key and the nearest right one, or the value and what was expected.
        """
        content: Any = {}
        if path is not None:
            try:
                content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must have the sections {tuple(SECTIONS)}, but it is a {type(content).__name__}")
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for name, values in content.items():
            if name not in SECTIONS:
                raise unknown(str(name), list(SECTIONS), "section")
            if values is not None and not isinstance(values, dict):
                raise ValueError(f"The section {name} must hold keys and values, but it is {values!r}")
            sections[name].update(values or {})
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"{override!r} was given, but a setting is changed by key=value")
            section, dot, key = key.rpartition(".")
            if dot and section not in SECTIONS:
                raise unknown(section, list(SECTIONS), "section")
            try:
                sections[section or section_of(key)][key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(
                    f"{override!r} was given, but {text!r} is no YAML; quote it, as in {key}=\"'…'\""
                ) from error
        config = cls(**{name: read_section(SECTIONS[name], values) for name, values in sections.items()})  # type: ignore[arg-type]
        config.given = {key for values in sections.values() for key in values}
        config.check()
        return config

    def check(self) -> None:
        """Raise ValueError naming the first setting that is wrong, in any section."""
        for section in (self.memory, self.model, self.training):
            section.check()
        if self.model.base_model_name is None:
            if self.memory.has_lora:
                raise ValueError("use_lora needs a model that exists: set base_model_name")
            if self.training.max_length > self.model.max_seq_len:
                raise ValueError(
                    f"max_length={self.training.max_length} was given, but the model has max_seq_len="
                    f"{self.model.max_seq_len}"
                )
            if not self.memory.vanilla_mode:
                self.memory.layers(self.model.num_layers)

    def effective(self) -> str:
        """All settings as they are in force, as YAML that `load` reads; a base model's sizes are its own."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        if self.model.base_model_name is not None:
            for name in (*ARCHITECTURE, *POSITIONS_AND_NORMS, "attention_dropout"):
                if name not in self.given:
                    del sections["model"][name]
        return yaml.safe_dump(sections, sort_keys=False)


SECTIONS: dict[str, type] = {"memory": MemorySection, "model": ModelSection, "training": TrainingSection}


def section_of(key: str) -> str:
    """The section that has a key."""
    for name, section in SECTIONS.items():
        if key in {f.name for f in fields(section)}:
            return name
    raise unknown(key, [f.name for section in SECTIONS.values() for f in fields(section)], "setting")


def read_section(section: type, values: dict[str, Any]) -> Any:
    """A section from its keys and values, each of its field's type."""
    types_of = typing.get_type_hints(section)
    names = [f.name for f in fields(section)]
    for key in values:
        if key not in names:
            raise unknown(str(key), [f.name for other in SECTIONS.values() for f in fields(other)], "setting")
    return section(**{key: converted(key, value, types_of[key]) for key, value in values.items()})


def unknown(key: str, names: list[str], what: str) -> ValueError:
    """An error that names the nearest right key, and where it belongs when it is right elsewhere."""
    if key in names:
        return ValueError(f"{key} is a setting of the section {section_of(key)}; it stands in another one")
    near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f". There are {names}"
    return ValueError(f"{key} is no {what}{hint}")


def converted(name: str, value: Any, wanted: Any) -> Any:
    """A value of YAML as its field's type; `1e-4`, which YAML takes for text, is a number."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if name == "mixed_precision" and value is False:
        return "no"  # which YAML takes for false
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is int and isinstance(value, bool):
            continue
        if origin is list and isinstance(value, list) and not all(type(v) in typing.get_args(option) for v in value):
            continue
        if isinstance(value, origin):
            return value
    expected = " or ".join(
        "null" if option is type(None) else str(option) if typing.get_args(option) else option.__name__
        for option in options
    )
    raise ValueError(f"{name}={value!r} was given, but {name} must be {expected}")


def check_number(name: str, value: float, least: float, most: float) -> None:
    """ValueError when a setting is no finite number from `least` to `most`."""
    if not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} was given, but {name} must be a number from {least} to {most}")
