"""The configuration of Senri models."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig

from .compressive import CompressiveConfig
from .errors import value_errors


# The first memory layer of a model without attention also counts the tokens of the context.
MEMORY, COUNTING_MEMORY, ATTENTION = "senri_memory", "counting_senri_memory", "full_attention"
MEMORY_SETTINGS = tuple(f.name for f in fields(CompressiveConfig))


def senri_layers(
    count: int, *, use_delta_rule: bool = True, update_rule: str | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Layers that mix tokens by a compressive memory alone, for `SenriConfig(layers=…)`.

    Args:
        count: How many.
        use_delta_rule: Whether a write takes away what memory holds at its key: `update_rule="delta"`; or else
            `"additive"`.
        update_rule: The rule by name, for those that are neither; see `CompressiveConfig`.
        settings: Further settings of `CompressiveConfig`: `num_memories` (1), `memory_head_dim` (None: one head of the
            hidden size), …

    Raises:
        ValueError: for a setting that there is not, or a value out of its range.
    """
    if update_rule is None:
        update_rule = "delta" if use_delta_rule else "additive"
    elif not use_delta_rule and update_rule != "additive":
        raise ValueError(f"use_delta_rule=False and update_rule={update_rule!r} were given; leave one of them out")
    return [memory_layer(settings | {"update_rule": update_rule}) for _ in range(checked_count(count))]


def pythia_layers(count: int) -> list[dict[str, Any]]:
    """Layers of GPT-NeoX: attention with rotary positions, for `SenriConfig(layers=…)`."""
    return [{"type": ATTENTION} for _ in range(checked_count(count))]


def checked_count(count: int) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{count!r} layers were asked for, but their number must be a whole number of at least 0")
    return count


def memory_layer(settings: dict[str, Any]) -> dict[str, Any]:
    """One memory layer with all of its settings spelled out; ValueError when they are not right."""
    unknown = sorted(settings.keys() - set(MEMORY_SETTINGS))
    if unknown:
        raise ValueError(f"{unknown[0]}={settings[unknown[0]]!r} was given, but a memory layer has {MEMORY_SETTINGS}")
    config = CompressiveConfig(**settings)
    config.validate()
    return {"type": MEMORY, **vars(config)}


@value_errors
@strict
class SenriConfig(GPTNeoXConfig):
    r"""A language model of two kinds of layers: compressive memory without positions, and GPT-NeoX's attention.

    Layers are said one by one: `SenriConfig(layers=senri_layers(1, num_memories=4) + pythia_layers(5))`. Without
    `layers`, the first of `num_hidden_layers` (6) is a memory layer and the others are attention. Everything else is
    as in `GPTNeoXConfig`, with defaults of its own.

    Args:
        layers: What `senri_layers` and `pythia_layers` return, added up.
        layer_types: The layers' types, `"senri_memory"` or `"full_attention"`; it follows from `layers`, and makes
            them, with default settings, where they are not given. In a model without attention the first one is
            `"counting_senri_memory"`.
    """

    model_type = "senri"
    # Of GPT-NeoX's, what has the same names here.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    base_model_pp_plan = None  # type: ignore[assignment]

    vocab_size: int = 52000
    hidden_size: int = 512
    num_hidden_layers: int | None = None  # type: ignore[assignment]
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    layers: list[dict[str, Any]] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layers is None:
            count = 6 if self.num_hidden_layers is None else self.num_hidden_layers
            if self.layer_types is None:
                self.layer_types = [MEMORY] * min(count, 1) + [ATTENTION] * (count - 1)
            memory = (MEMORY, COUNTING_MEMORY)
            self.layers = [{"type": MEMORY if kind in memory else kind} for kind in self.layer_types]
            self.layer_types = None
        self.layers = [checked_layer(layer) for layer in self.layers]
        types = [layer["type"] for layer in self.layers]
        if types and ATTENTION not in types:
            types[0] = COUNTING_MEMORY
        for name, ours, given in (
            ("layer_types", types, self.layer_types),
            ("num_hidden_layers", len(types), self.num_hidden_layers),
        ):
            if given is not None and given != ours:
                raise ValueError(f"{name}={given!r} was given, but the layers say {ours!r}; leave {name} out")
        self.layer_types, self.num_hidden_layers = types, len(types)
        super().__post_init__(**kwargs)

    def validate_layer_type(self) -> None:
        """Part of `@strict`'s validation, where transformers knows no memory layers; see `checked_layer`."""

    def memory_settings(self, layer_idx: int) -> CompressiveConfig:
        """The settings of a memory layer."""
        assert self.layers is not None
        return CompressiveConfig(**{name: self.layers[layer_idx][name] for name in MEMORY_SETTINGS})


def checked_layer(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with all of its settings; ValueError for one that is no layer."""
    if not isinstance(layer, dict) or "type" not in layer:
        raise ValueError(f"{layer!r} is no layer: expected what senri_layers(…) or pythia_layers(…) returns")
    if layer["type"] == MEMORY:
        return memory_layer({name: value for name, value in layer.items() if name != "type"})
    if layer["type"] != ATTENTION:
        raise ValueError(f"type={layer['type']!r} was given, but a layer is {MEMORY!r} or {ATTENTION!r}")
    if len(layer) > 1:
        raise ValueError(f"{layer!r} was given, but a layer of type {layer['type']!r} has no settings of its own")
    return dict(layer)
