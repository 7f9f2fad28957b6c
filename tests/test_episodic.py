"""The episodic mechanism: its fast form against its formulas, and what every setting does."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    HIDDEN,
    Subject,
    assert_close,
    assert_identical_memory,
    assert_same_memory,
    feed,
    greedy,
    perturb,
    remembering,
    talk,
    tokens,
)
from torch import Tensor, nn

from senri_hf import EpisodicConfig, MemoryAdapterConfig, MemoryCache
from senri_hf.memory import AttentionWeights, EpisodicReader, episodic, episodic_reference
from senri_hf.memory.episodic import EMPTY, EpisodicState, end_conversation, pass_cycles, stage_segment
from senri_hf.memory.episodic_layer import EpisodicLayer
from senri_hf.memory.episodic_reader import TOPIC_SCALE, MemoryView, Reading
from senri_hf.memory.owner import owners


SIZE = 6
SUBJECT = Subject("llama", "episodic", "default")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no store": {"store_slots": 0},
    "one slot": {"store_slots": 1},
    "eager": {"z_score_threshold": -1.0, "span": 0, "contrastive_weight": 0.0},
    "no contrast": {"contrastive_weight": 0.0},
    "all alike": {"novelty_threshold": 0.2, "consolidation_similarity": 0.4, "contrastive_similarity": 0.0},
    "long span": {"span": 4, "ema_alpha": 0.9},
    "no floor": {"min_strength": 0.0, "write_alpha": 1.0, "decay_rate": 0.3},
}


def settings_of(**changes: Any) -> EpisodicConfig:
    """A small mechanism in which everything happens on few tokens."""
    small: dict[str, Any] = {
        "buffer_slots": 7,
        "store_slots": 4,
        "segment_length": 7,
        "min_strength": 0.3,
        "decay_rate": 0.7,
        "novelty_threshold": 0.9,
        "consolidation_similarity": 0.9,
        "contrastive_similarity": 0.3,
        "z_score_threshold": 0.3,
    }
    config = EpisodicConfig(**{**small, **changes})
    config.validate()
    return config


def blank(config: EpisodicConfig, rows: int = 1, size: int = SIZE) -> EpisodicState:
    return EpisodicState.empty(rows, size, config, torch.device("cpu"))


def vectors(rows: int, length: int, generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Random tokens, some of which are near to one another."""
    centres = torch.randn(3, size, generator=generator)
    kind = torch.randint(0, 4, (rows, length), generator=generator)
    noise = torch.randn(rows, length, size, generator=generator)
    near = centres[kind.clamp_max(2)] + noise * torch.rand(rows, length, 1, generator=generator) * 0.8
    return nn.functional.rms_norm(torch.where((kind == 3)[..., None], noise, near), (size,))


def history(config: EpisodicConfig, seed: int, rows: int = 3, segments: int = 4) -> EpisodicState:
    """A memory with a past, that reads have counted and conversations have passed."""
    generator = torch.Generator().manual_seed(seed)
    state = blank(config, rows)
    for _ in range(segments):
        state = stage_segment(state, *segment(config, generator, rows), config)
        state = end_conversation(state, config)
        state = replace(state, access=state.access + torch.rand(state.access.shape, generator=generator))
    return state


