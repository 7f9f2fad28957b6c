"""What a module that holds memory tells the cache."""

from torch import nn

from .layer import MemoryLayer


class MemoryOwner:
    """Mixin of modules that read and write memory: the cache asks them for their layers."""

    def memory_layers(self) -> list[MemoryLayer]:
        """New, blank cache layers, one for each memory that this module holds."""
        raise TypeError(f"{type(self).__name__} must say which memory layers it has")

    def memory_modules(self) -> dict[str, nn.Module]:
        """What decides by its weights what they hold, by their adapter's name."""
        assert isinstance(self, nn.Module)
        return {layer.adapter_name: self for layer in self.memory_layers()}


def owners(model: nn.Module) -> list[MemoryOwner]:
    """The modules of a model that hold memory, in order."""
    return [module for module in model.modules() if isinstance(module, MemoryOwner)]
