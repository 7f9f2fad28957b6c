"""Configuration of the memory transformer."""

import difflib
import warnings
from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .bank import BankConfig, check_choice, check_whole
from .errors import value_errors


PLACEMENTS = ("all", "first_k", "last_k", "every_n", "custom")
VARIANTS = ("A", "B")
# Sizes as files of runs name them.
SIZES = {
    "hidden_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "intermediate_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
# What else may be meant, and where it is.
ELSEWHERE = {
    **{name: f"{theirs!r}" for name, theirs in SIZES.items()},
    "memory_size": "'num_memory_tokens'",
    "num_memory": "'num_memory_tokens'",
    "top_k": "'top_k_chapters'",
    "tokens_per_chapter": "'num_chapters' (num_memory_tokens of which are that many in each)",
    "use_memory_adapter": "'vanilla_mode' (its opposite)",
    "use_flash_attention": "'attn_implementation'",
    **dict.fromkeys(
        ("use_lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "use_both_memory_and_lora"),
        "PEFT's LoraConfig, which is added to a model",
    ),
    **dict.fromkeys(
        ("tokenizer_name", "base_model_name", "freeze_base_model"),
        "the section 'model' of a file for senri-hf train",
    ),
}
# Names beside its fields that PreTrainedConfig reads itself, or that transformers writes into a config.json.
ALSO_READ = (
    "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation", "output_attentions",
    "per_layer_config", "rope_theta", "quantization_config", "auto_map", "transformers_weights",
)  # fmt: skip


@value_errors
@strict
class MemoryTransformerConfig(BankConfig, PreTrainedConfig):
    """A decoder-only transformer whose memory layers read a bank of learnable memory tokens by cross-attention.

    Attention, MLP, norms and rotary embeddings are Llama's, and so are their settings (see `LlamaConfig`); those of
    banks, chapters and routing are `BankConfig`'s. What is added to both:

    Args:
        vanilla_mode: No memory at all: the plain transformer, for comparisons.
        memory_layer_placement: Which layers read memory: `"all"`, `"first_k"`, `"last_k"`, `"every_n"` (layers 0, n,
            2n, …) or `"custom"`.
        memory_layer_k: Layers for `"first_k"` and `"last_k"`.
        memory_layer_n: Stride for `"every_n"`.
        memory_layer_indices: Layers for `"custom"`, from 0.
        memory_block_variant: `"A"`: self-attention, memory, MLP. `"B"`: self-attention, MLP, memory, and a second MLP.
        dropout: On embeddings and on what every sublayer adds.
        use_rope: Rotary position embeddings; without them attention knows positions by its causal mask alone.
        use_rms_norm: RMS norms; layer norms otherwise.

    Raises:
        ValueError: for a setting out of its range, naming it.
    """

    model_type = "memory_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "router_loss",
        "router_entropy",
        "router_usage",
    ]
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False

    vanilla_mode: bool = False
    memory_layer_placement: str = "all"
    memory_layer_k: int = 5
    memory_layer_n: int = 3
    memory_layer_indices: list[int] | None = None
    memory_block_variant: str = "A"
    dropout: float = 0.0
    use_rope: bool = True
    use_rms_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:  # transformers takes any name
            if not self._reads(name):
                raise ValueError(f"{name} is no setting of {type(self).__name__}{self._meant(name)}")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)  # none is refused below
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        if not self.vanilla_mode and self.looks_ahead:
            warnings.warn(
                f"{' and '.join(self.looks_ahead)}='sequence' routes every token by the mean of its whole sequence, "
                "the future included. It serves encoders and classification; a causal language model refuses it",
                stacklevel=2,
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; names of others in a config.json stay in it, unless they are like one of ours."""
        foreign = {name: value for name, value in config_dict.items() if not cls._reads(name) and not cls._like(name)}
        known = {name: value for name, value in config_dict.items() if name not in foreign}
        parent: Any = super()
        result = parent.from_dict(known, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for name, value in foreign.items():
            setattr(config, name, value)
        return result

    @classmethod
    def _reads(cls, name: str) -> bool:
        """Whether a name says something to this config or to transformers."""
        of_transformers = not callable(getattr(PreTrainedConfig, name, print))
        return name in ALSO_READ or name.startswith("_") or of_transformers or name in (f.name for f in fields(cls))

    @classmethod
    def _meant(cls, name: str) -> str:
        """A hint at what an unknown name was meant to be; empty when it is like nothing."""
        meant = ELSEWHERE.get(name) or ", ".join(map(repr, cls._like(name)))
        return f"; did you mean {meant}?" if meant else ""

    @classmethod
    def _like(cls, name: str) -> list[str]:
        """The setting that a name is nearly that of, if there is one."""
        return difflib.get_close_matches(name, [f.name for f in fields(cls)], 1, cutoff=0.85)

    def validate_architecture(self) -> None:
        """Part of strict validation: sizes, and heads that divide the width."""
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings",
        )  # fmt: skip
        for name in sizes:
            check_whole(name, getattr(self, name), 1)
        assert self.num_key_value_heads is not None  # it is the number of heads, where nothing is said
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} was given, but it must divide num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} was given, but it must divide hidden_size="
                f"{self.hidden_size}"
            )

    def validate_memory(self) -> None:
        """Part of strict validation: the bank's settings, and where memory is."""
        self.check_bank()
        check_choice("memory_block_variant", self.memory_block_variant, VARIANTS)
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout={self.dropout!r} was given, but dropout must be a number from 0 to 1")
        self._placed()

    @property
    def memory_layers(self) -> list[int]:
        """The layers that read memory, ascending."""
        return [] if self.vanilla_mode else self._placed()

    def _placed(self) -> list[int]:
        return resolve_placement(
            self.memory_layer_placement,
            self.memory_layer_k,
            self.memory_layer_n,
            self.memory_layer_indices,
            self.num_hidden_layers,
        )


def resolve_placement(placement: str, k: int, n: int, indices: list[int] | None, count: int) -> list[int]:
    """The layers, ascending, that a placement names in a model of `count` layers.

    Raises:
        ValueError: when the model does not have them, naming the setting.
    """
    check_choice("memory_layer_placement", placement, PLACEMENTS)
    check_whole("memory_layer_k", k, 1)
    check_whole("memory_layer_n", n, 1)
    if placement in ("first_k", "last_k") and k > count:
        raise ValueError(f"memory_layer_k={k} was given, but the model has only {count} layers")
    if placement == "custom":
        if not indices or len(set(indices)) != len(indices) or not all(0 <= index < count for index in indices):
            raise ValueError(
                f"memory_layer_indices={indices!r} was given, but memory_layer_placement='custom' needs different "
                f"layers from 0 to {count - 1}"
            )
    elif indices is not None:
        raise ValueError(
            f"memory_layer_indices={indices!r} was given with memory_layer_placement={placement!r}; it is read with "
            "'custom' only"
        )
    layers = list(range(count))
    return {
        "all": layers,
        "first_k": layers[:k],
        "last_k": layers[-k:],
        "every_n": layers[::n],
        "custom": sorted(indices or []),
    }[placement]
