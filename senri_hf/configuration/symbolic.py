"""Settings of the symbolic transformer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .errors import value_errors


@value_errors
@strict
class SymbolicTransformerConfig(PreTrainedConfig):
    """What a `SymbolicTransformerModel` is made of: a small decoder over a handful of symbols, made to be looked into.

    Args:
        vocab_size: Number of symbols.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads of each attention, each `hidden_size / num_attention_heads` wide.
        intermediate_size: Inner width of the MLP; four times `hidden_size` when None. Not read with `use_mlp=False`.
        use_mlp: Whether a layer has an MLP after its attention.
        use_layer_norm: Whether attention, MLP and output are preceded by a LayerNorm.
        hidden_act: Activation of the MLP, by transformers' name.
        max_position_embeddings: Symbols of context; each has a learned position embedding.
        hidden_dropout: Dropout in [0, 1) on the embeddings and on what attention and MLP add.
        attention_dropout: Dropout in [0, 1) on attention weights.
        initializer_range: Standard deviation of the initial weights.
        layer_norm_eps: Epsilon of the LayerNorms.
        tie_word_embeddings: Whether `lm_head` is the transposed token embedding.
    """

    model_type = "symbolic_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 3
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    use_mlp: bool = True
    use_layer_norm: bool = True
    hidden_act: str = "gelu"
    max_position_embeddings: int = 10
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_sizes(self) -> None:
        """ValueError naming the size or rate that is out of its range."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must be at least 1")
        if self.max_position_embeddings < 1:
            raise ValueError(f"max_position_embeddings={self.max_position_embeddings} was given; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} was given with num_attention_heads={self.num_attention_heads}, which "
                "must divide it"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must be in [0, 1)")
