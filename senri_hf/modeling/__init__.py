"""Models with memory built in, and small models to study: one file per family."""

from .memory_transformer import (
    MemoryTransformerForCausalLM,
    MemoryTransformerForSequenceClassification,
    MemoryTransformerModel,
)
from .symbolic import SymbolicTransformerForCausalLM, SymbolicTransformerModel


__all__ = [
    "MemoryTransformerForCausalLM",
    "MemoryTransformerForSequenceClassification",
    "MemoryTransformerModel",
    "SymbolicTransformerForCausalLM",
    "SymbolicTransformerModel",
]
