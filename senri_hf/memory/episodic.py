"""The episodic mechanism: a decaying buffer and a surprise-gated store of hidden states, as functions on data.

Everything here is vectorised over rows, tokens and slots. `episodic_reference` says the same token by token.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..configuration import EpisodicConfig
from .state import RowState


SURPRISE_IMPORTANCE = 0.5
ACCESS_IMPORTANCE = 0.3
AGE_IMPORTANCE = 0.001
EMPTY = -1
# Which slot a token is nearest to, and whether it is more surprising than what a slot holds, is not decided by less:
# copies of a state differ by that, for no other reason than rounding.
GRAIN = 1e-4


@dataclass(frozen=True)
class EpisodicState(RowState):
    """What one layer remembers. B rows, N buffer slots, M store slots, hidden size D.

    Ages count conversations, tags number the tokens of a row's life from 0; a slot with tag -1 was never written.
    """

    buffer: Tensor  # [B, N, D]
    strength: Tensor  # [B, N] in [0, 1]
    buffer_age: Tensor  # [B, N] int64
    buffer_tag: Tensor  # [B, N] int64
    store: Tensor  # [B, M, D]
    surprise: Tensor  # [B, M]
    access: Tensor  # [B, M] attention mass that reads gave to the slot
    store_age: Tensor  # [B, M] int64
    tag: Tensor  # [B, M] int64
    surprise_mean: Tensor  # [B] exponential sums of surprise, its square and the weights so far
    surprise_square: Tensor  # [B]
    surprise_weight: Tensor  # [B]
    tokens: Tensor  # [B] int64, tokens written in this row's life
    boundary: Tensor  # [B] int64, `tokens` when the conversation began

    @classmethod
    def empty(cls, batch_size: int, hidden_size: int, config: EpisodicConfig, device: torch.device) -> "EpisodicState":
        """A memory that has read nothing."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        def never(slots: int) -> Tensor:
            return torch.full((batch_size, slots), EMPTY, dtype=torch.long, device=device)

        slots, stored = config.buffer_slots, config.store_slots
        return cls(
            buffer=zeros(slots, hidden_size),
            strength=zeros(slots),
            buffer_age=zeros(slots, dtype=torch.long),
            buffer_tag=never(slots),
            store=zeros(stored, hidden_size),
            surprise=zeros(stored),
            access=zeros(stored),
            store_age=zeros(stored, dtype=torch.long),
            tag=never(stored),
            surprise_mean=zeros(),
            surprise_square=zeros(),
            surprise_weight=zeros(),
            tokens=zeros(dtype=torch.long),
            boundary=zeros(dtype=torch.long),
        )

    def live_buffer(self, config: EpisodicConfig) -> Tensor:
        """Buffer slots that are written and not forgotten, [B, N]."""
        return (self.buffer_tag != EMPTY) & (self.strength >= config.min_strength)

    def live_store(self) -> Tensor:
        """Store slots that are written, [B, M]."""
        return self.tag != EMPTY

    def importance(self) -> Tensor:
        """What keeps a store slot from being replaced, [B, M]; minus infinity for an empty one."""
        value = (
            SURPRISE_IMPORTANCE * self.surprise
            + ACCESS_IMPORTANCE * torch.log1p(self.access)
            - AGE_IMPORTANCE * self.store_age
        )
        return value.masked_fill(~self.live_store(), -torch.inf)


def cosine(tokens: Tensor, slots: Tensor) -> Tensor:
    """Cosine similarity of tokens [B, S, D] and slots [B, N, D]: [B, S, N]; 0 for a zero vector."""
    length = torch.linalg.vector_norm(slots, dim=-1).clamp_min(1e-12)
    return torch.nn.functional.normalize(tokens, dim=-1) @ slots.transpose(1, 2) / length[:, None]


def first_of_largest(values: Tensor) -> Tensor:
    """The first place [*] of [*, N] whose value is the largest but for rounding."""
    return (values >= values.amax(-1, keepdim=True) - GRAIN).int().argmax(-1)


