"""The symbolic transformer: a small decoder whose every part can be looked into.

Each residual level, attention output and MLP output is the output of a named module, so that hooks, sparse autoencoders
and interventions reach it by name:

    model.embeddings                    the residual stream that enters the first layer
    model.layers.i.self_attn.o_proj     what attention adds in layer i
    model.layers.i.residual             the residual stream between attention and MLP
    model.layers.i.mlp                  what the MLP adds
    model.layers.i                      the residual stream after layer i
    model.norm                          what the output projection reads
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.symbolic import SymbolicTransformerConfig
from .card import About, ModelWithCard, auto_class
from .language_model import CausalLanguageModel


class SymbolicEmbeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: SymbolicTransformerConfig) -> None:
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        return self.dropout(inputs_embeds + self.embed_positions(position_ids))


class SymbolicAttention(nn.Module):
    """Causal multi-head attention; scores are scaled by 1/sqrt(head size)."""

    def __init__(self, config: SymbolicTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        queries = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        keys = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            queries,
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class SymbolicMLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: SymbolicTransformerConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SymbolicTransformerLayer(GradientCheckpointingLayer):
    """Attention, then an MLP where there is one, each added to the residual stream."""

    def __init__(self, config: SymbolicTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = layer_norm(config)
        self.self_attn = SymbolicAttention(config, layer_idx)
        self.residual = nn.Identity()
        self.post_attention_layernorm = layer_norm(config) if config.use_mlp else None
        self.mlp = SymbolicMLP(config) if config.use_mlp else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self.residual(hidden_states + self.dropout(attended))
        if self.mlp is not None:
            assert self.post_attention_layernorm is not None
            hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states


def layer_norm(config: SymbolicTransformerConfig) -> nn.Module:
    """A LayerNorm, or nothing where the config wants none."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.use_layer_norm else nn.Identity()


class SymbolicTransformerPreTrainedModel(ModelWithCard):
    """What `SymbolicTransformerModel` and `SymbolicTransformerForCausalLM` share."""

    config: SymbolicTransformerConfig
    config_class = SymbolicTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SymbolicTransformerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SymbolicTransformerLayer,
        "attentions": SymbolicAttention,
    }

    def about(self) -> About:
        config, loader = self.config, auto_class(self)
        return About(
            text="A small decoder over symbols, with learned positions. Every residual level, attention output and MLP "
            "output is the output of a named module, to be looked at and changed.",
            facts={
                "layers": f"{config.num_hidden_layers}"
                f"{'' if config.use_mlp else ', without MLP'}{'' if config.use_layer_norm else ', without LayerNorm'}",
                "hidden size": config.hidden_size,
                "heads": config.num_attention_heads,
                "symbols": config.vocab_size,
                "positions": config.max_position_embeddings,
            },
            usage=f"""from senri_hf.interpretability import module_activations
from transformers import {loader}

model = {loader}.from_pretrained("this folder or repository")
(activations,) = module_activations(model, "model.layers.0", [{{"input_ids": input_ids}}])""",
        )


class SymbolicTransformerModel(SymbolicTransformerPreTrainedModel):
    """A decoder over symbols with learned positions: symbols in, hidden states out."""

    def __init__(self, config: SymbolicTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embeddings = SymbolicEmbeddings(config)
        self.layers = nn.ModuleList(
            [SymbolicTransformerLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = layer_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of symbols.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: [B, cached + T], 0 where there is padding; left and right padding change nothing.
            position_ids: [B, T] or [1, T]; counted from the attention mask when None.
            past_key_values: Context so far; a new one is made with `use_cache=True`.

        Raises:
            ValueError: when there are more symbols than positions, or not one of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give one of input_ids and inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past)
        self._check_positions(position_ids, past, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.embeddings(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_positions(self, position_ids: Tensor, past: int | Tensor, cache: Cache | None) -> None:
        """ValueError when a row has more symbols than there are positions; padding takes none.

        Positions are looked at, for which a device has to wait, only where the columns are more than these.
        """
        most = self.config.max_position_embeddings
        if cache is None or isinstance(past, int):
            columns = past + position_ids.shape[-1]
        elif torch.compiler.is_compiling():
            return
        else:  # a static cache keeps its length on the device, but says how much it can hold at most
            columns = cache.get_max_length()
        last = int(position_ids.max()) if columns > most else 0
        if last >= most:
            raise ValueError(
                f"{last + 1} symbols were given, but max_position_embeddings={most}. Give at most {most}, or let "
                "rollout() see the last ones only"
            )

    @staticmethod
    def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, past: int | Tensor) -> Tensor:
        """Positions [B or 1, T]: the count of real symbols before, with padding at 0."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        return (torch.arange(length, device=inputs_embeds.device) + past)[None]


class SymbolicTransformerForCausalLM(CausalLanguageModel, SymbolicTransformerPreTrainedModel, GenerationMixin):
    """The symbolic transformer with a projection to the next symbol."""

    decoder_class = SymbolicTransformerModel

    @torch.no_grad()
    def rollout(self, input_ids: Tensor, new_symbols: int, do_sample: bool = False) -> Tensor:
        """A continuation of any length: each symbol is chosen by the last `max_position_embeddings` ones.

        `generate()` ends where positions do. Here the window slides, so nothing can be cached.

        Args:
            input_ids: Contexts [B, T] without padding, T at least 1.
            new_symbols: How many to append.
            do_sample: Draw from the distribution instead of taking the most likely symbol.

        Returns:
            [B, T + new_symbols]
        """
        window = self.config.max_position_embeddings
        sequence = torch.cat([input_ids, input_ids.new_empty(input_ids.shape[0], new_symbols)], dim=1)
        for end in range(input_ids.shape[1], sequence.shape[1]):
            logits = self(sequence[:, max(0, end - window) : end], use_cache=False, logits_to_keep=1).logits[:, -1]
            chosen = torch.multinomial(logits.softmax(-1), 1)[:, 0] if do_sample else logits.argmax(-1)
            sequence[:, end] = chosen
        return sequence
