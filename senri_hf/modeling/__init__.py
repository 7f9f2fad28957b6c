"""Models with memory built in, and small models to study: one file per family."""

from .symbolic import SymbolicTransformerForCausalLM, SymbolicTransformerModel


__all__ = ["SymbolicTransformerForCausalLM", "SymbolicTransformerModel"]
