"""What a memory is: its mechanisms, the cache that carries them, and its file."""

from .cache import MemoryCache
from .compressive_layer import CompressiveLayer, CountingCompressiveLayer
from .compressive_mixer import CompressiveMemory
from .episodic_layer import EpisodicLayer
from .episodic_reader import AttentionWeights, EpisodicReader
from .head_groups import CountingHeadGroupsLayer, HeadGroupsLayer
from .layer import MemoryLayer
from .owner import MemoryOwner
from .tensor_memory import MultiHeadMemory, TensorMemory


__all__ = [
    "AttentionWeights",
    "CompressiveLayer",
    "CompressiveMemory",
    "CountingCompressiveLayer",
    "CountingHeadGroupsLayer",
    "EpisodicLayer",
    "EpisodicReader",
    "HeadGroupsLayer",
    "MemoryCache",
    "MemoryLayer",
    "MemoryOwner",
    "MultiHeadMemory",
    "TensorMemory",
]
