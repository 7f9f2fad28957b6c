"""The configuration of a memory adapter."""

import difflib
from abc import abstractmethod
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from peft import PeftConfig
from torch import nn


if TYPE_CHECKING:
    from .block import MemoryBlock


@dataclass
class MemoryAdapterConfig(PeftConfig):
    """A memory for a decoder-only model that has none, as a PEFT method.

    `get_peft_model(model, MemoryAdapterConfig())` adds it; the base model's weights and modules stay as they are.
    What is made is the config of the mechanism named, with that mechanism's settings as further arguments:
    `MemoryAdapterConfig(mechanism="episodic", store_slots=64)` is an `EpisodicAdapterConfig`.

    Args:
        mechanism: How memory is held: `"episodic"`, whose settings are those of `EpisodicConfig`, `"compressive"`,
            those of `CompressiveAdapterConfig`, or `"bank"`, those of `BankConfig`.
        layers_to_transform: Indices of the decoder layers that get a memory, from 0; every third layer of the upper two
            thirds when None. The resolved list is what is saved.
        layers_pattern: Dotted name of the `nn.ModuleList` of decoder layers, for a model in which it is not found.
        modules_to_save: Names of modules of the base model that are trained and saved too, as in PEFT's own methods.

    Raises:
        ValueError: for an unknown mechanism, a setting that it does not have, or a value out of its range.
    """

    mechanism: str = field(default="episodic", metadata={"help": "How memory is held."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers that get a memory."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Dotted name of the ModuleList of decoder layers, where it is not found."}
    )

    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model that are trained and saved too."}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls is not MemoryAdapterConfig:
            return super().__new__(cls)
        from .mechanisms import MECHANISMS

        mechanism = kwargs.get("mechanism", "episodic")
        if mechanism not in MECHANISMS:
            raise ValueError(f"mechanism={mechanism!r} was given, but mechanism must be one of {tuple(MECHANISMS)}")
        chosen: Any = MECHANISMS[mechanism]
        names = [f.name for f in fields(chosen) if f.init]
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                if name.startswith("memory_layer_"):  # as a memory transformer says which layers
                    near = ["layers_to_transform"]
                raise ValueError(
                    f"{name}={kwargs[name]!r} was given, but mechanism={mechanism!r} has no setting {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f". It has {names}")
                )
        return super().__new__(chosen)

    def __post_init__(self) -> None:
        super().__post_init__()
        from .mechanisms import MECHANISMS
        from .registration import MEMORY_TYPE

        self.peft_type = MEMORY_TYPE
        if MECHANISMS.get(self.mechanism) is not type(self):
            raise ValueError(
                f"mechanism={self.mechanism!r} was given to {type(self).__name__}, the config of another mechanism. "
                "Use MemoryAdapterConfig(mechanism=…)"
            )
        self.validate()

    @abstractmethod
    def validate(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""

    @abstractmethod
    def new_block(self, decoder_layer: nn.Module, hidden_size: int, num_heads: int, layer_idx: int) -> "MemoryBlock":
        """The module that goes beside a decoder layer.

        Args:
            hidden_size: Of the model.
            num_heads: The model's attention heads.
            layer_idx: The layer's place, one of `layers_to_transform`.
        """

    def resolve_layers(self, num_layers: int) -> list[int]:
        """The indices of the layers that get a memory, in a model of `num_layers`.

        Raises:
            ValueError: for an index that the model does not have, or none at all.
        """
        chosen = self.layers_to_transform
        if chosen is None:
            chosen = list(range(num_layers // 3 + (num_layers - 1 - num_layers // 3) % 3, num_layers, 3))
        elif isinstance(chosen, int):
            chosen = [chosen]
        wrong = [i for i in chosen if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < num_layers]
        if wrong or not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} was given, but it must name different layers from 0 "
                f"to {num_layers - 1}"
            )
        return sorted(chosen)
