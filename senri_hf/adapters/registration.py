"""Makes PEFT know the memory adapter.

PEFT's public `register_peft_method` takes members of its own enum only, so the three mappings that it fills are filled
here, with a string that behaves like a member.
"""

from typing import Any


class MethodName(str):
    """A PEFT method's name: equal to and hashed like its string, with an enum member's `name` and `value`."""

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return str.__str__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MethodName":
        return self

    def __reduce__(self) -> tuple[type["MethodName"], tuple[str]]:
        return MethodName, (str.__str__(self),)


MEMORY_TYPE = MethodName("SENRI")
PREFIX = "senri_"


def register() -> None:
    """Add the memory adapter to PEFT's methods; calling it again changes nothing."""
    from peft import mapping

    from .config import MemoryAdapterConfig
    from .tuner import MemoryTuner

    name: Any = MEMORY_TYPE
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = MemoryAdapterConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = MemoryTuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = PREFIX
