"""The configuration of a memory adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig

from ..configuration import EpisodicConfig


MECHANISMS = ("episodic",)


@dataclass
class MemoryAdapterConfig(EpisodicConfig, PeftConfig):
    """A memory for a decoder-only model that has none, as a PEFT method.

    `get_peft_model(model, MemoryAdapterConfig())` adds it; the base model's weights and modules stay as they are.

    Args:
        mechanism: How memory is held: `"episodic"`, whose settings are those of `EpisodicConfig`.
        layers_to_transform: Indices of the decoder layers that get a memory, from 0; every third layer of the upper two
            thirds when None. The resolved list is what is saved.
        layers_pattern: Dotted name of the `nn.ModuleList` of decoder layers, for a model in which it is not found.
        modules_to_save: Names of modules of the base model that are trained and saved too, as in PEFT's own methods.
    """

    mechanism: str = field(default="episodic", metadata={"help": f"How memory is held, one of {MECHANISMS}."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers that get a memory."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Dotted name of the ModuleList of decoder layers, where it is not found."}
    )

    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model that are trained and saved too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from .registration import MEMORY_TYPE

        self.peft_type = MEMORY_TYPE
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism={self.mechanism!r} was given, but mechanism must be one of {MECHANISMS}")
        self.validate()

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
