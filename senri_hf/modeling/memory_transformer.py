"""The memory transformer: a Llama whose memory layers read a bank of learnable memory tokens by cross-attention."""

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.bank import QUANTIZED_BITS, lookahead_error
from ..configuration.memory_transformer import MemoryTransformerConfig
from ..memory import bank_layer
from ..memory.bank import MemoryBank, OpenBank, Table
from ..memory.bank_layer import BankLayer
from ..memory.bank_reader import BankAttention, MemoryLinear
from ..memory.bank_router import ChapterRouter, RouterRecord, has_router_loss, mean_record, router_loss, router_losses
from ..memory.cache import MemoryCache, layer_in
from ..memory.layer import BUILT_IN, MemoryLayer
from ..memory.owner import MemoryOwner
from ..memory.prompt import Prompt
from ..memory.real_tokens import AfterEnd, document_starts, real_tokens
from ..memory.router_loss import RouterLossSlot, with_router_loss
from .language_model import CausalLanguageModel


@dataclass
class MemoryModelOutputWithPast(BaseModelOutputWithPast):
    """A decoder's output, with what routers did: means over memory layers, None without chapters."""

    router_loss: Tensor | None = None  # the weighted sum of the losses that are turned on
    router_entropy: Tensor | None = None  # in nats
    router_usage: Tensor | None = None  # [C] share of the routed reads that each chapter got


@dataclass
class MemoryCausalLMOutputWithPast(CausalLMOutputWithPast):
    """A causal language model's output, with what routers did as in `MemoryModelOutputWithPast`."""

    router_loss: Tensor | None = None
    router_entropy: Tensor | None = None
    router_usage: Tensor | None = None


@dataclass
class MemoryPass:
    """What a layer's read of memory needs to know of a forward pass."""

    real: Tensor  # [B, T] the tokens that are no padding
    starts: Tensor | None  # [B, T] where another document begins
    prompt_lengths: Tensor | None  # [B]

    def to(self, device: torch.device) -> Self:
        """The same where a layer is, as those of one model may be on several devices."""
        held = (self.real, self.starts, self.prompt_lengths)
        return type(self)(*(None if tensor is None else tensor.to(device) for tensor in held))  # type: ignore[arg-type]


class MemoryCrossAttention(BankAttention, MemoryOwner):
    """The memory sublayer: it reads a bank that the model holds, for its layer."""

    def __init__(self, config: MemoryTransformerConfig, layer_idx: int) -> None:
        super().__init__(
            config, config.hidden_size, config.num_attention_heads, config.dropout, config.initializer_range
        )
        self.layer_idx = layer_idx

    def memory_layers(self) -> list[MemoryLayer]:
        return [self.new_cache_layer(self.layer_idx, BUILT_IN)]

    def new_cache_layer(self, layer_idx: int, adapter_name: str) -> BankLayer:
        """A blank cache layer for what its routing keeps."""
        return BankLayer(self.config, layer_idx, adapter_name)


class MemoryTransformerDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, MLP, and in memory layers a read of memory.

    Variant A: attention, memory, MLP. Variant B: attention, MLP, memory, and a second MLP. Every sublayer normalises
    its input and adds to the residual stream.
    """

    def __init__(self, config: MemoryTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(cast(Any, config), layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = new_norm(config)
        self.post_attention_layernorm = new_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.has_memory = layer_idx in config.memory_layers
        self.reads_before_mlp = config.memory_block_variant == "A"
        if self.has_memory:
            self.memory_attn = MemoryCrossAttention(config, layer_idx)
            self.memory_layernorm = new_norm(config)
            if not self.reads_before_mlp:
                self.post_memory_layernorm = new_norm(config)
                self.post_memory_mlp = LlamaMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        bank: OpenBank | None = None,
        memory_pass: MemoryPass | None = None,
        memory_layer: BankLayer | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, *tuple[Tensor, ...]]:
        """The residual stream [B, T, D], and with chapters the parts of what the router did.

        The parts stand one by one: reentrant checkpointing sees no tensor that is nested deeper.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        record = None
        if self.has_memory and self.reads_before_mlp:
            hidden_states, record = self.read_memory(hidden_states, bank, memory_pass, memory_layer)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        if self.has_memory and not self.reads_before_mlp:
            hidden_states, record = self.read_memory(hidden_states, bank, memory_pass, memory_layer)
            second = self.post_memory_mlp(self.post_memory_layernorm(hidden_states))
            hidden_states = hidden_states + self.dropout(second)
        return hidden_states, *(record or ())

    def read_memory(
        self,
        hidden_states: Tensor,
        bank: OpenBank | None,
        memory_pass: MemoryPass | None,
        memory_layer: BankLayer | None,
    ) -> tuple[Tensor, RouterRecord | None]:
        """The residual stream after the memory sublayer, and what the router did."""
        assert bank is not None and memory_pass is not None
        memory_pass = memory_pass.to(hidden_states.device)
        read, record = self.memory_attn(
            self.memory_layernorm(hidden_states),
            bank,
            memory_pass.real,
            memory_layer,
            memory_pass.starts,
            memory_pass.prompt_lengths,
        )
        return hidden_states + read, record


