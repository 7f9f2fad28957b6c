"""What a compressive memory holds for the rows of a batch: slots, and how tokens are told off to them."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from .compressive import Reads, UpdateRule, read, read_and_write, write_together
from .state import RowState


@dataclass(frozen=True)
class MemoryShape:
    """What a compressive memory is made of.

    Attributes:
        rule: How it is written.
        heads, key_dim, value_dim: Its heads and their sizes.
        slots: Memories per head; each takes `slot_tokens` tokens before the next one is opened.
        segment: Tokens between updates.
        tail_columns, tail_channels: Columns and channels that a convolution before it needs of the tokens before.
    """

    rule: UpdateRule
    heads: int
    key_dim: int
    value_dim: int
    slots: int = 1
    slot_tokens: int = 512
    segment: int = 1
    tail_columns: int = 0
    tail_channels: int = 0


@dataclass(frozen=True)
class CompressiveState(RowState):
    """What one layer remembers. B rows, N slots, H heads. The floats are float32 whatever the model's dtype is."""

    memory: Tensor  # [B, N, H, d_k, d_v]
    normaliser: Tensor  # [B, N, H, d_k]
    frozen: Tensor  # [B, N] bool, slots that are read and not written
    slot: Tensor  # [B] int64, the open slot
    filled: Tensor  # [B] int64, tokens that the open slot took
    tokens: Tensor  # [B] int64, tokens written in this row's life

    @classmethod
    def empty(cls, batch_size: int, shape: MemoryShape, device: torch.device) -> "CompressiveState":
        """A memory that has read nothing."""

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(batch_size, *sizes, dtype=dtype, device=device)

        return cls(
            memory=zeros(shape.slots, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32),
            normaliser=zeros(shape.slots, shape.heads, shape.key_dim, dtype=torch.float32),
            frozen=zeros(shape.slots, dtype=torch.bool),
            slot=zeros(),
            filled=zeros(),
            tokens=zeros(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory and normaliser; counters and flags are not counted."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.memory, self.normaliser))

    @property
    def is_blank(self) -> bool:
        """Whether nothing was ever written, and no slot imported."""
        return not bool(self.tokens.any()) and not bool(self.memory.any())

    def freeze(self, slots: list[int], *, frozen: bool) -> Self:
        """With slots that from now on are only read, or are written again. An open slot that is frozen is closed."""
        flags = self.frozen.clone()
        flags[:, slots] = frozen
        state = replace(self, frozen=flags)
        here = flags.gather(1, self.slot[:, None])[:, 0]
        return replace(state, slot=torch.where(here, next_open(state), self.slot), filled=self.filled.where(~here, 0))

    def keep_frozen(self) -> Self:
        """The frozen slots and a life that begins."""
        kept = self.frozen[:, :, None, None]
        state = replace(
            self,
            memory=self.memory.where(kept[..., None], 0.0),
            normaliser=self.normaliser.where(kept, 0.0),
            slot=torch.zeros_like(self.slot),
            filled=torch.zeros_like(self.filled),
            tokens=torch.zeros_like(self.tokens),
        )
        return replace(state, slot=next_open(state))

    def put(self, slots: list[int], memory: Tensor, normaliser: Tensor) -> Self:
        """With memory [B, K, H, d_k, d_v] and normaliser [B, K, H, d_k] in K slots, frozen ones too."""
        whole, keys = self.memory.clone(), self.normaliser.clone()
        whole[:, slots], keys[:, slots] = memory, normaliser
        return replace(self, memory=whole, normaliser=keys)


@dataclass(frozen=True)
class Associations(RowState):
    """What tokens write: B rows, streams of L tokens that stand together (see `Layout`), in a pass of T columns."""

    keys: Tensor  # [B, L, H, d_k] features
    values: Tensor  # [B, L, H, d_v]
    strength: Tensor  # [B, L, H], and zero heads with rules that have none
    log_decay: Tensor  # [B, L, H], and zero heads with rules that have none
    raw: Tensor  # [B, L, channels] what a convolution takes in, and zero channels where there is none
    written: Tensor  # [B, L] bool
    valid: Tensor  # [B, L] bool
    real: Tensor  # [B, T] bool

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def first(self, columns: int) -> "Associations":
        """Those of the first columns of the pass."""
        left = torch.arange(columns, device=self.real.device) < self.taken(columns)
        kept = self.map(lambda tensor: tensor[:, :columns])
        return replace(kept, written=kept.written & left, valid=kept.valid & left)

    def taken(self, columns: int) -> Tensor:
        """[B, 1] how many tokens the first columns of the pass hold."""
        return self.real[:, :columns].sum(1, keepdim=True)

    def last(self, columns: int) -> "Associations":
        """Those of the last columns of the pass, as a copy: a view would keep the others alive."""
        index = self.taken(self.columns - columns) + torch.arange(columns, device=self.real.device)
        there = index < self.valid.sum(1, keepdim=True)
        kept = self.map(lambda tensor: take(tensor, index))
        return replace(kept, written=kept.written & there, valid=there, real=self.real[:, -columns:].clone())


def opening_order(state: CompressiveState) -> Tensor:
    """[B, N] the slots in the order in which they are opened, from the open one on; frozen ones last."""
    slots = state.frozen.shape[1]
    number = torch.arange(slots, device=state.frozen.device)
    return ((number - state.slot[:, None]) % slots + slots * state.frozen).argsort(1)


def next_open(state: CompressiveState) -> Tensor:
    """[B] the first slot from the open one on that is not frozen; any where all are."""
    return opening_order(state)[:, 0]


def assign(state: CompressiveState, written: Tensor, shape: MemoryShape) -> tuple[Tensor, CompressiveState]:
    """Which slot takes which token, and the counters after that.

    Args:
        written: [B, L] bool.

    Returns:
        [B, N, L] bool, at most one slot for every token; the state with counters moved on, its memory as it was.
    """
    number = torch.arange(shape.slots, device=written.device)
    written = written & ~state.frozen.all(1, keepdim=True)
    count = written.sum(1)
    tokens = state.tokens + count
    if shape.slots == 1:
        return written[:, None], replace(state, tokens=tokens, filled=state.filled + count)
    order = opening_order(state)
    usable = (~state.frozen).sum(1, keepdim=True).clamp_min(1)
    index = state.filled[:, None] + written.cumsum(1) - written.long()
    target = order.gather(1, index // shape.slot_tokens % usable)
    where = (target[:, None] == number[:, None]) & written[:, None]
    total = state.filled + count
    slot = order.gather(1, total[:, None] // shape.slot_tokens % usable)[:, 0]
    return where, replace(state, tokens=tokens, slot=slot, filled=total % shape.slot_tokens)


def advance(
    state: CompressiveState, queries: Tensor, tokens: Associations, shape: MemoryShape, sharpness: Tensor | None
) -> tuple[Tensor, CompressiveState]:
    """Read with every token and write it, for segments of one token.

    Args:
        queries: [B, L, H, d_k] features.
        sharpness: [H] how strongly a query prefers the slot that it fits; None where there is one slot.

    Returns:
        Reads [B, L, H, d_v], and the state after the last token.
    """
    where, after = assign(state, tokens.written, shape)
    mask = where[:, :, None, :, None]  # [B, N, 1, L, 1]
    keys, values = by_head(tokens.keys) * mask, by_head(tokens.values) * mask
    gated = tokens.strength.shape[-1] > 0
    log_decay = tokens.log_decay.transpose(1, 2)[:, None] * mask[..., 0] if gated else None
    reads, memory, normaliser = read_and_write(
        state.memory,
        state.normaliser,
        by_head(queries).expand(-1, shape.slots, -1, -1, -1),
        keys,
        values,
        shape.rule,
        tokens.strength.transpose(1, 2)[:, None].expand(-1, shape.slots, -1, -1) if gated else None,
        log_decay,
        with_norm=shape.slots > 1,
    )
    return mix(reads, queries, sharpness), replace(after, memory=memory, normaliser=normaliser)


def look_up(state: CompressiveState, queries: Tensor, shape: MemoryShape, sharpness: Tensor | None) -> Tensor:
    """Read only: queries [B, L, H, d_k] of one and the same memory, [B, L, H, d_v]."""
    return mix(read(state.memory, state.normaliser, by_head(queries), shape.rule), queries, sharpness)


def take_in(state: CompressiveState, tokens: Associations, shape: MemoryShape) -> CompressiveState:
    """Write tokens that all find the memory as it is: a whole segment."""
    where, after = assign(state, tokens.written, shape)
    mask = where[:, :, None, :, None]
    memory, normaliser = write_together(
        state.memory, state.normaliser, by_head(tokens.keys) * mask, by_head(tokens.values) * mask, shape.rule
    )
    return replace(after, memory=memory, normaliser=normaliser)


def by_head(columns: Tensor) -> Tensor:
    """[B, L, H, d] to [B, 1, H, L, d]."""
    return columns.transpose(1, 2)[:, None]


def mix(reads: Reads, queries: Tensor, sharpness: Tensor | None) -> Tensor:
    """What the slots give together, [B, L, H, d_v]: a softmax over how well the query fits what was written to each.

    The score of slot i is sharpness * cos(q, z_i), z_i the slot's normaliser; a slot without writes is left out.
    """
    if sharpness is None:
        return reads.values[:, 0].transpose(1, 2)
    assert reads.norm is not None
    with torch.autocast(queries.device.type, enabled=False):
        length = by_head(queries.float()).square().sum(-1).clamp_min(1e-12).sqrt()
        cosine = reads.match / (length * reads.norm.clamp_min(1e-6))
        written = reads.norm > 0  # [B, N, H, L]
        score = (sharpness.float()[:, None] * cosine).masked_fill(~written, torch.finfo(torch.float32).min)
        weight = score.softmax(1) * written
        return (weight[..., None] * reads.values).sum(1).transpose(1, 2)


def take(columns: Tensor, index: Tensor) -> Tensor:
    """Row by row the columns index [B, K] of columns [B, L, ...]; an index past the end takes the last one."""
    row = torch.arange(columns.shape[0], device=columns.device)[:, None]
    return columns[row, index.clamp_max(columns.shape[1] - 1)]
