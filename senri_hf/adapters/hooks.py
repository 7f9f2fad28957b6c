"""How memory reaches a model's forward pass: hooks on the decoder and on its layers.

Hooks are functions of this module (closures would break deepcopy and pickle) and find what they need on the modules.
They run outside of gradient checkpointing, which recomputes `forward` only, so that nothing is written twice.
"""

import contextlib
import inspect
from typing import Any, cast

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ..memory.decoder import find_decoder, named_arguments
from ..memory.router_loss import take_router_loss, with_router_loss
from .context import ForwardContext
from .layer import MemoryAdapterLayer


def generate(model: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """A model's `generate()`, of which memory is told where the prompt ends."""
    context: ForwardContext | None = getattr(find_decoder(model), "memory_context", None)
    with contextlib.nullcontext() if context is None else context.prompt.fed(inputs, kwargs):
        return type(model).generate(model, inputs, *args, **kwargs)


def model_pre_hook(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Note for whose logits the model is asked, of which its decoder is not told, and what it knows nothing of."""
    context: ForwardContext = find_decoder(model).memory_context  # type: ignore[assignment]
    context.logits_to_keep, context.prompt_lengths = kwargs.get("logits_to_keep"), kwargs.get("prompt_lengths")
    if context.model_takes_prompt_lengths:
        return args, kwargs
    return args, {name: value for name, value in kwargs.items() if name != "prompt_lengths"}


def decoder_pre_hook(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Note this pass's memory cache and which tokens are real."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    given = named_arguments(decoder, args, kwargs)
    context.begin(given)
    if context.memory is not None and context.ids is None:
        check_embeddings(decoder)
    if not makes_cache(decoder, context, given):
        return None
    context.cache = DynamicCache(config=cast(PreTrainedModel, decoder).config)
    return (), given | {"past_key_values": context.cache}


def makes_cache(decoder: nn.Module, context: ForwardContext, given: dict[str, Any]) -> bool:
    """Whether a decoder would make a cache in this pass that a block keeps a part of the context in.

    Of one that is made within the decoder's forward its layers' hooks learn nothing.
    """
    if context.cache is not None or "past_key_values" not in inspect.signature(type(decoder).forward).parameters:
        return False
    adapters = (module for module in decoder.modules() if isinstance(module, MemoryAdapterLayer))
    if not any(block.keeps_context for adapter in adapters for block in adapter.blocks.values()):
        return False
    use_cache = given.get("use_cache")
    asked = cast(PreTrainedModel, decoder).config.use_cache if use_cache is None else use_cache
    checkpointed = decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))
    return bool(asked) and not checkpointed and context.tokens_and_documents[1] is None


def check_embeddings(decoder: nn.Module) -> None:
    """ValueError where a block in use takes token ids, for a pass that is given embeddings alone."""
    adapters = (module for module in decoder.modules() if isinstance(module, MemoryAdapterLayer))
    for reason in (block.takes_ids_for for adapter in adapters for block in adapter.blocks.values()):
        if reason is not None:
            raise ValueError(f"{reason} needs token ids, but inputs_embeds were given; pass input_ids")


def decoder_hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Do what waited for the last hidden states, and forget this pass."""
    context: ForwardContext = decoder.memory_context  # type: ignore[assignment]
    context.finish(output)


def model_hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add the losses of the blocks' routers to the loss that a model computes in training."""
    labels = named_arguments(model, args, kwargs).get("labels")
    if labels is None or not model.training:
        return output
    loss = output[0] if isinstance(output, tuple) else output.loss  # the first where there are labels
    loss = with_router_loss(loss, take_router_loss(model), labels, kwargs.get("num_items_in_batch"))
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def layer_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Add what the blocks of the active adapters read to a decoder layer's output; they write its input."""
    adapter = cast(MemoryAdapterLayer, layer.memory_adapter)
    context: ForwardContext = adapter.context
    blocks = adapter.blocks
    if not blocks:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    result = output[0] if isinstance(output, tuple) else output
    for name, block in blocks.items():
        context.adapter_name = name
        memory = None
        if context.memory is not None and block.has_memory:
            memory = context.memory.memory_layer(adapter.layer_idx, name)
            if memory is None:
                raise ValueError(
                    f"This memory has no layer {adapter.layer_idx} for the adapter {name!r}. Make one for the model as "
                    "it is now: MemoryCache.for_model(model)"
                )
            memory.check_rows(hidden.shape[0])
            memory.follow(hidden.device)
        elif block.keeps_context:
            memory = context.layer_in_any_cache(adapter.layer_idx, block.new_cache_layer)
        added = block.read_and_write(hidden, result, memory, context)
        if added is not None:
            result = result + added.to(result.dtype)
    return (result, *output[1:]) if isinstance(output, tuple) else result
