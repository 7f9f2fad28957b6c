"""Senri: a language model with compressive memory."""

import copy
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXLayer,
    GPTNeoXMLP,
    GPTNeoXRotaryEmbedding,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.senri import ATTENTION, COUNTING_MEMORY, SenriConfig, pythia_layers, senri_layers
from ..memory import (
    CompressiveLayer,
    CompressiveMemory,
    CountingCompressiveLayer,
    MemoryCache,
    MemoryLayer,
    MemoryOwner,
)
from ..memory.cache import BUILT_IN
from ..memory.compressive_layer import Progress, Step
from ..memory.layout import Layout
from .card import ModelWithMemory
from .language_model import RememberingLanguageModel
from .streams import find_layout, memory_of


class PythiaLayer(GPTNeoXLayer):
    """GPT-NeoX's own layer: attention with rotary positions, beside or before a feed-forward network."""


class SenriLayer(GradientCheckpointingLayer, MemoryOwner):
    """A layer that mixes tokens by a compressive memory, in the place of GPT-NeoX's attention."""

    def __init__(self, config: SenriConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.counts = (config.layer_types or [])[layer_idx] == COUNTING_MEMORY
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_memory_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.memory = CompressiveMemory(config.hidden_size, config.memory_settings(layer_idx))
        self.mlp = GPTNeoXMLP(config)

    def memory_layers(self) -> list[MemoryLayer]:
        kind = CountingCompressiveLayer if self.counts else CompressiveLayer
        return [kind(self.memory.shape, self.layer_idx, BUILT_IN)]

    def forward(
        self, hidden_states: Tensor, point: Progress | None, layout: Layout, writes: bool
    ) -> tuple[Tensor, Step]:
        """The layer's output [B, T, D], and what is to be committed to the cache.

        Args:
            hidden_states: [B, T, D].
            point: Where the conversation stands, None without a cache.
            layout: Which columns are real.
            writes: Whether the tokens are written.
        """
        read, step = self.memory(self.input_layernorm(hidden_states), point, layout, writes=writes)
        read = self.post_memory_dropout(read)
        if self.use_parallel_residual:
            mixed = self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states + read + self.post_mlp_dropout(mixed), step
        hidden_states = hidden_states + read
        return hidden_states + self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states))), step


class SenriPreTrainedModel(ModelWithMemory):
    """Weights, downloading and loading of Senri models."""

    config_class = SenriConfig
    config: SenriConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PythiaLayer", "SenriLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # a cache layer asks the device how far its rows are
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": [PythiaLayer, SenriLayer],
        "attentions": GPTNeoXAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CompressiveMemory):
            module.reset_parameters(init.copy_)


class SenriModel(SenriPreTrainedModel):
    """The decoder: token embeddings, layers, a final norm."""

    def __init__(self, config: SenriConfig) -> None:
        super().__init__(config)
        assert config.layer_types is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            [
                (PythiaLayer if kind == ATTENTION else SenriLayer)(config, index)
                for index, kind in enumerate(config.layer_types)
            ]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        update_memory: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, D].
            attention_mask: [B, context + T], 0 for padding, which is never written; or [B, 1, T, context + T].
            position_ids: [B, T] of the attention layers. Where they begin again without a mask, and no cache is given,
                another document begins, with an empty memory.
            past_key_values: Where context and memory come from: a `MemoryCache`, or a cache made from the config.
            update_memory: Whether the tokens are written into memory.

        Raises:
            ValueError: for a cache of another number of rows or without memory layers, or documents packed into a row
                that has one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        layout = find_layout(tokens, attention_mask, position_ids, past_key_values, self.config, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None and layout.valid.shape[0] == inputs_embeds.shape[0]:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]  # type: ignore[assignment]
        causal_mask = None
        if ATTENTION in (self.config.layer_types or []):
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        hidden_states = self.emb_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SenriLayer):
                memory = memory_of(past_key_values, index, CompressiveLayer)
                batch = layout.valid.shape[0]
                point = None if memory is None else memory.point(layer.memory.shape, batch, hidden_states.device)
                writes = update_memory and not (memory is not None and memory.is_read_only)
                hidden_states, step = layer(hidden_states, point=point, layout=layout, writes=writes)
                if memory is not None:
                    memory.commit(step, hidden_states.shape[1])
            else:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    layer_past=past_key_values,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    **kwargs,
                )
        if isinstance(past_key_values, MemoryCache):
            past_key_values.note_tokens(input_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class SenriForCausalLM(RememberingLanguageModel, SenriPreTrainedModel, GenerationMixin):
    """A Senri model with a language model's head."""

    decoder_class = SenriModel

    @classmethod
    def from_gpt_neox(cls, model: GPTNeoXForCausalLM | str | Path, memory_layers: list[int], **settings: Any) -> Self:
        """A GPT-NeoX model (Pythia, OpenCALM) with memory layers between its own, which change nothing at first.

        Every layer of the model stays: replacing one destroys what was pretrained.

        Args:
            model: The model, or the name or folder of one.
            memory_layers: Before which of its layers, from 0, a memory layer is put; the number of its layers puts one
                after the last.
            settings: Of the memory layers, as for `senri_layers`.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        base = model if isinstance(model, PreTrainedModel) else GPTNeoXForCausalLM.from_pretrained(model)
        count = base.config.num_hidden_layers
        if sorted(set(memory_layers)) != sorted(memory_layers) or not all(0 <= i <= count for i in memory_layers):
            raise ValueError(
                f"memory_layers={memory_layers} was given, but it must name places from 0 to {count}, once"
            )
        layers, place = [], {}
        for index in range(count + 1):
            if index in memory_layers:
                layers += senri_layers(1, **settings)
            if index < count:
                place[index] = len(layers)
                layers += pythia_layers(1)
        shared = base.config.to_dict()
        for name in ("model_type", "architectures", "num_hidden_layers", "transformers_version", "layer_types"):
            shared.pop(name, None)
        ours: Any = cls(SenriConfig(**shared, layers=layers))
        new = ours.state_dict()
        for key, tensor in base.state_dict().items():
            parts = key.replace("gpt_neox.", "model.").replace("embed_in.", "embed_tokens.").split(".")
            name = ".".join(parts).replace("final_layer_norm.", "norm.")
            if parts[:2] == ["model", "layers"]:
                name = ".".join(["model", "layers", str(place[int(parts[2])]), *parts[3:]])
            new[name] = tensor
        ours.load_state_dict(new)
        for layer in ours.model.layers:
            if isinstance(layer, SenriLayer):
                for last in (layer.memory.o_proj, layer.mlp.dense_4h_to_h):
                    nn.init.zeros_(last.weight)
                    if last.bias is not None:
                        nn.init.zeros_(last.bias)
        ours.generation_config = copy.deepcopy(base.generation_config)
        return ours.to(base.device, base.dtype).train(base.training)


class SenriForSequenceClassification(GenericForSequenceClassification, SenriPreTrainedModel):
    """A Senri model with a linear classifier on each row's last real token."""


__all__ = [
    "SenriForCausalLM",
    "SenriForSequenceClassification",
    "SenriModel",
    "SenriPreTrainedModel",
]
