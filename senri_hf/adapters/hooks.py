"""How memory reaches a model's forward pass: hooks on the decoder and on its layers.

Hooks are functions of this module (closures would break deepcopy and pickle) and find what they need on the modules.
They run outside of gradient checkpointing, which recomputes `forward` only, so that nothing is written twice.
"""

from typing import Any, cast

from torch import nn

from .context import ForwardContext, named_arguments
from .layer import MemoryAdapterLayer


def decoder_pre_hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note this pass's memory cache and which tokens are real."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    context.begin(named_arguments(decoder, args, kwargs))


def decoder_hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Do what waited for the last hidden states, and forget this pass."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    context.finish(output)


def layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add what the blocks of the active adapters read to a decoder layer's output; they write its input."""
    adapter = cast(MemoryAdapterLayer, layer.memory_adapter)
    context: ForwardContext = adapter.context
    if not adapter.blocks:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    result = output[0] if isinstance(output, tuple) else output
    for name, block in adapter.blocks.items():
        memory = None
        if context.memory is not None and block.has_memory:
            memory = context.memory.memory_layer(adapter.layer_idx, name)
            if memory is None:
                raise ValueError(
                    f"This memory has no layer {adapter.layer_idx} for the adapter {name!r}. Make one for the model as "
                    "it is now: MemoryCache.for_model(model)"
                )
            memory.check_rows(hidden.shape[0])
        added = block.read_and_write(hidden, result, memory, context)
        if added is not None:
            result = result + added.to(result.dtype)
    return (result, *output[1:]) if isinstance(output, tuple) else result
