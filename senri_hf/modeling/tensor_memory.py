"""Tensor memory models: a token reads what memory holds, is written into it, and nothing else mixes tokens.

Linear attention (Katharopoulos et al. 2020, eq. 10-12) with the writes of Infini-attention (Munkhdalai et al. 2024,
eq. 4-5), read before they are written: no local attention, no gate, no softmax, no positions.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.tensor_memory import OF_LAYERS, TensorMemoryConfig
from ..memory import (
    CountingHeadGroupsLayer,
    HeadGroupsLayer,
    MemoryCache,
    MemoryLayer,
    MemoryOwner,
    MultiHeadMemory,
    TensorMemory,
)
from ..memory.compressive_layer import Progress, Step
from ..memory.compressive_state import MemoryShape
from ..memory.layout import Layout
from .card import ModelWithMemory
from .language_model import RememberingLanguageModel
from .streams import find_layout, memory_of


class LinearMemoryAttention(nn.Module):
    """Project, read from memory, write to it, project what was read.

    Args:
        memory: The heads; a projection is as wide as all of them together.
        hidden_size: Of the model.
        bias: Whether the four projections have one.
        normalize_qkv: Whether each projection of a token, all heads together, is scaled to L2 norm 1.
    """

    def __init__(self, memory: MultiHeadMemory, hidden_size: int, bias: bool, normalize_qkv: bool) -> None:
        super().__init__()
        self.memory = memory
        self.normalize_qkv = normalize_qkv
        self.q_proj = nn.Linear(hidden_size, memory.width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, memory.width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, memory.width, bias=bias)
        self.o_proj = nn.Linear(memory.width, hidden_size, bias=bias)
        # What was read, for those who look at it.
        self.memory_read = nn.Identity()

    def forward(
        self, hidden: Tensor, points: tuple[Progress, ...] | None, layout: Layout, writes: bool
    ) -> tuple[Tensor, tuple[Step, ...]]:
        """What was read, projected, [B, T, D], zero at padding; and what is to be committed to the cache layer.

        Args:
            hidden: [B, T, D].
            points: Where the conversation stands; None for its start, without a cache.
            layout: Which of the columns are real.
            writes: Whether the tokens are written.
        """
        streams = layout.gather(hidden)
        queries, keys, values = self.q_proj(streams), self.k_proj(streams), self.v_proj(streams)
        if self.normalize_qkv:
            queries, keys, values = (nn.functional.normalize(part, dim=-1) for part in (queries, keys, values))
        reads, steps = self.memory(queries, keys, values, points, layout, writes)
        return layout.scatter(self.o_proj(self.memory_read(reads.to(hidden.dtype)))), steps


class TensorMemoryMLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.act_fn = nn.GELU()
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(self.act_fn(self.up_proj(hidden)))


class TensorMemoryLayer(GradientCheckpointingLayer, MemoryOwner):
    """Memory, then a feed-forward network, each on its normalised input and added to the residual stream.

    Args:
        memories: The heads.
        hidden_size: Of the model.
        intermediate_size: Inner width of the feed-forward network.
        bias: Whether projections have one.
        normalize_qkv: As in `LinearMemoryAttention`.
    """

    def __init__(
        self, memories: list[TensorMemory], hidden_size: int, intermediate_size: int, bias: bool, normalize_qkv: bool
    ) -> None:
        super().__init__()
        self.layer_idx = 0  # the model that it becomes part of says which
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.bias, self.normalize_qkv = bias, normalize_qkv
        self.input_layernorm = nn.LayerNorm(hidden_size)
        self.self_attn = LinearMemoryAttention(
            memory=MultiHeadMemory(memories), hidden_size=hidden_size, bias=bias, normalize_qkv=normalize_qkv
        )
        self.post_attention_layernorm = nn.LayerNorm(hidden_size)
        self.mlp = TensorMemoryMLP(hidden_size, intermediate_size, bias)

    @property
    def memory_shapes(self) -> tuple[MemoryShape, ...]:
        """What the memories of its groups of heads are made of."""
        return self.self_attn.memory.shapes

    def memory_layers(self) -> list[MemoryLayer]:
        kind = HeadGroupsLayer if self.layer_idx else CountingHeadGroupsLayer
        return [kind(self.memory_shapes, self.layer_idx)]

    def forward(
        self, hidden_states: Tensor, points: tuple[Progress, ...] | None, layout: Layout, writes: bool
    ) -> tuple[Tensor, tuple[Step, ...]]:
        """The layer's output [B, T, D], and what is to be committed to the cache.

        Args:
            hidden_states: [B, T, D].
            points: Where the conversation stands, None without a cache.
            layout: Which columns are real.
            writes: Whether the tokens are written.
        """
        read, steps = self.self_attn(self.input_layernorm(hidden_states), points, layout, writes)
        hidden_states = hidden_states + read
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), steps


class TensorMemoryPreTrainedModel(ModelWithMemory):
    """Weights, downloading and loading of tensor memory models."""

    config_class = TensorMemoryConfig
    config: TensorMemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TensorMemoryLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_compile_fullgraph = False  # a cache layer asks the device how far its rows are
    _can_record_outputs = {"hidden_states": TensorMemoryLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.config.initializer_range is not None or not isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)
        elif isinstance(module, nn.Embedding):
            # Multiplied by the root of the hidden size, they enter the first layer with a variance of 1.
            init.normal_(module.weight, mean=0.0, std=module.embedding_dim**-0.5)
        else:  # what nn.Linear does by itself, and so a layer that is handed in has too
            bound = module.in_features**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)


class TensorMemoryModel(TensorMemoryPreTrainedModel):
    """The decoder: scaled token embeddings, layers, a final norm.

    Args:
        config: What it is made of.
        layers: Its layers, kept with their weights; made from the config when None.
    """

    def __init__(self, config: TensorMemoryConfig, layers: list[TensorMemoryLayer] | None = None) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if layers is None:
            layers = [
                TensorMemoryLayer(
                    [TensorMemory(head) for head in config.heads(index)],
                    hidden_size=config.hidden_size,
                    **{name: config.of_layer(name, index) for name in OF_LAYERS},
                )
                for index in range(len(config.layers))
            ]
        else:
            for layer in layers:
                for parameter in layer.parameters():
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.layers = nn.ModuleList(layers)
        for index, layer in enumerate(layers):
            layer.layer_idx = index
        self.norm = nn.LayerNorm(config.hidden_size)
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
        update_memory: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states.

        Args:
            input_ids: [B, T], or `inputs_embeds` [B, T, D], which are scaled as token embeddings are.
            attention_mask: [B, context + T], 0 for padding, which is never written.
            position_ids: [B, T]; no layer has positions, but where they begin again without a mask, and no cache is
                given, another document begins, with an empty memory.
            past_key_values: Where memory comes from: a `MemoryCache`, or a cache made from the config.
            update_memory: Whether the tokens are written into memory; None for True.

        Raises:
            ValueError: for a cache of another number of rows or without memory layers, or documents packed into a row
                that has one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        layout = find_layout(tokens, attention_mask, position_ids, past_key_values, self.config, kwargs)
        hidden_states: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states = hidden_states * self.config.hidden_size**0.5
        if use_cache and past_key_values is None and layout.valid.shape[0] == hidden_states.shape[0]:
            past_key_values = DynamicCache(config=self.config)
        for index, layer in enumerate(self.layers):
            memory = memory_of(past_key_values, index, HeadGroupsLayer)
            shapes: Any = layer.memory_shapes
            rows = layout.valid.shape[0]
            points = None if memory is None else memory.point(shapes, rows, hidden_states.device)
            writes = update_memory is not False and not (memory is not None and memory.is_read_only)
            hidden_states, steps = layer(hidden_states, points=points, layout=layout, writes=writes)
            if memory is not None:
                memory.commit(steps, hidden_states.shape[1])
        if isinstance(past_key_values, MemoryCache):
            past_key_values.note_tokens(input_ids)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TensorMemoryForCausalLM(RememberingLanguageModel, TensorMemoryPreTrainedModel, GenerationMixin):
    """A tensor memory model with a language model's head, tied to the embeddings."""

    decoder_class = TensorMemoryModel

    @classmethod
    def from_layers(
        cls,
        vocab_size: int,
        layers: list[TensorMemoryLayer],
        initializer_range: float | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> Self:
        """A model of layers that are handed in; its config says all that they are made of.

        Args:
            vocab_size: Number of tokens.
            layers: Kept as they are, weights included; the model has the dtype of the first.
            initializer_range: Standard deviation of the embeddings; None scales them by the hidden size.
            pad_token_id, bos_token_id, eos_token_id: Special tokens, where there are any.

        Raises:
            ValueError: for no layers, layers of different hidden sizes, a layer given twice, and heads of a class of
                one's own, which no config could say.
        """
        widths = sorted({layer.hidden_size for layer in layers})
        if len(widths) != 1 or len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(
                f"{len(layers)} layers of hidden sizes {widths} were given, but a model has one hidden size and at "
                "least one layer, and each layer of it is another one"
            )
        for layer in layers:
            for memory in layer.self_attn.memory.memories:
                if type(memory) is not TensorMemory:
                    raise ValueError(
                        f"A head of class {type(memory).__name__} was given, but config.json says TensorMemory only. "
                        "Use such a head in a LinearMemoryAttention of a model of your own"
                    )
        of_layers: dict[str, Any] = {name: [getattr(layer, name) for layer in layers] for name in OF_LAYERS}
        config = TensorMemoryConfig(
            vocab_size=vocab_size,
            hidden_size=widths[0],
            layers=[[memory.config for memory in layer.self_attn.memory.memories] for layer in layers],
            **of_layers,
            initializer_range=initializer_range,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
        model = cls(config, TensorMemoryModel(config, layers))
        nn.Module.to(model, next(layers[0].parameters()).dtype)
        return model


class TensorMemoryForSequenceClassification(GenericForSequenceClassification, TensorMemoryPreTrainedModel):
    """A tensor memory model with a linear classifier on each row's last real token."""
