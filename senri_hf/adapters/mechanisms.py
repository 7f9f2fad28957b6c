"""The mechanisms that a memory adapter can have."""

from .config import MemoryAdapterConfig
from .episodic import EpisodicAdapterConfig


MECHANISMS: dict[str, type[MemoryAdapterConfig]] = {
    "episodic": EpisodicAdapterConfig,
}
