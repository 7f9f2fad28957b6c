"""What tells one model and its memory adapters from another: settings and a sample of the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .owner import owners


SAMPLED_TENSORS = 24
SAMPLED_VALUES = 8
# Two copies of the same tensor in different dtypes differ by less (bfloat16 rounds a value by up to 0.4%).
TOLERANCE = 0.02
DECIMALS = 6
# A sample of a smaller norm is compared as if it had this one: less than that is rounding.
SMALLEST_NORM = 2e-4


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Architecture, sizes and sampled weights of a model, and those of the memory it holds.

    Samples are compared tensor by tensor with a tolerance (`difference`), so that a model in another dtype, on another
    device, or with quantized layers, which are left out, is still the same model.

    Those of memory (`memory_weights`) stand under the name of their adapter, as one can be there without another.
    """
    config: Any = model.config.get_text_config(decoder=True)
    modules = [item for owner in owners(model) for item in owner.memory_modules().items()]
    adapter_of = {id(p): adapter for adapter, module in modules for p in module.parameters()}
    adapters = {name for name in getattr(model, "peft_config", {})}
    base: dict[str, nn.Parameter] = {}
    memory: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        if not parameter.is_floating_point() or parameter.element_size() == 1:  # quantized: the scale is elsewhere
            continue
        # Names without the wrappers that PEFT puts around a model, and without the adapters' names.
        short = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        parts = [part for part in short.split(".") if part not in adapters]
        if id(parameter) in adapter_of:
            memory.setdefault(adapter_of[id(parameter)], {})[".".join(parts)] = parameter
        elif not any(part in adapters for part in short.split(".")):
            base[".".join(parts)] = parameter
    return {
        "architecture": getattr(config, "model_type", type(model).__name__),
        "name_or_path": public_name(str(getattr(config, "_name_or_path", "") or "")),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "weights": sample(base),
        "memory_weights": {adapter: sample(parameters) for adapter, parameters in memory.items()},
    }


def public_name(name_or_path: str) -> str:
    """A model's name; of a folder only its last part, as paths are nobody else's."""
    path = Path(name_or_path)
    return path.name if path.is_absolute() or path.exists() else name_or_path


def sample(parameters: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """A few values of a few parameters: some evenly spread over the names, and the first and last of every kind.

    Those of a kind differ in the numbers in their names alone, as the query projections of all layers do.
    """
    names = sorted(parameters)
    large = [name for name in names if parameters[name].numel() >= SAMPLED_VALUES]
    spread = large[:: max(1, len(large) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    last = {kind(name): name for name in names}
    first = {kind(name): name for name in reversed(names)}
    chosen = {}
    for name in sorted({*spread, *first.values(), *last.values()}):
        flat = parameters[name].detach().reshape(-1)
        count = min(SAMPLED_VALUES, flat.numel())
        index = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        chosen[name] = [round(value, DECIMALS) for value in flat[index].float().tolist()]
    return chosen


def kind(name: str) -> str:
    """A parameter's name without the numbers of layers and experts in it."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What differs between two fingerprints, in words; None when they are of the same model and memory.

    Adapters of ours that theirs does not name are passed by.
    """
    for name in ("architecture", "hidden_size", "num_hidden_layers", "vocab_size"):
        if theirs.get(name) != ours.get(name):
            return f"{name}: the memory's model has {theirs.get(name)!r}, this one {ours.get(name)!r}"
    samples = [("base model", theirs.get("weights", {}), ours.get("weights", {}))]
    for adapter, other in theirs.get("memory_weights", {}).items():
        samples.append(("memory adapter", other, ours.get("memory_weights", {}).get(adapter, {})))
    for what, other, mine in samples:
        shared = sorted(mine.keys() & other.keys())
        if not shared and (mine or other):
            return f"{what}: the memory's and this one's weights have different names"
        for key in shared:
            error = relative_error(mine[key], other[key])
            if not error <= TOLERANCE:  # nor is what is not a number the same
                return f"{what}: the memory was made with another one (sampled values of {key} differ by {error:.0%})"
    return None


def relative_error(a: list[float], b: list[float]) -> float:
    """By how much two samples of a tensor differ, as a part of the larger one; 1 where the tensor has other sizes."""
    if len(a) != len(b):
        return 1.0
    ours, theirs = torch.tensor(a), torch.tensor(b)
    return ((ours - theirs).norm() / torch.maximum(ours.norm(), theirs.norm()).clamp_min(SMALLEST_NORM)).item()
