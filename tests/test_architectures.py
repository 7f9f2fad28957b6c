"""The decoder layers of very different models are found without being named."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from senri_hf import EpisodicConfig
from senri_hf.adapters.decoder import attention_weights, find_decoder_layers, input_norm, output_scale
from senri_hf.memory import EpisodicReader
from senri_hf.memory.decoder import find_decoder
from senri_hf.memory.episodic import EpisodicState


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Where each kind of model has its layers.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", {}),
    "gemma2": ("model.layers", {}),
    "gemma3_text": ("model.layers", {}),
    "qwen2_moe": ("model.layers", {}),
    "mixtral": ("model.layers", {}),
    "olmo2": ("model.layers", {}),
    "phi3": ("model.layers", {}),
    "gpt_neox": ("gpt_neox.layers", {}),
    "gpt2": ("transformer.h", {}),
    "gptj": ("transformer.h", {"rotary_dim": 4}),
    "bloom": ("transformer.h", {}),
    "opt": ("model.decoder.layers", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": ("transformer.blocks", {"d_model": 32, "n_heads": 4, "n_layers": 4}),
    "openai-gpt": ("transformer.h", {}),
    "modernbert-decoder": ("model.layers", {}),
}
# Those whose attention a memory can start from.
KNOWN = ("llama", "gemma2", "gemma3_text", "qwen2_moe", "mixtral", "phi3", "gpt_neox")


def model_on_meta(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[model_type](**{**SMALL, **settings})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", LAYERS)
def test_decoder_layers_are_found(model_type: str) -> None:
    name, settings = LAYERS[model_type]
    model = model_on_meta(model_type, settings)
    layers = find_decoder_layers(model)
    assert layers is model.get_submodule(name)
    assert len(layers) == model.config.get_text_config(decoder=True).num_hidden_layers
    assert any(layers is module for module in find_decoder(model).modules())


def test_layers_that_cannot_be_told_apart_are_to_be_named() -> None:
    model = model_on_meta("xlm", {"emb_dim": 32, "n_layers": 4, "n_heads": 4})
    with pytest.raises(ValueError, match=r"No list of 4 decoder layers .*layers_pattern.*transformer\.attentions"):
        find_decoder_layers(model)
    assert isinstance(find_decoder_layers(model, "transformer.ffns"), nn.ModuleList)


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_memory_that_starts_from_known_attention_can_be_read(model_type: str) -> None:
    layer = find_decoder_layers(model_on_meta(model_type, LAYERS[model_type][1]))[0]
    config, hidden = EpisodicConfig(), torch.zeros(2, 3, SMALL["hidden_size"], device="meta")
    with torch.device("meta"):
        reader = EpisodicReader(config, input_norm(layer, hidden.shape[-1]), attention_weights(layer))
        memory = EpisodicState.empty(2, hidden.shape[-1], config, hidden.device)
        encoded = reader.encode(hidden)
        asked = reader.asked_parts(encoded, torch.ones(2, 3, device="meta"))
        read = reader(encoded, reader.project(memory), asked).added
    assert read.shape == hidden.shape
    scale = output_scale(layer)
    assert (scale is not None) == model_type.startswith("gemma")
    assert scale is None or scale.shape == hidden.shape[-1:]


@pytest.mark.parametrize("model_type", sorted(LAYERS.keys() - KNOWN))
def test_attention_of_another_layout_is_refused(model_type: str) -> None:
    layer = find_decoder_layers(model_on_meta(model_type, LAYERS[model_type][1]))[0]
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} is laid out .* init='zero'"):
        attention_weights(layer)
