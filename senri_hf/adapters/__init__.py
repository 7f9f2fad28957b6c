"""Memory in a model that exists: a PEFT method, injected by hooks."""

from .config import MemoryAdapterConfig
from .tuner import MemoryTuner


__all__ = ["MemoryAdapterConfig", "MemoryTuner"]
