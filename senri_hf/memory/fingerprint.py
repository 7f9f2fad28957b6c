"""What tells one model and its memory adapters from another: settings and a sample of the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .owner import owners


SAMPLED_TENSORS = 24
SAMPLED_VALUES = 8
# Two copies of the same weights in different dtypes differ by less, other weights by far more.
TOLERANCE = 0.02


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Architecture, sizes and sampled weights of a model, and those of the memory it holds.

    Samples are compared with a tolerance (`difference`), so that a model in another dtype, on another device, or with
    quantized layers is still the same model.
    """
    config: Any = model.config.get_text_config(decoder=True)
    ours = {id(p) for owner in owners(model) for p in owner.parameters()}  # type: ignore[attr-defined]
    adapters = {name for name in getattr(model, "peft_config", {})}
    base, memory = {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or parameter.numel() < SAMPLED_VALUES:
            continue
        # Names without the wrappers that PEFT puts around a model, and without the adapters' names.
        short = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        parts = [part for part in short.split(".") if part not in adapters]
        if id(parameter) in ours:
            memory[".".join(parts)] = parameter
        elif not any(part in adapters for part in short.split(".")):
            base[".".join(parts)] = parameter
    return {
        "architecture": getattr(config, "model_type", type(model).__name__),
        "name_or_path": public_name(str(getattr(config, "_name_or_path", "") or "")),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "weights": sample(base),
        "memory_weights": sample(memory),
    }


def public_name(name_or_path: str) -> str:
    """A model's name; of a folder only its last part, as paths are nobody else's."""
    path = Path(name_or_path)
    return path.name if path.is_absolute() or path.exists() else name_or_path


def sample(parameters: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """A few values of a few parameters, evenly spread over names and positions."""
    names = sorted(parameters)
    step = max(1, len(names) // SAMPLED_TENSORS)
    chosen = {}
    for name in names[::step][:SAMPLED_TENSORS]:
        flat = parameters[name].detach().reshape(-1)
        index = torch.arange(SAMPLED_VALUES, device=flat.device) * (flat.numel() - 1) // (SAMPLED_VALUES - 1)
        chosen[name] = [round(value, 6) for value in flat[index].float().tolist()]
    return chosen


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What differs between two fingerprints, in words; None when they are of the same model and memory."""
    for name in ("architecture", "hidden_size", "num_hidden_layers", "vocab_size"):
        if theirs.get(name) != ours.get(name):
            return f"{name}: the memory's model has {theirs.get(name)!r}, this one {ours.get(name)!r}"
    for name, what in (("weights", "base model"), ("memory_weights", "memory adapter")):
        mine, other = ours.get(name, {}), theirs.get(name, {})
        shared = sorted(mine.keys() & other.keys())
        if not shared and (mine or other):
            return f"{what}: the memory's and this one's weights have different names"
        a = torch.tensor([mine[key] for key in shared])
        b = torch.tensor([other[key] for key in shared])
        error = ((a - b).norm() / b.norm().clamp_min(1e-12)).item() if shared else 0.0
        if error > TOLERANCE:
            return f"{what}: the memory was made with another one (its sampled weights differ by {error:.0%})"
    return None
