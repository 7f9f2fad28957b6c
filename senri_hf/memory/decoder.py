"""Where a decoder-only model runs its layers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder layers and returns their last hidden state."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # In some models the projection to the vocabulary is called a decoder.
    if decoder is None or not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return model.base_model
    return decoder


def named_arguments(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward by name."""
    return dict(zip(parameter_names(type(decoder).forward), args, strict=False)) | kwargs if args else dict(kwargs)


@functools.lru_cache(maxsize=256)
def parameter_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters after `self`; looked up once, as every decoded token asks."""
    return tuple(inspect.signature(method).parameters)[1:]
