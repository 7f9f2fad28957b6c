"""Which tokens of a conversation stay, when their keys and values are the memory."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..configuration.attention_memory import AttentionMemoryConfig
from .state import RowState


# Multiplier of the hash that stands for chance: 2^32 over the golden ratio (Knuth, TAOCP 3, 6.4).
HASH = 2654435769


@dataclass(frozen=True)
class Slots(RowState):
    """What is known of the tokens that memory holds, oldest first; rows with fewer of them have theirs at the end."""

    token: Tensor  # [B, M] int64, id in the vocabulary
    number: Tensor  # [B, M] int64, how many tokens the row had taken in before it
    conversation: Tensor  # [B, M] int64, how many conversations the row had had before it
    surprise: Tensor  # [B, M] float32, -log p in nats
    importance: Tensor  # [B, M] float32, what is left of it
    live: Tensor  # [B, M] bool
    tokens: Tensor  # [B] int64, tokens taken in
    conversations: Tensor  # [B] int64, conversations in which some were

    @classmethod
    def empty(cls, batch: int, slots: int, device: torch.device) -> "Slots":
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        return cls(
            token=zeros(slots),
            number=zeros(slots),
            conversation=zeros(slots),
            surprise=zeros(slots, dtype=torch.float32),
            importance=zeros(slots, dtype=torch.float32),
            live=zeros(slots, dtype=torch.bool),
            tokens=zeros(),
            conversations=zeros(),
        )

    @property
    def size(self) -> int:
        return self.token.shape[1]


@dataclass(frozen=True)
class Said(RowState):
    """The tokens of a conversation: T columns, of which memory takes in those that are `written`."""

    token: Tensor  # [B, T] int64
    surprise: Tensor  # [B, T] float32
    written: Tensor  # [B, T] bool
    same: Tensor  # [B, T] int64, the slot that holds the same already; -1 for none
    read: Tensor  # [B, M] float32, the attention that each slot got, in tokens' whole attention


def consolidate(slots: Slots, said: Said, config: AttentionMemoryConfig) -> tuple[Slots, Tensor]:
    """End a conversation.

    Returns:
        The new slots and where each comes from, [B, M]: a column of the old slots followed by the conversation's.

    Raises:
        ValueError: with `policy="all"`, when not everything fits.
    """
    written = said.written
    rank = written.long().cumsum(1) - 1
    happened = written.any(1)
    new = Slots(
        token=said.token,
        number=slots.tokens[:, None] + rank,
        conversation=slots.conversations[:, None].expand_as(rank),
        surprise=said.surprise,
        importance=spread(said.surprise, written, rank, config.span),
        live=written,
        tokens=slots.tokens + written.sum(1),
        conversations=slots.conversations + happened.long(),
    )
    old = replace(slots, importance=slots.importance + config.read_gain * said.read)
    old = pass_cycles(old, happened.long(), config)
    old = reinforce(old, new, said.same)
    unknown = written
    if config.policy == "surprise":
        least = max(config.min_surprise, config.min_importance)
        unknown = unknown & (said.same < 0) & (new.importance >= least)
    if config.policy in ("surprise", "random"):
        unknown = best_share(unknown, written, score(new, config), config.keep_share)
    joined = replace(
        new,
        **{
            name: torch.cat([getattr(old, name), getattr(new, name)], dim=1)
            for name in ("token", "number", "conversation", "surprise", "importance")
        },
        live=torch.cat([old.live, unknown | (written & (new.number < config.sinks))], dim=1),
    )
    return keep_best(joined, config)


def pass_cycles(slots: Slots, cycles: Tensor | int, config: AttentionMemoryConfig) -> Slots:
    """Let conversations pass, a number or [B] of them: importance fades, and what has none left is forgotten."""
    cycles = torch.as_tensor(cycles, device=slots.tokens.device).expand_as(slots.tokens)[:, None]
    importance = slots.importance * config.decay_rate ** cycles.to(slots.importance.dtype)
    fades = config.policy == "surprise"
    live = slots.live & ((importance >= config.min_importance) | (slots.number < config.sinks) | (not fades))
    return replace(slots, importance=importance, live=live)


def spread(surprise: Tensor, written: Tensor, rank: Tensor, span: int) -> Tensor:
    """The surprise [B, T] of a token or of one of the `span` written ones before it, whichever is more."""
    if span == 0 or not surprise.shape[1]:
        return surprise
    # Among the written tokens alone, so that padding between them changes nothing.
    order = (~written).long().argsort(dim=1, stable=True)
    packed = surprise.gather(1, order).masked_fill(~written.gather(1, order), 0.0)
    packed = torch.nn.functional.pad(packed, (span, 0))
    highest = packed.unfold(1, span + 1, 1).amax(-1)
    return highest.gather(1, rank.clamp_min(0))


def reinforce(old: Slots, new: Slots, same: Tensor) -> Slots:
    """Slots that were said again become as important as the new saying."""
    if not old.size or not same.shape[1]:
        return old
    again = same >= 0
    importance = torch.nn.functional.pad(old.importance, (0, 1)).scatter_reduce(
        1, torch.where(again, same, old.size), torch.where(again, new.importance, 0.0), reduce="amax"
    )
    return replace(old, importance=importance[:, :-1])


def score(slots: Slots, config: AttentionMemoryConfig) -> Tensor:
    """What stays when not everything can: the highest scores, [B, M]."""
    if config.policy == "surprise":
        return slots.importance
    if config.policy == "random":
        return ((slots.number * HASH + slots.token * HASH * 31) % 2**32).float()
    return slots.number.float()


def best_share(eligible: Tensor, written: Tensor, scores: Tensor, share: float) -> Tensor:
    """Of the eligible tokens [B, T] those with the highest scores, as many as `share` of the written ones."""
    scores = scores.masked_fill(~eligible, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return eligible & (place < (written.sum(1, keepdim=True) * share).ceil())


def keep_best(slots: Slots, config: AttentionMemoryConfig) -> tuple[Slots, Tensor]:
    """The best of the live slots in their order, as many as there may be, and which they were, [B, M]."""
    if config.policy == "all":
        most = int(slots.live.sum(1).max())
        if most > config.slots:
            raise ValueError(
                f"policy='all' keeps everything, but {most} tokens do not fit into slots={config.slots}; make the "
                "memory with more slots, or with another policy. The conversation is still open: take the last tokens "
                "back with forget(last=n), or begin anew with reset_memory()"
            )
    scores = score(slots, config).masked_fill(slots.number < config.sinks, torch.inf)
    scores = scores.masked_fill(~slots.live, -torch.inf)
    # Stable, as a token is exactly as important as the one that it goes with: of equals the older ones stay.
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : config.slots]
    live = slots.live.gather(1, best)
    ordered = torch.where(live, best, -1).sort(dim=1).values
    width = int(live.sum(1).max()) if live.numel() else 0
    index = ordered[:, ordered.shape[1] - width :]
    live, index = index >= 0, index.clamp_min(0)
    columns = ("token", "number", "conversation", "surprise", "importance")
    kept = {name: getattr(slots, name).gather(1, index).masked_fill(~live, 0) for name in columns}
    return replace(slots, **kept, live=live), index
