"""The configuration of tensor memory models. No setting has a default; None is what a truly optional one may be."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .compressive import check_bounds, check_whole
from .errors import value_errors


# All layers hold memory alone, and so the first one also counts the tokens of the context.
TENSOR_MEMORY, COUNTING_TENSOR_MEMORY = "tensor_memory", "counting_tensor_memory"
# What layers may differ in beside their heads: one value for all of them, or a list with one for each.
OF_LAYERS = ("intermediate_size", "bias", "normalize_qkv")


@dataclass(frozen=True, kw_only=True)
class TensorMemoryHeadConfig:
    """One head: a matrix M [dim, dim] and how it is written.

    Args:
        dim: Size of the head's queries, keys and values.
        eps: A read is 0 where the query fits what was written no better than this.
        use_delta_rule: Whether a write takes away what memory holds at its key; otherwise it is added.
        max_delta: The entries of what is added to M are clamped to [-max_delta, max_delta]; None for no clamp.
        max_memory: The entries of M are clamped to [-max_memory, max_memory]; None for no clamp.
        max_norm: M is scaled down to this Frobenius norm where it exceeds it; None for no clamp. A head with any of
            these clamps is written token after token: they forbid computing a chunk at once.
        decay: g between 0 and 1: M becomes g M + (1 - g) times what is written; None for no decay.

    Raises:
        ValueError: naming the first setting that is out of its range.
    """

    dim: int
    eps: float
    use_delta_rule: bool
    max_delta: float | None = None
    max_memory: float | None = None
    max_norm: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        check_whole("dim", self.dim, 1)
        if not isinstance(self.use_delta_rule, bool):
            raise ValueError(f"use_delta_rule={self.use_delta_rule!r} was given, but it must be True or False")
        clamps = {name: getattr(self, name) for name in ("max_delta", "max_memory", "max_norm")}
        check_bounds(self.eps, self.decay, **clamps)


@value_errors
@strict
class TensorMemoryConfig(PreTrainedConfig):
    """A language model whose only token mixing is memory: no attention, no positions, no dropout.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of the feed-forward networks; of all layers, or a list with one for each.
        bias: Whether projections have a bias; of all layers, or a list with one for each.
        normalize_qkv: Whether queries, keys and values, all heads of a token together, are scaled to L2 norm 1; of all
            layers, or a list with one for each.
        layers: For every layer its heads, as `TensorMemoryHeadConfig` or as a dict of its fields; `config.json` spells
            out every one of them.
        initializer_range: Standard deviation of initial weights; None scales each matrix by its inputs.
        use_cache: Whether a forward pass returns a cache; None for True, as in other models.
        tie_word_embeddings: Whether the head is the token embeddings; None for True.
        layer_types, num_hidden_layers: Follow from `layers`, and may be left out.

    Raises:
        ValueError: for no layers, a layer without heads, a setting out of its range or that there is not.
    """

    model_type = "tensor_memory"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int
    hidden_size: int
    intermediate_size: int | list[int]
    bias: bool | list[bool]
    normalize_qkv: bool | list[bool]
    layers: list[Any]
    initializer_range: float | None = None
    use_cache: bool | None = None
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None
    num_hidden_layers: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unwanted = sorted(name for name in kwargs if "drop" in name)
        if unwanted:
            raise ValueError(f"{unwanted[0]}={kwargs[unwanted[0]]!r} was given, but this model has no dropout")
        if not self.layers:
            raise ValueError(f"layers={self.layers!r} was given, but a model has at least one layer")
        self.layers = [[asdict(head_of(head)) for head in checked_heads(heads)] for heads in self.layers]
        self.layer_types = [COUNTING_TENSOR_MEMORY] + [TENSOR_MEMORY] * (len(self.layers) - 1)
        if self.num_hidden_layers not in (None, len(self.layers)):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} was given, but there are {len(self.layers)} layers; leave "
                "it out"
            )
        self.num_hidden_layers = len(self.layers)
        for name in OF_LAYERS:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.layers):
                raise ValueError(
                    f"{name}={value!r} was given, but there are {len(self.layers)} layers: expected one value for all "
                    "of them, or a list with one for each"
                )
            if isinstance(value, list) and len(set(value)) == 1:
                setattr(self, name, value[0])
        check_whole("vocab_size", self.vocab_size, 1)
        check_whole("hidden_size", self.hidden_size, 1)
        for layer_idx in range(len(self.layers)):
            check_whole("intermediate_size", self.of_layer("intermediate_size", layer_idx), 1)
        self.tie_word_embeddings = self.tie_word_embeddings is not False
        self.use_cache = self.use_cache is not False
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Part of `@strict`'s validation, where transformers knows no memory layers."""

    def heads(self, layer_idx: int) -> list[TensorMemoryHeadConfig]:
        """The heads of a layer."""
        return [TensorMemoryHeadConfig(**head) for head in self.layers[layer_idx]]

    def of_layer(self, name: str, layer_idx: int) -> Any:
        """A setting that layers may differ in, of one layer."""
        value = getattr(self, name)
        return value[layer_idx] if isinstance(value, list) else value


def checked_heads(heads: object) -> list[Any]:
    """The heads of a layer; ValueError where there are none."""
    if not isinstance(heads, (list, tuple)) or not heads:
        raise ValueError(f"{heads!r} was given as a layer, but a layer is a list of at least one head")
    return list(heads)


def head_of(head: object) -> TensorMemoryHeadConfig:
    """A head's config, also from its dict; ValueError for what is none."""
    if isinstance(head, TensorMemoryHeadConfig):
        return head
    known = {f.name for f in fields(TensorMemoryHeadConfig)}
    if not isinstance(head, dict) or not head.keys() <= known or not {"dim", "eps", "use_delta_rule"} <= head.keys():
        raise ValueError(
            f"{head!r} was given as a head, but a head is a TensorMemoryHeadConfig or a dict of {sorted(known)}"
        )
    return TensorMemoryHeadConfig(**head)
