"""The mechanisms that a memory adapter can have."""

from .bank import BankAdapterConfig
from .compressive import CompressiveAdapterConfig
from .config import MemoryAdapterConfig
from .episodic import EpisodicAdapterConfig


MECHANISMS: dict[str, type[MemoryAdapterConfig]] = {
    "episodic": EpisodicAdapterConfig,
    "bank": BankAdapterConfig,
    "compressive": CompressiveAdapterConfig,
}
