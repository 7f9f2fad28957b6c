"""Memory that lasts, for Hugging Face models.

Importing this package makes PEFT know the memory adapter, and transformers' Auto classes the models with memory built
in, without importing either.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import registry


__version__ = "0.1.0"

_MODULES = {
    "BankConfig": ".configuration",
    "MemoryTransformerConfig": ".configuration.memory_transformer",
    "MemoryTransformerForCausalLM": ".modeling",
    "MemoryTransformerForSequenceClassification": ".modeling",
    "MemoryTransformerModel": ".modeling",
    "CompressiveConfig": ".configuration",
    "EpisodicConfig": ".configuration",
    "SparseAutoencoder": ".interpretability",
    "SparseAutoencoderConfig": ".configuration.sparse_autoencoder",
    "SymbolicTransformerConfig": ".configuration.symbolic",
    "SymbolicTransformerForCausalLM": ".modeling",
    "SymbolicTransformerModel": ".modeling",
    "LinearMemoryAttention": ".modeling.tensor_memory",
    "MultiHeadMemory": ".memory",
    "TensorMemory": ".memory",
    "TensorMemoryConfig": ".configuration.tensor_memory",
    "TensorMemoryForCausalLM": ".modeling.tensor_memory",
    "TensorMemoryForSequenceClassification": ".modeling.tensor_memory",
    "TensorMemoryHeadConfig": ".configuration.tensor_memory",
    "TensorMemoryLayer": ".modeling.tensor_memory",
    "TensorMemoryModel": ".modeling.tensor_memory",
    "MemoryAdapterConfig": ".adapters",
    "MemoryCache": ".memory",
    "MemoryChat": ".chat",
    "LanguageModelTrainer": ".training",
    "MemoryTrainer": ".training",
    "RouterLossMixin": ".training",
    "MemoryTrainingArguments": ".training",
    "EpisodeCollator": ".training",
    "SenriConfig": ".configuration.senri",
    "SenriForCausalLM": ".modeling.senri",
    "SenriForSequenceClassification": ".modeling.senri",
    "SenriModel": ".modeling.senri",
    "pythia_layers": ".configuration.senri",
    "senri_layers": ".configuration.senri",
    "load_open_calm_tokenizer": ".tokenizers",
    "add_lora": ".adapters",
    "load_base": ".bases",
    "base_names": ".bases",
}

__all__ = [
    "BankConfig",
    "CompressiveConfig",
    "EpisodeCollator",
    "EpisodicConfig",
    "LanguageModelTrainer",
    "LinearMemoryAttention",
    "MemoryAdapterConfig",
    "MemoryCache",
    "MemoryChat",
    "MemoryTrainer",
    "MemoryTrainingArguments",
    "MemoryTransformerConfig",
    "MemoryTransformerForCausalLM",
    "MemoryTransformerForSequenceClassification",
    "MemoryTransformerModel",
    "MultiHeadMemory",
    "RouterLossMixin",
    "SenriConfig",
    "SenriForCausalLM",
    "SenriForSequenceClassification",
    "SenriModel",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SymbolicTransformerConfig",
    "SymbolicTransformerForCausalLM",
    "SymbolicTransformerModel",
    "TensorMemory",
    "TensorMemoryConfig",
    "TensorMemoryForCausalLM",
    "TensorMemoryForSequenceClassification",
    "TensorMemoryHeadConfig",
    "TensorMemoryLayer",
    "TensorMemoryModel",
    "__version__",
    "add_lora",
    "base_names",
    "load_base",
    "load_open_calm_tokenizer",
    "pythia_layers",
    "senri_layers",
]

if TYPE_CHECKING:
    from .adapters import MemoryAdapterConfig, add_lora
    from .bases import base_names, load_base
    from .chat import MemoryChat
    from .configuration import BankConfig, CompressiveConfig, EpisodicConfig
    from .configuration.memory_transformer import MemoryTransformerConfig
    from .configuration.senri import SenriConfig, pythia_layers, senri_layers
    from .configuration.sparse_autoencoder import SparseAutoencoderConfig
    from .configuration.symbolic import SymbolicTransformerConfig
    from .configuration.tensor_memory import TensorMemoryConfig, TensorMemoryHeadConfig
    from .interpretability import SparseAutoencoder
    from .memory import MemoryCache, MultiHeadMemory, TensorMemory
    from .modeling import (
        MemoryTransformerForCausalLM,
        MemoryTransformerForSequenceClassification,
        MemoryTransformerModel,
        SymbolicTransformerForCausalLM,
        SymbolicTransformerModel,
    )
    from .modeling.senri import SenriForCausalLM, SenriForSequenceClassification, SenriModel
    from .modeling.tensor_memory import (
        LinearMemoryAttention,
        TensorMemoryForCausalLM,
        TensorMemoryForSequenceClassification,
        TensorMemoryLayer,
        TensorMemoryModel,
    )
    from .tokenizers import load_open_calm_tokenizer
    from .training import (
        EpisodeCollator,
        LanguageModelTrainer,
        MemoryTrainer,
        MemoryTrainingArguments,
        RouterLossMixin,
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


registry.when_imported("peft", "senri_hf.adapters.registration", "register")
registry.when_imported("transformers.models.auto.configuration_auto", "senri_hf.families", "register_configs")
registry.when_imported("transformers.models.auto.modeling_auto", "senri_hf.families", "register_models")
