"""The episodic mechanism as its formulas say it: row by row, token by token, slot by slot.

For reading, and for tests to hold `episodic` and `EpisodicReader` against; nothing else imports it.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..configuration import EpisodicConfig
from .episodic import (
    ACCESS_IMPORTANCE,
    AGE_IMPORTANCE,
    EMPTY,
    GRAIN,
    SURPRISE_IMPORTANCE,
    EpisodicState,
)
from .episodic_reader import CONVERSATIONS, EpisodicReader, Reading


def stage_segment(
    state: EpisodicState, hidden: Tensor, surprise: Tensor, valid: Tensor, config: EpisodicConfig
) -> EpisodicState:
    """Write one segment, as `episodic.stage_segment` does.

    Args:
        hidden: [B, S, D]. surprise: [B, S]. valid: [B, S], true for the first tokens of a row.
    """
    rows = []
    for index in range(state.batch_size):
        row = state.map(lambda tensor, index=index: tensor[index : index + 1])  # type: ignore[misc]
        length = int(valid[index].sum())
        rows.append(stage_row(row, list(hidden[index, :length]), surprise[index, :length].tolist(), config))
    return EpisodicState(*(torch.cat(parts) for parts in zip(*(row.tensors().values() for row in rows), strict=True)))


def stage_row(
    state: EpisodicState, tokens: list[Tensor], surprise: list[float], config: EpisodicConfig
) -> EpisodicState:
    """Write the tokens of one row's segment into its memory, a state of one row."""
    statistics = [float(x) for x in (state.surprise_mean, state.surprise_square, state.surprise_weight)]
    first = int(state.tokens)
    means, deviations = [], []
    for value in surprise:
        total, square, weight = statistics
        mean = total / weight if weight > 0 else 0.0
        means.append(mean if weight > 0 else math.nan)
        deviations.append(math.sqrt(max(square / weight - mean**2, 0.0)) if weight > 0 else math.nan)
        observed = (value, value**2, 1.0)
        statistics = [
            (1 - config.ema_alpha) * old + config.ema_alpha * new for old, new in zip(statistics, observed, strict=True)
        ]
    if config.store_slots:
        state = consolidate(state, tokens, surprise, means, deviations, first, config)
    state = write_buffer(state, tokens, first, config)
    sums = [torch.tensor([x]) for x in statistics]
    return replace(
        state,
        surprise_mean=sums[0],
        surprise_square=sums[1],
        surprise_weight=sums[2],
        tokens=state.tokens + len(tokens),
    )


def consolidate(
    state: EpisodicState,
    tokens: list[Tensor],
    surprise: list[float],
    means: list[float],
    deviations: list[float],
    first: int,
    config: EpisodicConfig,
) -> EpisodicState:
    """Take surprising tokens into the store; all of them are compared with the store as it was before the segment."""
    filled = [slot for slot in range(config.store_slots) if state.tag[0, slot] != EMPTY]
    z = config.z_score_threshold * (1 + config.capacity_pressure * len(filled) / config.store_slots)
    low, high = config.contrastive_similarity, config.consolidation_similarity

    same: list[int | None] = []  # the slot that holds the same thing as the token
    own: list[float | None] = []  # the token's own surprise, None when it is not surprising
    for token, value, mean, deviation in zip(tokens, surprise, means, deviations, strict=True):
        similarity = {slot: cosine(token, state.store[0, slot]) for slot in filled}
        nearest, largest = first_of_largest(similarity), max(similarity.values(), default=-math.inf)
        is_same = nearest is not None and largest >= high
        same.append(nearest if is_same else None)
        if math.isnan(mean):  # without history nothing is surprising
            own.append(None)
            continue
        if config.contrastive_weight and nearest is not None and not is_same:
            contrast = min(max((largest - low) / (high - low), 0.0), 1.0)
            value = max(value, mean + config.contrastive_weight * contrast * deviation)
        elif config.contrastive_weight:
            value = max(value, mean)
        own.append(value if value > mean + z * deviation else None)

    # A token is as surprising as the most surprising of itself and the `span` tokens before it.
    spread: list[float | None] = []
    for index in range(len(tokens)):
        around = [value for value in own[max(0, index - config.span) : index + 1] if value is not None]
        spread.append(max(around) if around else None)

    store, kept = list(state.store[0]), state.surprise[0].tolist()
    access, age, tag = state.access[0].tolist(), state.store_age[0].tolist(), state.tag[0].tolist()
    for slot in filled:
        claims = {i: value for i, value in enumerate(spread) if value is not None and same[i] == slot}
        claim = first_of_largest(claims)
        if claim is not None and claims[claim] > kept[slot] + GRAIN:
            store[slot], kept[slot], age[slot], tag[slot] = tokens[claim], claims[claim], 0, first + claim

    def importance(slot: int) -> float:
        if slot not in filled:
            return -math.inf
        return (
            SURPRISE_IMPORTANCE * kept[slot]
            + ACCESS_IMPORTANCE * math.log(1 + access[slot])
            - AGE_IMPORTANCE * age[slot]
        )

    newcomers = [(-worth, i) for i, worth in enumerate(spread) if worth is not None and same[i] is None]
    least = sorted((importance(slot), slot) for slot in range(config.store_slots))
    for (negative, index), (worth, slot) in zip(sorted(newcomers), least, strict=False):
        if SURPRISE_IMPORTANCE * -negative > worth:
            store[slot], kept[slot], access[slot], age[slot] = tokens[index], -negative, 0.0, 0
            tag[slot] = first + index
    return replace(
        state,
        store=torch.stack(store)[None],
        surprise=torch.tensor([kept]),
        access=torch.tensor([access]),
        store_age=torch.tensor([age]),
        tag=torch.tensor([tag]),
    )


