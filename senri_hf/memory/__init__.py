"""What a memory is: its mechanisms, the cache that carries them, and its file."""

from .cache import MemoryCache
from .compressive_layer import CompressiveLayer, CountingCompressiveLayer
from .compressive_mixer import CompressiveMemory
from .episodic_layer import EpisodicLayer
from .episodic_reader import AttentionWeights, EpisodicReader
from .layer import MemoryLayer
from .owner import MemoryOwner


__all__ = [
    "AttentionWeights",
    "CompressiveLayer",
    "CompressiveMemory",
    "CountingCompressiveLayer",
    "EpisodicLayer",
    "EpisodicReader",
    "MemoryCache",
    "MemoryLayer",
    "MemoryOwner",
]