def segment(config: EpisodicConfig, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their surprise, and which of them a row has."""
    length = int(torch.randint(1, config.segment_length + 1, (), generator=generator))
    counts = torch.randint(0, length + 1, (rows, 1), generator=generator)
    surprise = torch.rand(rows, length, generator=generator) * 2
    return vectors(rows, length, generator), surprise, torch.arange(length) < counts


# The formulas.


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=12)
def test_staging_a_segment_is_what_the_formulas_say(variant: str, seed: int) -> None:
    """Values, and gradients to what is written and to what was there."""
    config = settings_of(**VARIANTS[variant])
    generator = torch.Generator().manual_seed(20_000 + seed)
    state = history(config, seed, segments=seed % 4)
    hidden, surprise, valid = segment(config, generator, 3)
    given_, held = hidden.requires_grad_(), state.buffer.clone().requires_grad_()
    stored = state.store.clone().requires_grad_()
    state = replace(state, buffer=held, store=stored)
    fast = stage_segment(state, given_, surprise, valid, config)
    plain = episodic_reference.stage_segment(state, given_, surprise, valid, config)
    assert_same_memory(fast.tensors(), plain.tensors())
    weight, other = torch.randn(fast.buffer.shape), torch.randn(fast.store.shape)
    gradients = [
        torch.autograd.grad(
            (s.buffer * weight).sum() + (s.store * other).sum(), [given_, held, stored], allow_unused=True
        )
        for s in (fast, plain)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        zero = torch.zeros(())
        assert_close(*(zero if g is None or not g.abs().sum() else g for g in (ours, theirs)), "gradient")


READERS: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 4, "groups": 2},
    "full": {"heads": 2, "groups": 2, "rank": None},
    "one key head": {"heads": 4, "groups": 1, "norms": True},
}


def reader_of(config: EpisodicConfig, kind: str, size: int = 8) -> EpisodicReader:
    """A reader whose every weight is random."""
    shape = READERS[kind]
    heads, groups, head_size = shape["heads"], shape["groups"], 4
    torch.manual_seed(0)
    attention = AttentionWeights(
        q=torch.randn(heads * head_size, size) * 0.5,
        k=torch.randn(groups * head_size, size) * 0.5,
        v=torch.randn(groups * head_size, size) * 0.5,
        o=torch.randn(size, heads * head_size) * 0.5,
        num_heads=heads,
        num_key_value_heads=groups,
        scale=0.5,
        biases={name: torch.randn(n * head_size) for name, n in (("q", heads), ("k", groups), ("v", groups))},
        q_norm=nn.RMSNorm(head_size) if shape.get("norms") else None,
        k_norm=nn.RMSNorm(head_size) if shape.get("norms") else None,
    )
    config = replace(config, rank=shape.get("rank", 3), predictor_rank=4)
    reader = EpisodicReader(config, nn.RMSNorm(size), attention)
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return reader


def read(reader: EpisodicReader, tokens: Tensor, state: EpisodicState) -> Reading:
    """What a conversation's first tokens read."""
    real = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return reader(tokens, reader.project(state), reader.asked_parts(tokens, real).cumsum(1))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("store_slots", [4, 0])
@given(seed=st.integers(0, 10_000))
def test_a_read_is_what_the_formulas_say(kind: str, store_slots: int, seed: int) -> None:
    """What is added, the mass on store slots, and gradients to the reader, to what asks and to what is held."""
    config = settings_of(store_slots=store_slots)
    reader, generator = reader_of(config, kind), torch.Generator().manual_seed(seed)
    state = blank(config, 2, 8)
    for _ in range(1 + seed % 4):
        length = 1 + seed % 6
        valid = torch.arange(length) < torch.tensor([[length], [seed % (length + 1)]])
        surprise = torch.rand(2, length, generator=generator)
        state = end_conversation(
            stage_segment(state, vectors(2, length, generator, 8), surprise, valid, config), config
        )
    asked = vectors(2, 3, generator, 8).requires_grad_()
    held = state.buffer.clone().requires_grad_()
    state = replace(state, buffer=held)
    fast, plain = read(reader, asked, state), episodic_reference.read(reader, asked, state)
    assert_close(fast.added, plain.added, "read")
    assert_close(fast.access, plain.access, "access")
    learned = {name: p for name, p in reader.named_parameters() if "predictor" not in name}
    weight = torch.randn(fast.added.shape)
    ours, theirs = (
        torch.autograd.grad((out.added * weight).sum(), [asked, held, *learned.values()], allow_unused=True)
        for out in (fast, plain)
    )
    for name, a, b in zip(["tokens", "slots", *learned], ours, theirs, strict=True):
        shape = next((g for g in (a, b) if g is not None), torch.zeros(())).shape
        assert_close(*(torch.zeros(shape) if g is None else g for g in (a, b)), f"gradient of {name}", 1e-3)


def of_ages(state: EpisodicState, seed: int, most: int) -> EpisodicState:
    """The same slots, written in conversations up to `most` ago."""
    generator = torch.Generator().manual_seed(seed)
    ages = {name: torch.randint(0, most, getattr(state, name).shape, generator=generator)
            for name in ("buffer_age", "store_age")}  # fmt: skip
    return replace(state, **ages)


@given(seed=st.integers(0, 10_000))
def test_conversations_are_told_apart_however_long_ago_they_were(seed: int) -> None:
    config = settings_of(store_slots=60, buffer_slots=30)
    reader, generator = reader_of(config, next(iter(READERS))), torch.Generator().manual_seed(seed)
    held = torch.randn(2, 90, 8, generator=generator)
    state = replace(blank(config, 2, 8), buffer=held[:, :30], store=held[:, 30:], strength=torch.ones(2, 30))
    state = replace(state, tag=torch.arange(60).expand(2, -1), buffer_tag=torch.arange(30).expand(2, -1))
    asked = vectors(2, 2, generator, 8)
    far = of_ages(state, seed, 1000)  # more conversations than are told apart: the oldest are taken together
    for memory in (far, of_ages(state, seed, 40)):
        fast, plain = read(reader, asked, memory), episodic_reference.read(reader, asked, memory)
        assert_close(fast.added, plain.added, "read")
    reader.age_scale.data.zero_()  # then only what order they came in counts
    near = of_ages(state, seed, 40)
    older = replace(near, buffer_age=near.buffer_age + 500, store_age=near.store_age + 500)
    assert_close(read(reader, asked, near).added, read(reader, asked, older).added, "read")


# What the mechanism promises.


def put_tokens(state: EpisodicState, hidden: Tensor, surprise: list[float], config: EpisodicConfig) -> EpisodicState:
    """One row's tokens [S, D] with their surprise, written as one segment."""
    valid = torch.ones(1, len(surprise), dtype=torch.bool)
    return stage_segment(state, hidden[None], torch.tensor([surprise]), valid, config)


def basis(*numbers: int) -> Tensor:
    """Tokens that have nothing to do with one another, [S, D]."""
    return torch.eye(12)[list(numbers)]


def test_importance_orders_by_surprise_access_and_age() -> None:
    """0.5 surprise + 0.3 log(1 + access) - 0.001 age; an empty slot is below everything."""
    config = settings_of(store_slots=5)
    state = replace(
        blank(config),
        tag=torch.tensor([[0, 1, 2, 3, EMPTY]]),
        surprise=torch.tensor([[1.0, 2.0, 1.0, 1.0, 9.0]]),
        access=torch.tensor([[0.0, 0.0, math.e - 1, 0.0, 0.0]]),
        store_age=torch.tensor([[0, 0, 0, 100, 0]]),
    )
    expected = [0.5, 1.0, 0.8, 0.4, -math.inf]
    assert state.importance()[0].tolist() == pytest.approx(expected)


def test_a_stored_thing_gives_way_only_to_something_more_important() -> None:
    """Less surprising than the least important slot is left out, more surprising replaces that slot and no other."""
    config = settings_of(
        store_slots=2, span=0, z_score_threshold=-9.0, capacity_pressure=0.0, contrastive_weight=0.0, buffer_slots=12
    )
    state = put_tokens(blank(config, size=12), basis(0, 1, 2), [0.0, 3.0, 5.0], config)
    assert state.tag.tolist() == [[2, 1]]
    weaker = put_tokens(state, basis(3), [2.5], config)
    assert torch.equal(weaker.store, state.store) and torch.equal(weaker.tag, state.tag)
    stronger = put_tokens(state, basis(4), [3.5], config)
    assert stronger.tag.tolist() == [[2, 3]] and torch.equal(stronger.store[0, 1], basis(4)[0])
    assert stronger.access.tolist() == [[0.0, 0.0]] and stronger.store_age.tolist() == [[0, 0]]
    read_often = replace(state, access=torch.tensor([[0.0, 1000.0]]))
    assert put_tokens(read_often, basis(5), [3.5], config).tag.tolist() == [[2, 1]]


def test_the_same_thing_is_kept_once_in_its_most_surprising_form() -> None:
    """A more surprising newcomer updates its slot and keeps its read count; a less surprising one does nothing."""
    config = settings_of(span=0, z_score_threshold=-9.0, contrastive_weight=0.0, buffer_slots=12)
    state = put_tokens(blank(config, size=12), basis(0, 1), [0.0, 2.0], config)
    state = replace(pass_cycles(state, 3, config), access=state.access + 1)
    again = basis(1) + 0.1 * basis(2)
    assert put_tokens(state, again, [1.0], config).tag.tolist() == state.tag.tolist()
    updated = put_tokens(state, again, [4.0], config)
    slot = int(state.tag[0].argmax())
    assert torch.equal(updated.store[0, slot], again[0]) and updated.surprise[0, slot] == 4.0
    assert (updated.tag[0, slot], updated.store_age[0, slot], updated.access[0, slot]) == (2, 0, 1)
    assert updated.live_store().sum() == 1


@pytest.mark.parametrize("off", [1e-6, -1e-6])
def test_rounding_decides_nothing_about_copies_of_a_state(off: float) -> None:
    """Of two slots with the same the first is reinforced, and what comes again as surprising stays where it is."""
    config = settings_of(span=0, z_score_threshold=-9.0, contrastive_weight=0.0, buffer_slots=12)
    state = put_tokens(blank(config, size=12), torch.cat([basis(1), basis(1)]), [0.0, 2.0], config)
    assert state.live_buffer(config).sum() == 2
    tilted = state.buffer.clone()
    tilted[0, 0 if off > 0 else 1] += 1e-3 * basis(2)[0]  # a cosine of 1 - 5e-7
    state = replace(pass_cycles(state, 1, config), buffer=tilted)
    again = put_tokens(state, basis(1), [2.0 + off], config)
    assert again.strength[0, :2].tolist() == pytest.approx([1.0, config.decay_rate])
    assert again.tag.tolist() == state.tag.tolist() and again.surprise.tolist() == state.surprise.tolist()


def test_novel_tokens_take_a_slot_and_known_ones_reinforce_theirs() -> None:
    """A known one moves its slot by `write_alpha` and makes it strong again."""
    config = settings_of(buffer_slots=12, write_alpha=0.25)
    state = put_tokens(blank(config, size=12), basis(0, 1), [1.0, 1.0], config)
    state = pass_cycles(state, 2, config)
    again = basis(1) + 0.2 * basis(2)
    state = put_tokens(state, torch.cat([again, basis(3)]), [1.0, 1.0], config)
    assert state.live_buffer(config).sum() == 3
    assert_close(state.buffer[0, 1], 0.75 * basis(1)[0] + 0.25 * again[0])
    assert state.strength[0, :3].tolist() == pytest.approx([0.49, 1.0, 1.0])
    assert state.buffer_tag[0, :3].tolist() == [0, 2, 3] and state.buffer_age[0, :3].tolist() == [2, 0, 0]


def test_the_weakest_slot_is_overwritten_whole() -> None:
    """And among equals the one written longest ago."""
    config = settings_of(buffer_slots=3, segment_length=3)
    state = put_tokens(blank(config, size=12), basis(0, 1), [1.0, 1.0], config)
    state = put_tokens(pass_cycles(state, 1, config), basis(2), [1.0], config)
    state = put_tokens(state, basis(3), [1.0], config)
    assert state.buffer_tag.tolist() == [[3, 1, 2]] and torch.equal(state.buffer[0, 0], basis(3)[0])


def test_a_token_like_a_stored_one_and_yet_different_is_surprising() -> None:
    """The contrastive term alone brings it into the store."""
    changes: dict[str, Any] = {"span": 0, "z_score_threshold": 1.0, "capacity_pressure": 0.0, "buffer_slots": 12}
    like = nn.functional.normalize(basis(1) + basis(2))  # cosine 0.7 with what is stored
    stored = []
    for weight in (0.0, 1.0, 4.0):
        config = settings_of(contrastive_weight=weight, **changes)
        state = put_tokens(blank(config, size=12), basis(0, 3, 1), [1.0, 0.0, 9.0], config)
        assert state.live_store().sum() == 1
        stored.append(int(put_tokens(state, like, [0.0], config).live_store().sum()))
        assert put_tokens(state, basis(7), [0.0], config).live_store().sum() == 1
    assert stored == [1, 1, 2]


@given(surprise=st.lists(st.sampled_from([0.0, 0.5, 0.5, 3.0, 1e4]), min_size=1, max_size=7), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_statistics_are_never_nan(surprise: list[float], seed: int) -> None:
    """A single token, no variance, no tokens at all, values far apart."""
    config = settings_of()
    state = blank(config)
    hidden = vectors(1, len(surprise), torch.Generator().manual_seed(seed))[0]
    for _ in range(3):
        state = put_tokens(state, hidden, surprise, config)
        state = stage_segment(
            state, hidden[None], torch.zeros(1, len(surprise)), torch.zeros(1, len(surprise)).bool(), config
        )
        state = put_tokens(state, hidden[:1], surprise[:1], config)
        state = end_conversation(state, config)
        assert all(t.isfinite().all() for t in state.tensors().values() if t.is_floating_point())


def test_statistics_are_the_exponential_mean_and_deviation() -> None:
    """Of all tokens so far, weighted by what was seen: one token's mean is that token."""
    config = settings_of(ema_alpha=0.25)
    state = put_tokens(blank(config), vectors(1, 1, torch.Generator().manual_seed(0))[0], [3.0], config)
    assert float(state.surprise_mean / state.surprise_weight) == pytest.approx(3.0)
    values = [3.0, 1.0, 2.0]
    state = put_tokens(state, vectors(1, 2, torch.Generator().manual_seed(1))[0], values[1:], config)
    weights = [0.25 * 0.75 ** (2 - i) for i in range(3)]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / sum(weights)
    sums = tuple(t[:, None].expand(1, 2) for t in (state.surprise_mean, state.surprise_square, state.surprise_weight))
    found = [float(column[0, 0]) for column in episodic.surprise_threshold(state, sums, config)[:2]]
    assert found == pytest.approx([mean, math.sqrt(variance)])


def test_a_row_without_tokens_does_not_age() -> None:
    """Conversations pass for those who take part in them."""
    config = settings_of()
    state = history(config, 1, rows=2)
    valid = torch.tensor([[True], [False]])
    written = stage_segment(state, vectors(2, 1, torch.Generator().manual_seed(2)), torch.ones(2, 1), valid, config)
    ended = end_conversation(written, config)
    assert_same_memory(*({name: t[1] for name, t in s.tensors().items()} for s in (ended, state)))
    assert (ended.store_age[0] == written.store_age[0] + 1).all()


@torch.no_grad()
def test_decay_really_forgets() -> None:
    """What is read changes as slots are forgotten; in the end a buffer adds nothing at all, and a store still does."""
    ids = tokens(1, 6, seed=1)
    for store_slots in (0, 6):
        model = SUBJECT.build(store_slots=store_slots, decay_rate=0.8, min_strength=0.1)
        memory = remembering(model, lengths=(9,))
        with model.disable_adapter():
            base = model(input_ids=ids, use_cache=True).logits
        effects = []
        for _ in range(14):
            effects.append((feed(model, memory.snapshot(), ids) - base).abs().max().item())
            memory.decay(1)
        live = memory.memory_layers[0].now.committed.live_buffer(memory.memory_layers[0].config)
        assert not live.any()
        assert effects[0] > 0 and effects[-1] != effects[0]
        assert (effects[-1] == 0.0) == (store_slots == 0)


@pytest.mark.parametrize("slot", ["buffer", "store"])
def test_what_a_forgotten_slot_holds_is_not_read(slot: str) -> None:
    """Not even through what it would have matched."""
    config = settings_of()
    reader = reader_of(config, "grouped")
    generator = torch.Generator().manual_seed(3)
    state = put_tokens(blank(config, size=8), vectors(1, 4, generator, 8)[0], [0.0, 1.0, 0.5, 2.0], config)
    dead = ~(state.live_buffer(config) if slot == "buffer" else state.live_store())
    assert dead.any() and not dead.all()
    asked = vectors(1, 5, generator, 8)
    reads = []
    for content in (0.0, 1.0, 300.0):
        filled = torch.where(dead[..., None], content * torch.randn(8), getattr(state, slot))
        reads.append(read(reader, asked, replace(state, **{slot: filled})).added)
    assert_close(reads[1], reads[0])
    assert_close(reads[2], reads[0])


def test_a_memory_of_forgotten_slots_only_reads_nothing() -> None:
    """And no NaN."""
    config = settings_of(store_slots=0)
    reader = reader_of(config, "grouped")
    state = history(config, 5, rows=1).map(lambda t: torch.cat([t, t[..., :2]], -1) if t.dim() == 3 else t)
    state = pass_cycles(state, 99, config)
    added = read(reader, vectors(1, 3, torch.Generator().manual_seed(0), 8), state).added
    assert torch.equal(added, torch.zeros_like(added))


# Settings.


@torch.no_grad()
def remembered(**changes: Any) -> MemoryCache:
    """The memory of some conversations under changed settings, with the same weights wherever shapes allow."""
    memory = MemoryCache.for_model(model_with(**changes))
    talk(model_with(**changes), memory, [tokens(1, length, seed=length) for length in (23, 9, 14)])
    return memory


def model_with(**changes: Any) -> Any:
    model = perturb(SUBJECT.fresh(**changes))
    return model


def state_of(**changes: Any) -> EpisodicState:
    return remembered(**changes).memory_layers[0].now.committed


def writes_more_when_lower(name: str, low: Any, high: Any, **changes: Any) -> None:
    """More tokens are kept under the lower value."""
    count = [int((state_of(**{name: v, **changes}).surprise > 0).sum()) for v in (low, high)]
    assert count[0] > count[1]


def check_slots(name: str, state_field: str) -> None:
    assert [getattr(state_of(**{name: n}), state_field).shape[1] for n in (8, 11)] == [8, 11]


def check_decay_rate() -> None:
    assert state_of(decay_rate=0.5).strength.unique().tolist() == [0.5]
    assert state_of(decay_rate=1.0).strength.unique().tolist() == [1.0]


def check_min_strength() -> None:
    state = pass_cycles(state_of(decay_rate=0.5), 1, settings_of(decay_rate=0.5))
    assert [bool(state.live_buffer(settings_of(min_strength=m)).any()) for m in (0.2, 0.3)] == [True, False]


def check_novelty_threshold() -> None:
    kept = [state_of(novelty_threshold=t, buffer_slots=64).live_buffer(settings_of()).sum() for t in (0.3, 1.0)]
    assert kept[0] < kept[1]


def check_write_alpha() -> None:
    state = put_tokens(blank(settings_of(), size=12), basis(0), [1.0], settings_of())
    for alpha in (0.0, 0.3, 1.0):
        config = settings_of(write_alpha=alpha)
        moved = put_tokens(state, basis(0) + 0.1 * basis(1), [1.0], config)
        assert float(moved.buffer[0, 0, 1]) == pytest.approx(0.1 * alpha)


def check_surprise() -> None:
    readers = [owners(model_with(surprise=s))[0].senri_block["default"] for s in ("predictor", "nll")]
    assert readers[0].predictor is not None and readers[1].predictor is None
    model = SUBJECT.build(surprise="nll", ema_alpha=1.0)
    memory, ids = MemoryCache.for_model(model), tokens(1, 5, seed=1)
    with torch.no_grad():
        logits = feed(model, memory, ids)[0, :-1].log_softmax(-1)
    memory.clear_context()
    last = -logits[-1, ids[0, -1]]
    assert_close(memory.memory_layers[0].now.committed.surprise_mean[0], last, "surprise of the last token")


def test_embeddings_are_refused_where_surprise_is_that_of_tokens() -> None:
    """Before attention takes anything in; without the adapter they are read."""
    model = SUBJECT.build(surprise="nll")
    memory, embeds = remembering(model), model.get_input_embeddings()(tokens(1, 6))
    before = memory.state_dict()
    with torch.no_grad(), pytest.raises(ValueError, match="surprise='nll' needs token ids"):
        model(inputs_embeds=embeds, past_key_values=memory)
    assert memory.get_seq_length() == 0
    assert_identical_memory(memory.state_dict(), before)
    with torch.no_grad(), model.disable_adapter():
        model(inputs_embeds=embeds, past_key_values=memory)
    assert memory.get_seq_length() == 6


def check_predictor_rank() -> None:
    assert owners(model_with(predictor_rank=5))[0].senri_block["default"].predictor[0].out_features == 5


def after_two_conversations(**changes: Any) -> tuple[EpisodicReader, MemoryView, list[int]]:
    """A reader that goes by topics alone, what it sees, and the ages of both conversations."""
    config = settings_of(buffer_slots=12, **changes)
    state = blank(config, size=8)
    for seed in (1, 2):
        said = vectors(1, 4, torch.Generator().manual_seed(seed), 8)[0]
        state = end_conversation(put_tokens(state, said, [1.0] * 4, config), config)
    reader = reader_of(config, "grouped")
    reader.topic_scale.fill_(TOPIC_SCALE)
    reader.age_scale.zero_()
    view = reader.project(state)
    ages = view.conversation[0].any(-1).nonzero()[:, 0].tolist()
    assert len(ages) == 2
    return reader, view, ages


def check_topic_size() -> None:
    """Topics have that width, and are what conversations are told apart by."""
    for size in (3, 5):
        reader, view, ages = after_two_conversations(topic_size=size)
        assert view.topics.shape[-1] == reader.config.num_topics * size
        for age in ages:
            asked = view.topics[:, None, age]
            assert (reader.score_conversations(asked, view.topics, view.recency).argmax(-1) == age).all()


def check_num_topics() -> None:
    """A conversation is as similar as its topics are on average."""
    for topics in (1, 3):
        reader, view, ages = after_two_conversations(num_topics=topics)
        held = view.topics[0].unflatten(-1, (topics, -1))
        asked = torch.randn(topics, held.shape[-1])
        similar = torch.stack([torch.cosine_similarity(asked, held[age], dim=-1).mean() for age in ages])
        shares = reader.score_conversations(asked.flatten()[None, None], view.topics, view.recency)
        expected = (TOPIC_SCALE * similar).log_softmax(0)
        assert_close(shares[0, :, 0, ages], expected.expand(reader.num_heads, -1), "shares")


def check_contrastive_weight() -> None:
    test_a_token_like_a_stored_one_and_yet_different_is_surprising()


def check_contrastive_similarity() -> None:
    like = nn.functional.normalize(basis(1) + basis(2))
    kept = []
    for similarity in (0.2, 0.75):
        config = settings_of(contrastive_similarity=similarity, contrastive_weight=4.0, span=0, buffer_slots=12)
        state = put_tokens(blank(config, size=12), basis(0, 3, 1), [1.0, 0.0, 9.0], config)
        kept.append(int(put_tokens(state, like, [0.0], config).live_store().sum()))
    assert kept == [2, 1]


def check_ema_alpha() -> None:
    assert state_of(ema_alpha=1.0).surprise_weight.item() == pytest.approx(1.0)
    assert state_of(ema_alpha=0.01).surprise_weight.item() == pytest.approx(1 - 0.99**46, rel=1e-4)


def check_span() -> None:
    for span in (0, 1, 3):
        config = settings_of(span=span, store_slots=6, contrastive_weight=0.0, buffer_slots=12)
        state = put_tokens(blank(config, size=12), basis(0, 1, 2, 3, 4, 5), [1.0, 9.0, 0.0, 0.0, 0.0, 0.0], config)
        assert sorted(t for t in state.tag[0].tolist() if t != EMPTY) == list(range(1, 2 + span))


def check_capacity_pressure() -> None:
    config = settings_of(store_slots=2, span=0, contrastive_weight=0.0, buffer_slots=12)
    full = put_tokens(blank(config, size=12), basis(0, 1, 2), [1.0, 3.0, 9.0], config)
    assert full.live_store().all()
    sums = tuple(t[:, None].expand(1, 2) for t in (full.surprise_mean, full.surprise_square, full.surprise_weight))
    by_pressure = [
        episodic.surprise_threshold(full, sums, replace(config, capacity_pressure=p))[2][0, 0].item()
        for p in (0.0, 1.0)
    ]
    mean, deviation, _ = episodic.surprise_threshold(full, sums, config)
    z = config.z_score_threshold
    assert by_pressure == pytest.approx([float(mean[0, 0] + k * z * deviation[0, 0]) for k in (1, 2)])


def check_consolidation_similarity() -> None:
    like = basis(1) + 0.5 * basis(2)  # cosine 0.89
    kept = []
    for similarity in (0.8, 0.95):
        config = settings_of(
            consolidation_similarity=similarity, span=0, contrastive_weight=0.0, buffer_slots=12, z_score_threshold=-9.0
        )
        state = put_tokens(blank(config, size=12), basis(0, 1), [0.0, 2.0], config)
        kept.append(int(put_tokens(state, like, [4.0], config).live_store().sum()))
    assert kept == [1, 2]


def check_segment_length() -> None:
    model = SUBJECT.build(segment_length=4, read_scope="committed_segments")
    memory = MemoryCache.for_model(model)
    tags = []
    for _ in range(5):
        feed(model, memory, tokens(1, 1))
        tags.append(memory.memory_layers[0].now.staged.tokens.item())
    assert tags == [0, 0, 0, 4, 4]


def check_read_scope() -> None:
    for scope, reads in (("conversation", False), ("committed_segments", True)):
        model = SUBJECT.build(read_scope=scope)
        memory = MemoryCache.for_model(model)
        feed(model, memory, tokens(1, 12))
        assert (memory.memory_layers[0].readable is not None) == reads


def check_write_generated() -> None:
    for write, seen in ((True, 4 + 5), (False, 4)):
        model = SUBJECT.build(write_generated=write)
        memory = MemoryCache.for_model(model)
        greedy(model, tokens(1, 4), memory, new=6)
        assert memory.tokens_seen.tolist() == [seen]


def check_init() -> None:
    """Both start silent; base attention starts as the layer's own projections."""
    base, zero = (SUBJECT.fresh(init=init) for init in ("base_attention", "zero"))
    layer = base.get_base_model().model.layers[0]
    reader = layer.memory_adapter.senri_block["default"]
    x = torch.randn(3, HIDDEN)
    assert torch.equal(reader.gate, torch.zeros(4))
    for name in "qkvo":
        assert_close(getattr(reader, f"{name}_proj")(x), getattr(layer.self_attn, f"{name}_proj")(x), name)
    reader = zero.get_base_model().model.layers[0].memory_adapter.senri_block["default"]
    assert torch.equal(reader.o_proj(x), torch.zeros(3, HIDDEN)) and torch.equal(reader.gate, torch.ones(4))


def check_rank() -> None:
    count = []
    for rank in (2, 5, None):
        reader = owners(model_with(rank=rank))[0].senri_block["default"]
        count.append(sum(p.numel() for p in reader.q_proj.parameters()))
    assert count == [2 * 2 * HIDDEN, 5 * 2 * HIDDEN, HIDDEN * HIDDEN]


def check_num_heads() -> None:
    assert owners(model_with(init="zero", num_heads=8))[0].senri_block["default"].num_heads == 8
    assert owners(model_with(init="zero"))[0].senri_block["default"].num_heads == 4


CHECKS = {
    "buffer_slots": lambda: check_slots("buffer_slots", "buffer"),
    "store_slots": lambda: check_slots("store_slots", "store"),
    "decay_rate": check_decay_rate,
    "min_strength": check_min_strength,
    "novelty_threshold": check_novelty_threshold,
    "write_alpha": check_write_alpha,
    "surprise": check_surprise,
    "predictor_rank": check_predictor_rank,
    "contrastive_weight": check_contrastive_weight,
    "contrastive_similarity": check_contrastive_similarity,
    "ema_alpha": check_ema_alpha,
    "z_score_threshold": lambda: writes_more_when_lower("z_score_threshold", 0.0, 3.0, store_slots=40),
    "span": check_span,
    "capacity_pressure": check_capacity_pressure,
    "consolidation_similarity": check_consolidation_similarity,
    "segment_length": check_segment_length,
    "read_scope": check_read_scope,
    "write_generated": check_write_generated,
    "init": check_init,
    "rank": check_rank,
    "num_topics": check_num_topics,
    "topic_size": check_topic_size,
    "num_heads": check_num_heads,
}


@pytest.mark.parametrize("name", [f.name for f in fields(EpisodicConfig)])
@torch.no_grad()
def test_every_setting_does_what_it_says(name: str) -> None:
    """A field without a check fails."""
    assert name in CHECKS, f"{name} has no check"
    CHECKS[name]()


def test_every_check_is_of_a_setting() -> None:
    """And none outlives its field."""
    assert set(CHECKS) == {f.name for f in fields(EpisodicConfig)}


WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, name)
        for name in ("buffer_slots", "predictor_rank", "segment_length", "num_topics", "topic_size")
        for value in (0, 1.5, True, "8")
    ),
    *(({"store_slots": value}, "store_slots") for value in (-1, 0.5, None)),
    *(({"span": value}, "span") for value in (-1, 0.5)),
    *(({name: value}, name) for name in ("decay_rate", "ema_alpha") for value in (0, -0.1, 1.1, float("nan"), "1")),
    *(({name: value}, name) for name in ("min_strength", "write_alpha") for value in (-0.1, 1.01, float("nan"), None)),
    ({"min_strength": 1.0}, "min_strength"),
    *(
        ({name: value}, name)
        for name in ("novelty_threshold", "consolidation_similarity", "contrastive_similarity")
        for value in (-1.1, 1.1, float("nan"))
    ),
    *(({name: -0.5}, name) for name in ("contrastive_weight", "capacity_pressure")),
    ({"z_score_threshold": float("nan")}, "z_score_threshold"),
    *(({name: "other"}, name) for name in ("surprise", "read_scope", "init")),
    ({"buffer_slots": 8, "segment_length": 9}, "buffer_slots=8.*segment_length=9"),
    ({"contrastive_similarity": 0.99}, "contrastive_similarity=0.99.*consolidation_similarity"),
    ({"surprise": "nll", "read_scope": "committed_segments"}, "surprise='nll'.*read_scope"),
    ({"num_heads": 4}, "num_heads=4.*base_attention"),
    ({"num_heads": 0, "init": "zero"}, "num_heads=0"),
    ({"rank": 0}, "rank=0"),
    ({"mechanism": "other"}, "mechanism='other'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """With its value, before any model is touched."""
    with pytest.raises(ValueError, match=message):
        MemoryAdapterConfig(**changes)


@pytest.mark.parametrize("layers", [[3], [-1], [], [1, 1], ["0"], 7])
def test_layers_that_a_model_does_not_have_are_refused(layers: Any) -> None:
    """With the range that it has."""
    with pytest.raises(ValueError, match=r"layers_to_transform.*from 0 to 2"):
        MemoryAdapterConfig(layers_to_transform=layers).resolve_layers(3)


def test_a_memory_goes_on_only_with_the_surprise_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other settings may differ, and a file that does not say by which surprise it was written is taken in."""
    subject = Subject("llama", "episodic", "default")
    model = subject.model()
    nats, slower = subject.build(surprise="nll"), subject.build(decay_rate=0.01, segment_length=7)
    for other in (nats, slower):
        other.load_state_dict(model.state_dict(), strict=False)
    memory = remembering(model)
    memory.save_pretrained(tmp_path / "memory")
    with pytest.raises(ValueError, match=r"layer 0 of it was written by .*'predictor'.* writes by .*'nll'"):
        MemoryCache.from_pretrained(tmp_path / "memory", model=nats)
    loaded = MemoryCache.from_pretrained(tmp_path / "memory", model=slower)
    assert_identical_memory(loaded.state_dict(), memory.state_dict())
    with monkeypatch.context() as without:
        without.setattr(EpisodicLayer, "rules", [])
        memory.save_pretrained(tmp_path / "silent")
    for reader in (model, nats):
        loaded = MemoryCache.from_pretrained(tmp_path / "silent", model=reader)
        assert_identical_memory(loaded.state_dict(), memory.state_dict())
