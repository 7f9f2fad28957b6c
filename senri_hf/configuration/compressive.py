"""Settings of the compressive mechanism."""

from dataclasses import dataclass, field, fields


UPDATE_RULES = ("additive", "delta", "corrected_delta", "gated_delta")
ACTIVATIONS = ("silu", "none")


def check_whole(name: str, value: object, least: int) -> None:
    """ValueError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} was given, but {name} must be a whole number of at least {least}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} was given, but {name} must be one of {allowed}")


def check_bounds(eps: object, decay: object, **clamps: object) -> None:
    """ValueError naming the first of a rule's numbers that is out of its range; see `UpdateRule`."""
    if not is_number(eps) or not eps >= 0:  # type: ignore[operator]
        raise ValueError(f"eps={eps!r} was given, but eps must be a number of at least 0")
    if decay is not None and not (is_number(decay) and 0 < decay < 1):  # type: ignore[operator]
        raise ValueError(f"decay={decay!r} was given, but decay must be a number between 0 and 1, or None")
    for name, value in clamps.items():
        if value is not None and not (is_number(value) and value > 0):  # type: ignore[operator]
            raise ValueError(f"{name}={value!r} was given, but {name} must be more than 0, or None for no clamp")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class CompressiveConfig:
    """How a compressive memory, an associative matrix per head, is written and read.

    Args:
        update_rule: `"additive"`, `"delta"`, `"corrected_delta"` or `"gated_delta"`; see `docs/senri.md` for formulas.
        num_memories: Slots. Reads mix them by how well the query fits what was written to each; writes go to the open
            slot.
        memory_head_dim: Size of a head; None for one head of the model's hidden size. It divides the hidden size.
        memory_slot_tokens: Tokens after which the next slot is opened; without effect while there is one slot.
        memory_segment_length: Tokens between updates, counted from the start of the conversation. Inside a segment of
            more than one token memory is frozen. `"gated_delta"` has segments of one token only.
        conv_kernel: Width of the causal convolution before queries, keys and values of `"gated_delta"`; 1 for none.
        activation: What follows it: `"silu"`, as in Gated DeltaNet, or `"none"`.
    """

    update_rule: str = field(default="delta", metadata={"help": f"One of {UPDATE_RULES}."})
    num_memories: int = field(default=1, metadata={"help": "Memory slots."})
    memory_head_dim: int | None = field(default=None, metadata={"help": "Size of a head; None: the hidden size."})
    memory_slot_tokens: int = field(default=512, metadata={"help": "Tokens that one slot takes before the next."})
    memory_segment_length: int = field(default=1, metadata={"help": "Tokens between updates of the memory."})
    conv_kernel: int = field(default=4, metadata={"help": "Width of the convolution of gated_delta; 1: none."})
    activation: str = field(default="silu", metadata={"help": f"After it, one of {ACTIVATIONS}."})

    def validate(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        check_choice("update_rule", self.update_rule, UPDATE_RULES)
        check_choice("activation", self.activation, ACTIVATIONS)
        for name in ("num_memories", "memory_slot_tokens", "memory_segment_length", "conv_kernel"):
            check_whole(name, getattr(self, name), 1)
        if self.memory_head_dim is not None:
            check_whole("memory_head_dim", self.memory_head_dim, 1)
        if self.update_rule == "gated_delta" and self.memory_segment_length != 1:
            raise ValueError(
                f"memory_segment_length={self.memory_segment_length} was given, but update_rule='gated_delta' is "
                "written at every token; use memory_segment_length=1 or another rule"
            )

    def head_dim(self, hidden_size: int) -> int:
        """Size of a head in a model of `hidden_size`; ValueError when it does not divide that."""
        size = hidden_size if self.memory_head_dim is None else self.memory_head_dim
        if hidden_size % size:
            raise ValueError(
                f"memory_head_dim={size} was given, but it must divide the hidden size {hidden_size} of the model"
            )
        return size

    @classmethod
    def of(cls, config: "CompressiveConfig") -> "CompressiveConfig":
        """The mechanism's own settings, out of a config that has more fields than these."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