def write_buffer(state: EpisodicState, tokens: list[Tensor], first: int, config: EpisodicConfig) -> EpisodicState:
    """Reinforce the slots of known tokens; novel ones take the weakest slots, the longest unwritten first."""
    slots, strength = list(state.buffer[0]), state.strength[0].tolist()
    age, tag = state.buffer_age[0].tolist(), state.buffer_tag[0].tolist()
    live = [slot for slot in range(len(slots)) if tag[slot] != EMPTY and state.strength[0, slot] >= config.min_strength]
    hits: dict[int, list[int]] = {}
    novel = []
    for index, token in enumerate(tokens):
        similarity = {slot: cosine(token, slots[slot]) for slot in live}
        nearest = first_of_largest(similarity)
        if nearest is not None and max(similarity.values()) >= config.novelty_threshold:
            hits.setdefault(nearest, []).append(index)
        else:
            novel.append(index)
    for slot, indices in hits.items():
        average = torch.stack([tokens[index] for index in indices]).mean(0)
        slots[slot] = (1 - config.write_alpha) * slots[slot] + config.write_alpha * average
        strength[slot], age[slot], tag[slot] = 1.0, 0, first + indices[-1]
    weakest = sorted(range(len(slots)), key=lambda slot: (strength[slot], tag[slot]))
    for index, slot in zip(novel, weakest, strict=False):
        slots[slot], strength[slot], age[slot], tag[slot] = tokens[index], 1.0, 0, first + index
    return replace(
        state,
        buffer=torch.stack(slots)[None],
        strength=torch.tensor([strength]),
        buffer_age=torch.tensor([age]),
        buffer_tag=torch.tensor([tag]),
    )


def read(reader: EpisodicReader, encoded: Tensor, memory: EpisodicState) -> Reading:
    """What a reader adds to the residual stream and the mass on store slots, as `reader(...)` does.

    Args:
        encoded: [B, T, D], all of the open conversation.
    """
    added, access = [], []
    for row in range(encoded.shape[0]):
        buffered, stored = memory.buffer.shape[1], memory.store.shape[1]
        live = memory.live_buffer(reader.config)[row].tolist() + memory.live_store()[row].tolist()
        ages = memory.buffer_age[row].tolist() + memory.store_age[row].tolist()
        oldest = sorted({age for age, held in zip(ages, live, strict=True) if held})[:CONVERSATIONS][-1:]
        ages = [min([age, *oldest]) for age in ages]  # those before it are taken with it
        slots = reader.norm(torch.cat([memory.buffer[row], memory.store[row]]))
        keys, values = (
            project(slots).unflatten(-1, (reader.num_key_value_heads, -1)) for project in (reader.k_proj, reader.v_proj)
        )
        held = torch.cat([memory.buffer[row], memory.store[row]])
        if reader.k_norm is not None:
            keys = reader.k_norm(keys)
        living = [slot for slot in range(buffered + stored) if live[slot]]
        told = {
            age: topics(reader, held[[slot for slot in living if ages[slot] == age]], reader.told_weight)
            for age in {ages[slot] for slot in living}
        }
        for position, token in enumerate(encoded[row]):
            x = reader.norm(token)
            asked = topics(reader, encoded[row, : position + 1], reader.asked_weight)
            queries = reader.q_proj(x).unflatten(-1, (reader.num_heads, -1))
            if reader.q_norm is not None:
                queries = reader.q_norm(queries)
            heads, mass = [], []
            for head in range(reader.num_heads):
                group = head * reader.num_key_value_heads // reader.num_heads
                share = {
                    age: (
                        reader.topic_scale[head] * (topic * asked).sum(-1).mean()
                        - reader.age_scale[head] * math.log(1 + age)
                    ).exp()
                    for age, topic in told.items()
                }
                scores = []
                for slot in living:
                    score = reader.scale * queries[head] @ keys[slot, group]
                    score = score + (share[ages[slot]] / sum(share.values())).log()
                    if slot < buffered:
                        score = score + reader.strength_scale[head] * memory.strength[row, slot].log()
                    scores.append(score)
                null = reader.scale * queries[head] @ reader.null_key[group] + reader.null_score[head]
                weights = torch.stack([*scores, null]).softmax(0)
                seen = torch.zeros(buffered + stored)
                total = torch.zeros_like(values[0, group])
                for weight, slot in zip(weights, living, strict=False):
                    seen[slot] = weight.detach()
                    total = total + weight * values[slot, group]
                heads.append(reader.gate[head].tanh() * total)
                mass.append(seen[buffered:])
            added.append(reader.o_proj(torch.cat(heads)))
            access.append(torch.stack(mass).mean(0))
    shape = encoded.shape[:2]
    return Reading(torch.stack(added).unflatten(0, shape), torch.stack(access).unflatten(0, shape), None)


def topics(reader: EpisodicReader, tokens: Tensor, weight: torch.nn.Module) -> Tensor:
    """The topics [P, t] of tokens [N, D]: the direction of the weighted mean of their projections."""
    share = weight(tokens).softmax(0)
    projected = reader.topic_proj(tokens).unflatten(-1, (reader.config.num_topics, -1))
    return torch.nn.functional.normalize((share[..., None] * projected).sum(0), dim=-1)


def first_of_largest(values: dict[int, float]) -> int | None:
    """The first key whose value is the largest but for rounding; None for no values."""
    return next((key for key, value in values.items() if value >= max(values.values()) - GRAIN), None)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two vectors; 0 for a zero vector."""
    norms = float(a.detach().norm() * b.detach().norm())
    return float(a.detach() @ b.detach()) / norms if norms > 0 else 0.0
