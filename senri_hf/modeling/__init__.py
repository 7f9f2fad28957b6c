"""Models with memory built in, and small models to study: one file per family."""

# First of all: its import registers the families, for which the modules below must not be half imported.
import transformers.models.auto.modeling_auto  # noqa: F401

from .memory_transformer import (
    MemoryTransformerForCausalLM,
    MemoryTransformerForSequenceClassification,
    MemoryTransformerModel,
)
from .senri import SenriForCausalLM, SenriForSequenceClassification, SenriModel
from .symbolic import SymbolicTransformerForCausalLM, SymbolicTransformerModel
from .tensor_memory import (
    LinearMemoryAttention,
    TensorMemoryForCausalLM,
    TensorMemoryForSequenceClassification,
    TensorMemoryLayer,
    TensorMemoryModel,
)


__all__ = [
    "LinearMemoryAttention",
    "MemoryTransformerForCausalLM",
    "MemoryTransformerForSequenceClassification",
    "MemoryTransformerModel",
    "SenriForCausalLM",
    "SenriForSequenceClassification",
    "SenriModel",
    "SymbolicTransformerForCausalLM",
    "SymbolicTransformerModel",
    "TensorMemoryForCausalLM",
    "TensorMemoryForSequenceClassification",
    "TensorMemoryLayer",
    "TensorMemoryModel",
]
