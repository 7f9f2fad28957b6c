"""The model families of this package, as transformers' Auto classes know them.

A family is one line here. Nothing of it is imported before transformers' own Auto classes are.
"""

import importlib
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Where a family's classes are, and which Auto class makes which of them."""

    config: str
    models: dict[str, str]


FAMILIES = (
    Family(
        "senri_hf.configuration.memory_transformer:MemoryTransformerConfig",
        {
            "AutoModel": "senri_hf.modeling.memory_transformer:MemoryTransformerModel",
            "AutoModelForCausalLM": "senri_hf.modeling.memory_transformer:MemoryTransformerForCausalLM",
            "AutoModelForSequenceClassification": (
                "senri_hf.modeling.memory_transformer:MemoryTransformerForSequenceClassification"
            ),
        },
    ),
    Family(
        "senri_hf.configuration.symbolic:SymbolicTransformerConfig",
        {
            "AutoModel": "senri_hf.modeling.symbolic:SymbolicTransformerModel",
            "AutoModelForCausalLM": "senri_hf.modeling.symbolic:SymbolicTransformerForCausalLM",
        },
    ),
)


def found(place: str) -> Any:
    """The class at `module:name`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def register_configs() -> None:
    """Make `AutoConfig` know the families."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for family in FAMILIES:
        config = found(family.config)
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_models() -> None:
    """Make the other Auto classes know the families."""
    from transformers.models.auto import modeling_auto

    for family in FAMILIES:
        for auto, model in family.models.items():
            getattr(modeling_auto, auto).register(found(family.config), found(model), exist_ok=True)
