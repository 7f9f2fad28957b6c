"""Tensor memory: heads that are handed in as instances, each with settings of its own, and their memory together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..configuration.tensor_memory import TensorMemoryHeadConfig
from .compressive import UpdateRule, elu_features
from .compressive_layer import Progress, Step
from .compressive_state import Associations, MemoryShape
from .layout import Layout


class TensorMemory(nn.Module):
    """One head: what its features are and how its matrix is written. What it holds is in the cache.

    Args:
        config: The head's settings.
    """

    def __init__(self, config: TensorMemoryHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.rule = UpdateRule(
            "delta" if config.use_delta_rule else "additive",
            eps=config.eps,
            decay=config.decay,
            max_delta=config.max_delta,
            max_memory=config.max_memory,
            max_norm=config.max_norm,
        )

    def forward(self, projected: Tensor) -> Tensor:
        """sigma(x) = ELU(x) + 1: the features [..., dim] of queries and of keys."""
        return elu_features(projected)

    def extra_repr(self) -> str:
        """The head's settings, for `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in vars(self.config).items() if value is not None)


class HeadGroup(NamedTuple):
    """Heads of equal settings, which are computed as one tensor."""

    heads: tuple[int, ...]  # their places in the layer
    memory: TensorMemory  # the first of them
    shape: MemoryShape


class MultiHeadMemory(nn.Module):
    """The memory of a layer: every head reads with its queries, then writes its keys and values.

    Heads of the same class and equal settings are one batched tensor; others are computed apart.

    Args:
        memories: The heads, in the order in which they divide a projection.

    Raises:
        ValueError: for no heads, or for what is no `TensorMemory`.
    """

    def __init__(self, memories: list[TensorMemory]) -> None:
        super().__init__()
        if not memories or not all(isinstance(memory, TensorMemory) for memory in memories):
            raise ValueError(f"{memories!r} was given, but memories must be a list of at least one TensorMemory")
        self.memories = nn.ModuleList(memories)
        self.dims = [memory.config.dim for memory in memories]
        alike: dict[TensorMemoryHeadConfig | TensorMemory, list[int]] = {}
        for place, memory in enumerate(memories):  # a head of a class of its own may have weights of its own
            alike.setdefault(memory.config if type(memory) is TensorMemory else memory, []).append(place)
        self.groups = []
        for heads in alike.values():
            memory = memories[heads[0]]
            dim = memory.config.dim
            shape = MemoryShape(memory.rule, heads=len(heads), key_dim=dim, value_dim=dim)
            self.groups.append(HeadGroup(tuple(heads), memory, shape))

    @property
    def width(self) -> int:
        """Channels of a projection: the sizes of all heads together."""
        return sum(self.dims)

    @property
    def shapes(self) -> tuple[MemoryShape, ...]:
        """What the groups' memories are made of."""
        return tuple(group.shape for group in self.groups)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        points: tuple[Progress, ...] | None,
        layout: Layout,
        writes: bool,
    ) -> tuple[Tensor, tuple[Step, ...]]:
        """Read with every token, then write it.

        Args:
            queries, keys, values: Projected streams [R, L, width], before any feature map.
            points: Where the conversation stands in every group; None for its start, without a cache.
            layout: Which of the columns are real.
            writes: Whether the tokens are written.

        Returns:
            What was read [R, L, width] in float32, and for every group what is to be committed to the cache layer.
        """
        reads, steps = [], []
        parts = zip(self.split(queries), self.split(keys), self.split(values), strict=True)
        for index, (group, (q, k, v)) in enumerate(zip(self.groups, parts, strict=True)):
            carried = points is not None
            if points is None:
                point = Progress.begin(q.shape[0], group.shape, q.device, commits=False)
            else:
                point = points[index]
            none = v[..., :0, 0]  # of strengths and decays that depend on the token, and of a convolution
            tokens = Associations(group.memory(k), v.float(), none, none, none, layout.valid, layout.valid, layout.real)
            read, step = point.over(group.memory(q), tokens, group.shape, None, writes=writes, carried=carried)
            reads.append(read)
            steps.append(step)
        return self.join(reads), tuple(steps)

    def split(self, projected: Tensor) -> list[Tensor]:
        """[R, L, width] to [R, L, heads, dim] of every group."""
        if len(self.groups) == 1:
            return [projected.unflatten(-1, (len(self.dims), -1))]
        heads = projected.split(self.dims, dim=-1)
        return [torch.stack([heads[place] for place in group.heads], dim=-2) for group in self.groups]

    def join(self, reads: list[Tensor]) -> Tensor:
        """The groups' [R, L, heads, dim] to [R, L, width]."""
        if len(self.groups) == 1:
            return reads[0].flatten(-2)
        heads: dict[int, Tensor] = {}
        for group, read in zip(self.groups, reads, strict=True):
            heads.update(zip(group.heads, read.unbind(-2), strict=True))
        return torch.cat([heads[place] for place in range(len(self.dims))], dim=-1)
