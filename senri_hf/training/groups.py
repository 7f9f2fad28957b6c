"""Which parameters are memory's, LoRA's and the base model's, and how fast each of them learns."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .arguments import MemoryTrainingArguments


# Parts of names, as adapters and models of their own give them to what is memory.
MEMORY = (".senri_block.", "memory_banks.", ".memory_attn.", ".memory_layernorm.", ".post_memory_")


def kind_of(name: str) -> str:
    """`"memory"`, `"lora"` or `"base_model"`, by a parameter's name."""
    if ".lora_" in name:
        return "lora"
    return "memory" if any(part in f".{name}" for part in MEMORY) else "base_model"


def learning_rate_of(name: str, args: MemoryTrainingArguments) -> float:
    """The learning rate of a parameter: that of its kind, where one is given."""
    own: float | None = getattr(
        args, {"memory": "memory_lr", "lora": "lora_lr", "base_model": "base_model_lr"}[kind_of(name)]
    )
    return args.learning_rate if own is None else own


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], args: MemoryTrainingArguments, decayed: set[str]
) -> list[dict[str, Any]]:
    """Groups for an optimizer: one for every learning rate, with and without weight decay.

    Args:
        decayed: Names of the parameters that decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    rates: dict[tuple[str, bool], float] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            key = (kind_of(name), name in decayed)
            groups.setdefault(key, []).append(parameter)
            rates[key] = learning_rate_of(name, args)
    return [
        {"params": members, "lr": rates[key], "weight_decay": args.weight_decay if key[1] else 0.0, "kind": key[0]}
        for key, members in groups.items()
    ]
