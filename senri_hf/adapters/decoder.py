"""Where things are in a decoder-only model: its layers, their norms and their attention projections."""

import copy
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..memory import AttentionWeights
from ..memory.decoder import find_decoder


def find_decoder_layers(model: PreTrainedModel, pattern: str | None = None) -> nn.ModuleList:
    """The list of a model's decoder layers.

    Args:
        pattern: Its dotted name, where it is not found by itself.

    Raises:
        ValueError: when there is none, naming the lists that the model has.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if pattern is not None:
        if pattern not in lists:
            raise ValueError(
                f"layers_pattern={pattern!r} was given, but {type(model).__name__} has these lists: {sorted(lists)}"
            )
        return lists[pattern]
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    whole = set(getattr(model, "_no_split_modules", None) or [])
    decoder = find_decoder(model)
    counted = [
        module
        for _, module in sorted(decoder.named_modules(), key=lambda item: item[0].count("."))
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    candidates = [
        module
        for module in counted
        if all(isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in whole for layer in module)
    ]
    if not candidates and len(counted) == 1:
        # Older models mark their layers in no way, but there is one such list only.
        candidates = counted
    if not candidates:
        raise ValueError(
            f"No list of {count} decoder layers was found in {type(model).__name__}. Name it with layers_pattern, one "
            f"of {sorted(lists)}"
        )
    return candidates[0]


def input_norm(layer: nn.Module, hidden_size: int) -> nn.Module:
    """A copy, in float32, of the norm before a layer's attention; an RMS norm of its own where it has none."""
    for name in ("input_layernorm", "attention_layernorm", "ln_1", "attention_norm", "norm1"):
        norm = getattr(layer, name, None)
        if isinstance(norm, nn.Module):
            return copy.deepcopy(norm).float()
    return nn.RMSNorm(hidden_size)


def output_scale(layer: nn.Module) -> Tensor | None:
    """Per-channel scale [D] that a layer puts on its attention's output before adding it, None where it has none.

    Gemma 3 normalises that output; there `post_attention_layernorm` comes before the residual sum, as the presence of
    `pre_feedforward_layernorm` tells.
    """
    if not hasattr(layer, "pre_feedforward_layernorm") or not hasattr(layer, "post_attention_layernorm"):
        return None
    norm: Any = layer.post_attention_layernorm
    ones = torch.ones_like(norm.weight, dtype=torch.float32)
    with torch.no_grad():
        return (norm.float() if norm.weight.dtype == torch.float32 else copy.deepcopy(norm).float())(ones)


def attention_weights(layer: nn.Module) -> AttentionWeights:
    """Copies of the projections of a layer's own attention.

    Raises:
        ValueError: when the attention is laid out in a way that is not known, with what to do instead.
    """
    try:
        return known_attention(layer)
    except AttributeError as error:
        raise unknown_attention(layer) from error


def known_attention(layer: nn.Module) -> AttentionWeights:
    """`attention_weights`, where an attribute that is looked for may be missing."""
    attention: Any = next((getattr(layer, n) for n in ("self_attn", "attention", "attn") if hasattr(layer, n)), None)
    config = getattr(attention, "config", None)
    if attention is None or config is None:
        raise unknown_attention(layer)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
        modules = {name: base_module(getattr(attention, f"{name}_proj")) for name in "qkvo"}
        weights = {name: weight_of(module) for name, module in modules.items()}
        biases = {name: modules[name].bias.detach() for name in "qkv" if modules[name].bias is not None}
    elif hasattr(attention, "query_key_value") and hasattr(attention, "dense"):
        # GPT-NeoX: for every head its query, key and value rows follow one another.
        fused = base_module(attention.query_key_value)
        q, k, v = weight_of(fused).unflatten(0, (heads, 3, -1)).unbind(1)
        weights = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
        weights["o"] = weight_of(base_module(attention.dense))
        parts = fused.bias.detach().unflatten(0, (heads, 3, -1)).unbind(1) if fused.bias is not None else ()
        biases = {name: part.flatten() for name, part in zip("qkv", parts, strict=False)}
        groups = heads
    elif hasattr(attention, "qkv_proj") and hasattr(attention, "o_proj"):
        fused = base_module(attention.qkv_proj)
        size = fused.out_features // (heads + 2 * groups)
        sizes = [heads * size, groups * size, groups * size]
        weights = dict(zip("qkv", weight_of(fused).split(sizes), strict=True))
        weights["o"] = weight_of(base_module(attention.o_proj))
        parts = fused.bias.detach().split(sizes) if fused.bias is not None else ()
        biases = dict(zip("qkv", parts, strict=False))
    else:
        raise unknown_attention(layer)
    head_size = weights["q"].shape[0] // heads
    read_size = heads * (weights["v"].shape[0] // groups)
    if weights["k"].shape[0] != groups * head_size or weights["o"].shape[1] != read_size:
        raise unknown_attention(layer)  # a gate beside the queries, or shared keys and values
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if any(p.shape[-1] not in (1, head_size) for norm in norms if norm is not None for p in norm.parameters()):
        raise unknown_attention(layer)  # normalised over all heads at once
    scale = getattr(attention, "scaling", None) or head_size**-0.5
    return AttentionWeights(
        **weights,
        num_heads=heads,
        num_key_value_heads=groups,
        scale=float(scale),
        biases=biases,
        q_norm=norms[0],
        k_norm=norms[1],
    )


def unknown_attention(layer: nn.Module) -> ValueError:
    return ValueError(
        f"The attention of {type(layer).__name__} is laid out in a way that is not known, so memory cannot start from "
        "it. Use init='zero'"
    )


def base_module(module: nn.Module) -> Any:
    """A linear layer without the adapters that may be around it."""
    return getattr(module, "base_layer", module)


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight [out, in] in floating point, also of a quantized layer."""
    return dequantize_module_weight(module).detach()
