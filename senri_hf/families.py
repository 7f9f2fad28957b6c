"""The model families of this package, as transformers' Auto classes know them. A family is one line here.

They stand in transformers' own tables, which hold names and import a family's module when one of its classes is first
asked for. The Auto classes' `register` takes the classes themselves: all models would be imported with transformers,
and in the middle of its own imports (`transformers.modeling_layers` imports the Auto classes before it has defined what
models are made of).
"""

import importlib
import sys
from types import ModuleType
from typing import Any, NamedTuple


class Family(NamedTuple):
    """The prefix of a family's classes, the module of `configuration` and `package`, and the models that there are."""

    prefix: str
    module: str
    models: tuple[str, ...]
    package: str = "modeling"


FAMILIES = {
    "memory_transformer": Family(
        "MemoryTransformer", "memory_transformer", ("Model", "ForCausalLM", "ForSequenceClassification")
    ),
    "senri": Family("Senri", "senri", ("Model", "ForCausalLM", "ForSequenceClassification")),
    "sparse_autoencoder": Family("SparseAutoencoder", "sparse_autoencoder", ("",), "interpretability"),
    "symbolic_transformer": Family("SymbolicTransformer", "symbolic", ("Model", "ForCausalLM")),
    "tensor_memory": Family("TensorMemory", "tensor_memory", ("Model", "ForCausalLM", "ForSequenceClassification")),
}

TABLES = {
    "": "MODEL_MAPPING_NAMES",
    "Model": "MODEL_MAPPING_NAMES",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


class FamilyModule(ModuleType):
    """What transformers finds as `transformers.models.<model type>`: classes of ours, imported when asked for."""

    def __init__(self, model_type: str) -> None:
        super().__init__(f"transformers.models.{model_type}", f"The {model_type} models of senri_hf")
        self.family = FAMILIES[model_type]

    def __getattr__(self, name: str) -> Any:
        family = self.family
        if name == f"{family.prefix}Config":
            return getattr(importlib.import_module(f"senri_hf.configuration.{family.module}"), name)
        if name.removeprefix(family.prefix) in family.models:
            return getattr(importlib.import_module(f"senri_hf.{family.package}.{family.module}"), name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def register_configs() -> None:
    """Make `AutoConfig` know the families; calling it again changes nothing."""
    from transformers.models.auto import configuration_auto

    for model_type, family in FAMILIES.items():
        configuration_auto.CONFIG_MAPPING_NAMES[model_type] = f"{family.prefix}Config"
        sys.modules.setdefault(f"transformers.models.{model_type}", FamilyModule(model_type))


def register_models() -> None:
    """Make the Auto classes of models know the families; calling it again changes nothing."""
    from transformers.models.auto import modeling_auto

    register_configs()
    for model_type, family in FAMILIES.items():
        for kind in family.models:
            names: Any = getattr(modeling_auto, TABLES[kind])
            names[model_type] = f"{family.prefix}{kind}"
            # Where transformers was imported first, this was made without our configs.
            names._model_mapping._reverse_config_mapping[f"{family.prefix}Config"] = model_type
