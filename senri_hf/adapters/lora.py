"""LoRA beside memory: two PEFT methods in one model."""

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

from .config import MemoryAdapterConfig


def add_lora(peft_model: PeftModel, lora_config: LoraConfig, adapter_name: str = "lora") -> PeftModel:
    """Add a LoRA to a model that has a memory adapter, in place; both are trained and both are active.

    `set_adapter` chooses among memory adapters and leaves the LoRA as it is; `disable_adapter` turns both off, and
    `delete_adapter(adapter_name)` takes the LoRA away.

    Args:
        peft_model: What `get_peft_model(model, MemoryAdapterConfig(...))` gave.
        lora_config: A LoRA of linear layers, without `modules_to_save`.
        adapter_name: The LoRA's own name, which no memory adapter may have.

    Returns:
        The same model.

    Raises:
        TypeError: when `lora_config` is no LoraConfig.
        ValueError: when the model has no memory adapter, or the name is taken.
    """
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config must be a LoraConfig, but a {type(lora_config).__name__} was given")
    if not any(isinstance(config, MemoryAdapterConfig) for config in peft_model.peft_config.values()):
        raise ValueError(
            f"This model's adapters, {sorted(peft_model.peft_config)}, are no memory adapters. Add the memory first: "
            "get_peft_model(model, MemoryAdapterConfig(...)), then add_lora"
        )
    if adapter_name in peft_model.peft_config:
        raise ValueError(
            f"adapter_name={adapter_name!r} was given, but the model has an adapter of that name; its adapters are "
            f"{sorted(peft_model.peft_config)}"
        )
    base: Any = peft_model.base_model.model
    with warnings.catch_warnings():
        # Several adapters are what is asked for here.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(lora_config, base, adapter_name)
    if lora_config.base_model_name_or_path is None:
        lora_config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    # PEFT reads it where it saves; as a part of get_peft_model it would have been set there.
    lora_config.task_type = lora_config.task_type or "CAUSAL_LM"
    return peft_model


def save_lora(peft_model: PeftModel, folder: str | Path, **kwargs: Any) -> None:
    """Save the LoRA adapters of a model, each into a folder of its name inside `folder`, for PEFT to load alone.

    `peft_model.save_pretrained(folder)` saves the memory adapter and these together.

    Raises:
        ValueError: when the model has no LoRA.
    """
    names = [name for name, config in peft_model.peft_config.items() if isinstance(config, LoraConfig)]
    if not names:
        raise ValueError(f"This model has no LoRA to save; its adapters are {sorted(peft_model.peft_config)}")
    peft_model.save_pretrained(str(folder), selected_adapters=names, **kwargs)


def load_lora(
    peft_model: PeftModel,
    folder: str | Path,
    adapter_name: str = "lora",
    is_trainable: bool = False,
    **hub_kwargs: Any,
) -> PeftModel:
    """Load a LoRA into a model that has a memory adapter, in place.

    Args:
        folder: The LoRA's own folder, as in `save_lora(model, out)` and `load_lora(model, out / "lora")`, or a
            repository on the Hub.
        is_trainable: Whether training goes on; otherwise the LoRA is frozen.

    Returns:
        The same model.

    Raises:
        ValueError: when what is loaded is no LoRA, does not fit the model, or as in `add_lora`.
    """
    config = LoraConfig.from_pretrained(str(folder), **hub_kwargs)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} holds a {type(config).__name__}, but a LoRA is expected")
    config.inference_mode = not is_trainable
    weights = load_peft_weights(str(folder), device="cpu", **hub_kwargs)
    add_lora(peft_model, config, adapter_name)
    loaded: Any = set_peft_model_state_dict(peft_model, weights, adapter_name=adapter_name)
    missing = [key for key in loaded.missing_keys if f".{adapter_name}." in key and ".lora_" in key]
    if loaded.unexpected_keys or missing:
        peft_model.delete_adapter(adapter_name)
        raise ValueError(
            f"The LoRA in {folder} does not fit this model: unknown weights {sorted(loaded.unexpected_keys)[:3]}, "
            f"missing weights {sorted(missing)[:3]}"
        )
    return peft_model
