"""Where a decoder-only model runs its layers."""

import inspect
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
    if not args:  # as in generate(): nothing to look up at every token
        return dict(kwargs)
    names = list(inspect.signature(type(decoder).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
