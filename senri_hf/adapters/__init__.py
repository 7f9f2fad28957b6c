"""Memory in a model that exists: a PEFT method, injected by hooks."""

# First of all: PEFT's import registers the method, for which the modules below must not be half imported.
import peft  # noqa: F401

from .bank import quantize_bank
from .config import MemoryAdapterConfig
from .hub import adapter_card, push_to_hub, save_adapter
from .lora import add_lora, load_lora, save_lora
from .tuner import MemoryTuner


__all__ = [
    "MemoryAdapterConfig",
    "MemoryTuner",
    "adapter_card",
    "add_lora",
    "load_lora",
    "push_to_hub",
    "quantize_bank",
    "save_adapter",
    "save_lora",
]