def new_norm(config: MemoryTransformerConfig) -> nn.Module:
    """The norm before a sublayer."""
    if config.use_rms_norm:
        return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)


class MemoryTransformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of memory transformers."""

    config: MemoryTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryTransformerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MemoryTransformerDecoderLayer,
        "attentions": LlamaAttention,
    }

    def quantize_memory(self, bits: int | None = None) -> None:
        """Hold the banks in 8 or 4 bits a value from now on, frozen; reads are those of `quantize_memory=True`.

        Args:
            bits: `memory_quant_bits` of the config when None.

        Raises:
            ValueError: for another number of bits, or where there are no banks, or they are held so already.
        """
        bits = self.config.memory_quant_bits if bits is None else bits
        if bits not in QUANTIZED_BITS:
            raise ValueError(f"quantize_memory(bits={bits!r}): memory_quant_bits must be one of {QUANTIZED_BITS}")
        banks = [module for module in self.modules() if isinstance(module, MemoryBank)]
        if not banks:
            raise ValueError(f"{type(self).__name__} has no bank: vanilla_mode=True leaves memory out")
        for bank in banks:
            bank.store_quantized(bits)
        self.config.quantize_memory, self.config.memory_quant_bits, self.config.quantized_storage = True, bits, True

    def _init_weights(self, module: nn.Module) -> None:
        # The memory's output starts at zero, whatever linear layers start as.
        if isinstance(module, (Table, MemoryLinear, ChapterRouter)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class MemoryTransformerModel(MemoryTransformerPreTrainedModel):
    """The decoder: embeddings, layers, and the banks that its memory layers read."""

    def __init__(self, config: MemoryTransformerConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_dropout = nn.Dropout(config.dropout)
        self.bank_of_layer = {layer: config.bank_of_layer(order) for order, layer in enumerate(config.memory_layers)}
        self.memory_banks = nn.ModuleList(
            MemoryBank(config, config.hidden_size) for _ in range(len(set(self.bank_of_layer.values())))
        )
        self.layers = nn.ModuleList(
            MemoryTransformerDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = new_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(cast(Any, config))
        self.gradient_checkpointing = False
        self.router_loss = RouterLossSlot()
        self.predicts_next_token = False
        self.prompt = Prompt()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> MemoryModelOutputWithPast:
        """Run the decoder.

        Args:
            prompt_lengths: [B] how many tokens of each row's conversation, padding left out, are its prompt: `"hybrid"`
                routing goes by them. All of them when None; `generate()` knows better.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        self.check_routing()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            is_packed = document_starts(inputs_embeds, attention_mask, position_ids, kwargs) is not None
            past_key_values = None if is_packed else DynamicCache(config=self.config)
        memory_pass = self.memory_pass(
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, prompt_lengths, kwargs
        )
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past  # type: ignore[assignment]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        assert position_ids is not None
        position_embeddings = self.position_embeddings(inputs_embeds, position_ids)
        banks = [bank() for bank in self.memory_banks]
        records: list[RouterRecord] = []
        hidden_states = self.embed_dropout(inputs_embeds)
        for index, layer in enumerate(self.layers):
            hidden_states, *record = layer(
                hidden_states,
                bank=banks[self.bank_of_layer[index]] if index in self.bank_of_layer else None,
                memory_pass=memory_pass,
                memory_layer=self.memory_layer(index, past_key_values),
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if record:
                records.append(RouterRecord(*record))
        if isinstance(past_key_values, MemoryCache):
            past_key_values.note_tokens(input_ids)
        output = MemoryModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)
        if records:
            self.note_routing(output, records)
        return output

    def check_routing(self) -> None:
        """ValueError where next tokens are predicted and tokens are routed by their future."""
        name = "routing_strategy_train" if self.training else "routing_strategy_inference"
        looks_ahead = bool(self.memory_banks) and name in self.config.looks_ahead
        if looks_ahead and self.predicts_next_token and not self.config.allow_lookahead_routing:
            raise lookahead_error((name,), "a causal language model")

    def memory_pass(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        prompt_lengths: Tensor | None,
        given: dict[str, Any],
    ) -> MemoryPass | None:
        """Which tokens are real, and where documents begin; None without memory."""
        if not self.memory_banks:
            return None
        starts = document_starts(inputs_embeds, attention_mask, position_ids, given)
        if cache is None and starts is not None:
            real = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            return MemoryPass(real, starts, self.lengths_of_prompts(real, None, prompt_lengths))
        past = 0 if cache is None else cache.get_seq_length()
        real, _ = real_tokens(inputs_embeds, attention_mask, position_ids, given, past)
        if isinstance(cache, MemoryCache):
            for layer in cache.memory_layers:  # before attention has taken anything in
                layer.check_rows(inputs_embeds.shape[0])
            if input_ids is not None:
                real = real & ~AfterEnd.of(self.config).among(input_ids, cache.recent_decoded)
        return MemoryPass(real, None, self.lengths_of_prompts(real, cache, prompt_lengths))

    def lengths_of_prompts(self, real: Tensor, cache: Cache | None, given: Tensor | None) -> Tensor | None:
        """The `given` lengths [B], or those of the prompts that `generate()` feeds; None where all is prompt."""
        said = self.prompt.take(real.shape[1], goes_on=cache is not None)
        if given is not None or said is None or "hybrid" not in self.config.routing_strategies:
            return given
        return bank_layer.prompt_lengths(real, said, self.memory_layer(min(self.bank_of_layer), cache))

    def memory_layer(self, index: int, cache: Cache | None) -> BankLayer | None:
        """What routing keeps for a layer, in the cache; None without a cache, or where nothing may be kept."""
        if cache is None or index not in self.bank_of_layer or (self.gradient_checkpointing and self.training):
            return None
        reader = cast(MemoryCrossAttention, self.layers[index].memory_attn)
        layer = layer_in(cache, index, BUILT_IN, reader.new_cache_layer, self.config.num_hidden_layers)
        return cast(BankLayer, layer)

    def position_embeddings(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary embeddings [B, T, head size]; those of no rotation without `use_rope`."""
        if self.config.use_rope:
            cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids)
            return cos, sin
        ones = hidden_states.new_ones(*position_ids.shape, self.config.head_dim)  # type: ignore[arg-type]
        return ones, torch.zeros_like(ones)

    def note_routing(self, output: MemoryModelOutputWithPast, records: list[RouterRecord]) -> None:
        """Put what routers did into the output; in training their loss waits to be taken."""
        record = mean_record(records)
        output.router_entropy, output.router_usage = record.entropy, record.usage
        if has_router_loss(self.config):
            is_learned = self.training and torch.is_grad_enabled()
            losses = router_losses(records, over_processes=is_learned and self.router_loss.over_processes)
            output.router_loss = router_loss(losses, self.config)
            if is_learned:
                self.router_loss.loss = output.router_loss


class MemoryTransformerForCausalLM(CausalLanguageModel, MemoryTransformerPreTrainedModel, GenerationMixin):
    """The memory transformer with a language modelling head.

    While training, its loss is that of next tokens plus that of the routers; otherwise that of next tokens alone.
    """

    decoder_class = MemoryTransformerModel

    def __init__(self, config: MemoryTransformerConfig) -> None:
        super().__init__(config)
        self.model.predicts_next_token = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> MemoryCausalLMOutputWithPast:
        """Logits of next tokens, and their loss where `labels` [B, T] are given (-100 is not learned).

        Args:
            prompt_lengths: [B] as in `MemoryTransformerModel`.
        """
        outputs: MemoryModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_lengths=prompt_lengths,
            **kwargs,
        )
        predictions = self.predictions(outputs, labels, logits_to_keep, **kwargs)
        if labels is not None and self.training:
            waiting, items = self.model.router_loss.take(), kwargs.get("num_items_in_batch")
            predictions["loss"] = with_router_loss(predictions["loss"], waiting, labels, items)
        return MemoryCausalLMOutputWithPast(
            **predictions,
            router_loss=outputs.router_loss,
            router_entropy=outputs.router_entropy,
            router_usage=outputs.router_usage,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As for any model; `"hybrid"` routing is told where the prompt ends."""
        parent: Any = super()
        with self.model.prompt.fed(inputs, kwargs):
            return parent.generate(inputs, *args, **kwargs)


class MemoryTransformerForSequenceClassification(GenericForSequenceClassification, MemoryTransformerPreTrainedModel):
    """The memory transformer with a classification head; routing may look ahead here.

    While training, its loss is that of the classes plus that of the routers.
    """

    # It is a mean over the rows of a pass: a trainer that accumulates passes divides it.
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of classes [B, num_labels], and their loss where `labels` are given; all else is the decoder's."""
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        if labels is not None and self.training:
            output.loss = with_router_loss(output.loss, self.model.router_loss.take(), labels)
        return output