def nearest_slot(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The largest similarity [B, S] of [B, S, N], and the first slot that has it but for rounding."""
    return similarity.amax(-1), first_of_largest(similarity)


def running_statistics(state: EpisodicState, surprise: Tensor, valid: Tensor, alpha: float) -> tuple[Tensor, ...]:
    """Exponential sums of surprise before every token and after the last one.

    The recurrence m <- (1 - alpha) m + alpha s is unrolled into one product with a triangular matrix of powers.

    Args:
        surprise: [B, S]; `valid` [B, S] holds for the first tokens of a row, as many as it has.

    Returns:
        Sums of s, s^2 and 1, each [B, S + 1]: column t is what stands before token t.
    """
    length = surprise.shape[1]
    position = torch.arange(length + 1, device=surprise.device)
    power = position[:, None] - 1 - position[None, :length]
    kernel = torch.where(power >= 0, alpha * (1 - alpha) ** power.clamp_min(0), 0.0)  # [S + 1, S]
    carried = (1 - alpha) ** position  # [S + 1]
    observed = valid.to(surprise.dtype)
    surprise = surprise * observed
    return tuple(
        before[:, None] * carried + new @ kernel.T
        for before, new in (
            (state.surprise_mean, surprise),
            (state.surprise_square, surprise.square()),
            (state.surprise_weight, observed),
        )
    )


def stage_segment(
    state: EpisodicState,
    hidden: Tensor,
    surprise: Tensor,
    valid: Tensor,
    config: EpisodicConfig,
    in_place: bool = False,
) -> EpisodicState:
    """Write one segment: surprising tokens into the store, novel ones into the buffer.

    Args:
        hidden: [B, S, D], float32. surprise: [B, S]. valid: [B, S], true for the first tokens of a row, as many as it
            has in this segment; a row with none is left as it is.
        in_place: Whether the slots of `state` may be changed, which is then of no more use.
    """
    in_place = in_place and not (torch.is_grad_enabled() and (hidden.requires_grad or state.store.requires_grad))
    number = state.tokens[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
    count = valid.sum(1)
    surprise = surprise.detach().float()
    sums = running_statistics(state, surprise, valid, config.ema_alpha)
    if config.store_slots:
        state = consolidate(state, hidden, surprise, valid, number, sums, config, in_place)
    state = write_buffer(state, hidden, valid, number, config, in_place)
    mean, square, weight = (total.gather(1, count[:, None])[:, 0] for total in sums)
    return replace(
        state, surprise_mean=mean, surprise_square=square, surprise_weight=weight, tokens=state.tokens + count
    )


def surprise_threshold(state: EpisodicState, sums: tuple[Tensor, ...], config: EpisodicConfig) -> tuple[Tensor, ...]:
    """Mean, standard deviation and threshold before every token, each [B, S].

    threshold = mean + z std with z = z_score_threshold (1 + capacity_pressure fullness): pressure raises z, not the
    mean. Without history nothing is surprising: the threshold is infinite.
    """
    total, square, weight = (column[:, :-1] for column in sums)
    known = weight > 0
    mean = total / weight.where(known, 1.0)
    deviation = (square / weight.where(known, 1.0) - mean.square()).clamp_min(0).sqrt()
    fullness = state.live_store().float().mean(1, keepdim=True)
    z = config.z_score_threshold * (1 + config.capacity_pressure * fullness)
    return mean, deviation, torch.where(known, mean + z * deviation, torch.inf)


def consolidate(
    state: EpisodicState,
    hidden: Tensor,
    surprise: Tensor,
    valid: Tensor,
    number: Tensor,
    sums: tuple[Tensor, ...],
    config: EpisodicConfig,
    in_place: bool = False,
) -> EpisodicState:
    """Take the surprising tokens of a segment into the store.

    A token as similar to a slot as `consolidation_similarity` is the same thing: the slot becomes the most surprising
    of them. The others, most surprising first, replace the least important slots, as long as they are more important.
    """
    mean, deviation, threshold = surprise_threshold(state, sums, config)
    live = state.live_store()
    some = slice(max(occupied(live), 1))
    similarity = cosine(hidden.detach(), state.store[:, some]).masked_fill(~live[:, None, some], -2.0)
    nearest, slot = nearest_slot(similarity)
    same = nearest >= config.consolidation_similarity
    if config.contrastive_weight:
        low, high = config.contrastive_similarity, config.consolidation_similarity
        contrast = ((nearest - low) / (high - low)).clamp(0, 1).masked_fill(same, 0)
        surprise = torch.maximum(surprise, mean + config.contrastive_weight * contrast * deviation)
    surprise = torch.where(valid & (surprise > threshold), surprise, -torch.inf)
    if config.span:  # the tokens that follow a surprising one go with it
        ahead = torch.nn.functional.pad(surprise, (config.span, 0), value=-torch.inf)
        surprise = ahead.unfold(1, config.span + 1, 1).amax(-1).masked_fill(~valid, -torch.inf)
    surprising = surprise > -torch.inf

    # Updates: for every slot the most surprising token that is the same thing.
    known = surprising & same
    rival = (slot[:, :, None] == slot[:, None]) & known[:, None]  # [B, S, S]
    best = first_of_largest(torch.where(rival, surprise[:, None], -torch.inf))
    update = known & (best == torch.arange(hidden.shape[1], device=slot.device))
    update = update & (surprise > state.surprise.gather(1, slot) + GRAIN)
    updated = slot.masked_fill(~update, config.store_slots)
    before = state.store
    state = replace(
        state,
        surprise=put(state.surprise, updated, surprise),
        store_age=put(state.store_age, updated, torch.zeros_like(slot)),
        tag=put(state.tag, updated, number),
    )

    # Newcomers: the i-th most surprising one against the i-th least important slot.
    pairs = min(hidden.shape[1], config.store_slots)
    newcomer = surprise.masked_fill(same, -torch.inf)
    value, token = (ranked[:, :pairs] for ranked in newcomer.sort(dim=1, descending=True, stable=True))
    importance, slot = (ranked[:, :pairs] for ranked in state.importance().sort(dim=1, stable=True))
    enters = (value > -torch.inf) & (SURPRISE_IMPORTANCE * value > importance)
    slot = slot.masked_fill(~enters, config.store_slots)
    state = replace(
        state,
        surprise=put(state.surprise, slot, value),
        access=put(state.access, slot, torch.zeros_like(value)),
        store_age=put(state.store_age, slot, torch.zeros_like(slot)),
        tag=put(state.tag, slot, number.gather(1, token)),
    )
    # Every token has one slot at most, and every slot the token whose tag it has: an update may have been replaced.
    written = updated.scatter(1, token, torch.where(enters, slot, updated.gather(1, token)))
    stands = state.tag.gather(1, written.clamp_max(config.store_slots - 1)) == number
    return replace(state, store=put(before, written.masked_fill(~stands, config.store_slots), hidden, in_place))


def write_buffer(
    state: EpisodicState,
    hidden: Tensor,
    valid: Tensor,
    number: Tensor,
    config: EpisodicConfig,
    in_place: bool = False,
) -> EpisodicState:
    """Write a segment into the buffer: known tokens reinforce their nearest slot, novel ones take the weakest slots."""
    live = state.live_buffer(config)
    nearest, slot = nearest_slot(cosine(hidden.detach(), state.buffer).masked_fill(~live[:, None], -2.0))
    known = valid & (nearest >= config.novelty_threshold)
    novel = valid & ~known

    # What is known moves its slot towards the mean of all tokens that are the same thing; the last one stands for them.
    together = (slot[:, :, None] == slot[:, None]) & known[:, None]  # [B, S, S]
    share = together.to(hidden) / together.sum(-1, keepdim=True).clamp_min(1)
    position = torch.arange(hidden.shape[1], device=slot.device)
    last = torch.where(together, position, EMPTY).amax(-1) == position
    reinforced = slot.masked_fill(~(known & last), config.buffer_slots)
    mean = (share @ hidden).to(state.buffer.dtype)  # under autocast it is not
    moved = torch.lerp(take(state.buffer, slot), mean, config.write_alpha)
    state = replace(
        state,
        buffer=put(state.buffer, reinforced, moved, in_place),
        strength=put(state.strength, reinforced, torch.ones_like(nearest)),
        buffer_age=put(state.buffer_age, reinforced, torch.zeros_like(slot)),
        buffer_tag=put(state.buffer_tag, reinforced, number),
    )

    # Weakest first; among equals the one that was written longest ago.
    oldest = state.buffer_tag.argsort(dim=1, stable=True)
    weakest = oldest.gather(1, state.strength.gather(1, oldest).argsort(dim=1, stable=True))
    rank = novel.cumsum(1) - 1
    slot = weakest.gather(1, rank.clamp_min(0)).masked_fill(~novel, config.buffer_slots)
    return replace(
        state,
        buffer=put(state.buffer, slot, hidden, in_place),
        strength=put(state.strength, slot, torch.ones_like(slot, dtype=state.strength.dtype)),
        buffer_age=put(state.buffer_age, slot, torch.zeros_like(slot)),
        buffer_tag=put(state.buffer_tag, slot, number),
    )


def add_access(state: EpisodicState, access: Tensor, read_tag: Tensor) -> EpisodicState:
    """Count reads of the store.

    Args:
        access: [B, M] attention mass that each slot received. read_tag: [B, M] tags of the slots when they were read:
            a slot that holds something else by now was not read.
    """
    return replace(state, access=state.access + access.where(read_tag == state.tag, 0.0))


def pass_cycles(state: EpisodicState, cycles: Tensor | int, config: EpisodicConfig) -> EpisodicState:
    """Let conversations pass: strength <- strength * decay_rate^cycles; everything gets older.

    Args:
        cycles: Number of conversations, or [B] of them.
    """
    cycles = torch.as_tensor(cycles, device=state.tokens.device).expand_as(state.tokens)[:, None]
    return replace(
        state,
        strength=state.strength * config.decay_rate ** cycles.to(state.strength.dtype),
        buffer_age=state.buffer_age + cycles,
        store_age=state.store_age + cycles,
    )


def end_conversation(state: EpisodicState, config: EpisodicConfig) -> EpisodicState:
    """One cycle for every row that was written since the last boundary."""
    written = (state.tokens > state.boundary).long()
    return replace(pass_cycles(state, written, config), boundary=state.tokens)


def take(hidden: Tensor, token: Tensor) -> Tensor:
    """Rows' tokens [B, K] out of hidden [B, S, D]: [B, K, D]."""
    return hidden.gather(1, expand(token, hidden.shape[-1]))


def occupied(live: Tensor) -> int:
    """How many of the first slots hold all that slots [B, N] hold.

    All of them, where asking would keep a device, and where rows must not change one another's rounding: several rows
    are looked at together in training only.
    """
    together = live.shape[0] > 1 and not torch.is_grad_enabled()
    if together or live.device.type != "cpu" or torch.compiler.is_compiling():
        return live.shape[1]
    return int((live * torch.arange(1, live.shape[1] + 1)).max()) if live.numel() else 0


def put(slots: Tensor, slot: Tensor, values: Tensor, in_place: bool = False) -> Tensor:
    """Slots [B, N, ...], or a copy of them, with values [B, K, ...] at slot [B, K]; index N writes nowhere."""
    written = slot < slots.shape[1]
    if in_place:
        row, token = written.nonzero(as_tuple=True)
        slots[row, slot[row, token]] = values[row, token].to(slots.dtype)
        return slots
    # What writes nowhere repeats the row's first write or, where there is none, what slot 0 holds: no second copy of
    # all slots is made. Only one of the same gets a gradient.
    some, first = written.any(1, keepdim=True), written.int().argmax(1, keepdim=True)
    own = written | (~some & (torch.arange(slot.shape[1], device=slot.device) == 0))
    slot = torch.where(written, slot, torch.where(some, slot.gather(1, first), 0))
    if slots.dim() == 3:
        slot, first, own, some = (expand(part, slots.shape[-1]) for part in (slot, first, own, some))
    values = values.to(slots.dtype)
    repeated = torch.where(some, values.gather(1, first), slots[:, :1])
    return slots.scatter(1, slot, torch.where(own, torch.where(some, values, repeated), repeated.detach()))


def expand(index: Tensor, size: int) -> Tensor:
    """[B, K] to [B, K, size]."""
    return index[..., None].expand(-1, -1, size)
