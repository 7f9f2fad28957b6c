"""What can be done with slots and whole matrices: freezing, handing on, adding up, reading backwards."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BuiltIn, Subject, assert_close, assert_identical_memory, assert_same_memory, greedy, perturb, tokens

from senri_hf import MemoryCache, senri_layers
from senri_hf.memory.compressive import UpdateRule, elu_features, read_and_write, read_backwards, unit_features


SLOTTED = BuiltIn("senri", "built_in", "slots")  # one layer, three slots of 7 tokens
GATED = BuiltIn("senri", "built_in", "gated")


@functools.cache
def one_layer(rule: str, heads: int = 4) -> Any:
    """A model whose only layer is a memory."""
    return GATED.build(seed=4, layers=senri_layers(1, update_rule=rule, memory_head_dim=32 // heads))


@torch.no_grad()
def read_by(model: Any, *texts: Any, end: bool = True) -> MemoryCache:
    memory = MemoryCache.for_model(model)
    for ids in texts:
        model(ids, past_key_values=memory)
        if end:
            memory.clear_context()
    return memory


def assert_same_matrices(ours: MemoryCache, theirs: MemoryCache) -> None:
    """Equal but for how far the open slot is filled: added matrices say nothing of that."""
    a, b = ({n: t for n, t in memory.state_dict().items() if "filled" not in n} for memory in (ours, theirs))
    assert_same_memory(a, b)


def slot(memory: MemoryCache, number: int) -> dict[str, torch.Tensor]:
    return {name: t[:, number] for name, t in memory.state_dict().items() if name.endswith(("memory", "normaliser"))}


# Freezing.


@torch.no_grad()
def test_a_frozen_slot_is_read_and_not_written() -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(2, 10))
    memory.freeze([0])
    before = slot(memory, 0)
    model(tokens(2, 40, seed=1), past_key_values=memory)
    assert_identical_memory(slot(memory, 0), before)
    assert all(t.any() for number in (1, 2) for t in slot(memory, number).values())
    with_it = model(tokens(2, 5, seed=2), past_key_values=memory.snapshot(), update_memory=False).logits
    memory.unfreeze([0])
    assert torch.equal(
        model(tokens(2, 5, seed=2), past_key_values=memory.snapshot(), update_memory=False).logits, with_it
    )
    model(tokens(2, 21, seed=3), past_key_values=memory)
    assert not torch.equal(slot(memory, 0)["model.2.memory"], before["model.2.memory"])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1], [3, 8], [50]], ids=str)
def test_where_frozen_slots_stand_splitting_changes_nothing(pieces: list[int]) -> None:
    model, ids = SLOTTED.model(), tokens(2, 50, seed=1)
    found = []
    for parts in ([50], pieces):
        memory = read_by(model, tokens(2, 10))
        memory.freeze([1])  # the open one: the next one takes seven tokens, not what was left
        start, logits = 0, []
        while start < 50:
            step = parts[len(logits) % len(parts)]
            logits.append(model(ids[:, start : start + step], past_key_values=memory).logits)
            start += step
        found.append((torch.cat(logits, 1), memory))
    assert_close(found[1][0], found[0][0])
    assert_same_memory(found[1][1], found[0][1])


@torch.no_grad()
def test_a_memory_that_is_all_frozen_takes_nothing_in() -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(1, 10))
    memory.freeze([0, 1, 2])
    before = memory.state_dict()
    model(tokens(1, 9, seed=1), past_key_values=memory)
    assert_identical_memory(memory.state_dict(), before)


@torch.no_grad()
def test_tokens_are_taken_back_up_to_a_freeze() -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(1, 10), end=False)
    memory.freeze([0])
    before = memory.state_dict()
    model(tokens(1, 9, seed=1), past_key_values=memory)
    memory.forget(last=9)
    assert_identical_memory(memory.state_dict(), before)
    with pytest.raises(ValueError, match="only the last 0"):
        memory.forget(last=1)


@torch.no_grad()
def test_frozen_slots_survive_a_reset_that_keeps_them(tmp_path: Path) -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(2, 30))
    memory.freeze([1])
    kept, empty = slot(memory, 1), model(tokens(2, 4, seed=2), past_key_values=MemoryCache.for_model(model)).logits
    memory.reset_memory(keep_frozen=True)
    assert_identical_memory(slot(memory, 1), kept)
    assert not any(t.any() for number in (0, 2) for t in slot(memory, number).values())
    assert memory.tokens_seen.tolist() == [0, 0] and memory.get_seq_length() == 0
    memory.save_pretrained(tmp_path)  # nothing was read since, and yet it is a memory
    again = MemoryCache.from_pretrained(tmp_path, model=model)
    assert not torch.equal(model(tokens(2, 4, seed=2), past_key_values=again).logits, empty)
    memory.reset_memory()
    assert memory.state_dict() == {} and memory.rows is None
    assert torch.equal(model(tokens(2, 4, seed=2), past_key_values=memory).logits, empty)


@torch.no_grad()
def test_a_frozen_slot_that_is_empty_is_still_frozen_once_it_was_saved(tmp_path: Path) -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(2, 5))
    memory.freeze([2])
    memory.reset_memory(keep_frozen=True)
    memory.save_pretrained(tmp_path)
    again = MemoryCache.from_pretrained(tmp_path, model=model)
    model(tokens(2, 40), past_key_values=again)
    model(tokens(2, 40), past_key_values=memory)
    assert_identical_memory(again.state_dict(), memory.state_dict())
    assert not slot(again, 2)["model.2.memory"].any()


@torch.no_grad()
@pytest.mark.parametrize(("name", "value"), [("slot", 3), ("slot", -1), ("filled", -1), ("filled", 7), ("tokens", -1)])
def test_counters_that_no_memory_has_are_refused(name: str, value: int) -> None:
    memory = read_by(SLOTTED.model(), tokens(2, 10))
    before = memory.state_dict()
    damaged = {**before, f"model.2.{name}": torch.tensor([0, value])}
    with pytest.raises(ValueError, match=rf"layer 2 is damaged: {name} is \[0, {value}\]"):
        memory.load_state_dict(damaged)
    assert_identical_memory(memory.state_dict(), before)


@torch.no_grad()
def test_what_is_frozen_in_an_adapter_is_read_from_the_first_token() -> None:
    """`read_scope="conversation"`: what past conversations left, and frozen slots are that."""
    model = Subject("llama", "compressive", "gated slots").model()
    memory = read_by(model, tokens(1, 9))
    ids, plain = tokens(1, 6, seed=1), MemoryCache.for_model(model)
    expected = model(ids, past_key_values=plain).logits
    memory.freeze([0])
    memory.reset_memory(keep_frozen=True)
    assert not torch.equal(model(ids, past_key_values=memory).logits, expected)
    memory.reset_memory()
    assert torch.equal(model(ids, past_key_values=memory).logits, expected)


# Handing slots on.


@torch.no_grad()
def test_a_slot_is_handed_on_as_a_file(tmp_path: Path) -> None:
    model = SLOTTED.model()
    giver, taker = read_by(model, tokens(2, 18)), read_by(model, tokens(2, 5, seed=1))
    giver.export_slots(tmp_path / "slot", [1])
    taker.import_slots(tmp_path / "slot", into=[2], freeze=True)
    assert_identical_memory(slot(taker, 2), slot(giver, 1))
    state = taker.state_dict()
    assert state["model.2.frozen"].tolist() == [[False, False, True]] * 2
    ids = tokens(2, 4, seed=3)
    assert not torch.equal(greedy(model, ids, taker), greedy(model, ids, read_by(model, tokens(2, 5, seed=1))))
    with pytest.raises(ValueError, match="single slots"):
        MemoryCache.from_pretrained(tmp_path / "slot", model=model)


@torch.no_grad()
def test_slots_of_one_row_go_into_every_row_and_into_an_empty_memory(tmp_path: Path) -> None:
    model = SLOTTED.model()
    giver = read_by(model, tokens(1, 18))
    giver.export_slots(tmp_path / "slots", [0, 1])
    empty, two = MemoryCache.for_model(model), read_by(model, tokens(2, 3, seed=1))
    empty.import_slots(tmp_path / "slots")
    two.import_slots(tmp_path / "slots", into=[1, 2])
    for row in (0, 1):
        assert_identical_memory(slot(two.select_rows([row]), 1), slot(giver, 0))
    assert_identical_memory(slot(empty, 1), slot(giver, 1))
    assert empty.rows == 1 and empty.tokens_seen.tolist() == [0]


@torch.no_grad()
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(2, 18))
    memory.save_pretrained(tmp_path / "whole")
    memory.export_slots(tmp_path / "slots", [0])
    other = read_by(one_layer("delta"), tokens(2, 5))
    other.export_slots(tmp_path / "other", [0])
    three = read_by(model, tokens(3, 5))
    three.export_slots(tmp_path / "three", [0])
    before = memory.state_dict()
    for place, into, message in (
        ("whole", None, "a whole memory, no slots"),
        ("slots", [0, 1], r"into=\[0, 1\].*1 slot"),
        ("slots", [3], r"slots=\[3\].*0 to 2"),
        ("other", None, "does not fit this model"),
        ("three", None, "3 rows.*holds 2"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.import_slots(tmp_path / place, into=into)
    with pytest.raises(OSError, match="no memory at"):
        memory.import_slots(tmp_path / "nowhere", local_files_only=True)
    assert_identical_memory(memory.state_dict(), before)
    model(tokens(2, 1), past_key_values=memory)
    with pytest.raises(ValueError, match="open conversation"):
        memory.import_slots(tmp_path / "slots")
    for slots in ([], [0, 0], [-1], [True], [3]):
        with pytest.raises(ValueError, match=r"slots="):
            memory.freeze(slots)
    with pytest.raises(ValueError, match="holds nothing yet"):
        MemoryCache.for_model(model).freeze([0])


@torch.no_grad()
def test_slots_go_to_the_adapter_that_they_are_of(tmp_path: Path) -> None:
    """Two adapters beside the same decoder layers, whose slots have the same names but for the adapter's."""
    model = Subject("llama", "compressive", "gated slots").fresh()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    giver, taker = read_by(perturb(model), tokens(1, 18)), MemoryCache.for_model(model)
    giver.export_slots(tmp_path, [0])
    taker.import_slots(tmp_path, into=[1])
    held, given = taker.state_dict(), giver.state_dict()
    assert not torch.equal(given["default.0.memory"][:, 0], given["second.0.memory"][:, 0])
    for name in ("memory", "normaliser"):
        for place in ("default.0", "default.2", "second.0", "second.2"):
            assert torch.equal(held[f"{place}.{name}"][:, 1], given[f"{place}.{name}"][:, 0])
    model.delete_adapter("second")
    with pytest.raises(ValueError, match="does not fit this model"):
        MemoryCache.for_model(model).import_slots(tmp_path)


# Adding memories up.


@torch.no_grad()
def test_additive_memories_add_up_to_what_both_texts_leave() -> None:
    """In a first layer what is written does not depend on what was read: exact."""
    model, texts = one_layer("additive"), [tokens(2, 90, seed=s) for s in (1, 2, 3)]
    first, second = read_by(model, *texts[:2]), read_by(model, texts[2])
    assert first.merge(second) == {0: "sum"}
    assert_same_matrices(first, read_by(model, *texts))
    # From a common past: it counts once.
    past = read_by(model, texts[0])
    left, right = past.snapshot(), past.snapshot()
    for memory, text in ((left, texts[1]), (right, texts[2])):
        model(text, past_key_values=memory)
        memory.clear_context()
    assert left.merge(right, base=past) == {0: "sum"}
    assert_same_matrices(left, read_by(model, *texts))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["delta", "corrected_delta", "gated_delta"])
def test_other_rules_write_again_what_the_journal_holds(rule: str) -> None:
    model, texts = one_layer(rule), [tokens(2, length, seed=length) for length in (80, 30, 25)]
    past = read_by(model, texts[0])
    left, right = past.snapshot(), past.snapshot()
    model(texts[1], past_key_values=left)
    left.clear_context()
    model(texts[2][:, :10], past_key_values=right)
    model(texts[2][:, 10:], past_key_values=right)
    assert left.merge(right, base=past) == {0: "replay"}
    assert_same_memory(left, read_by(model, *texts))
    # From nothing, into nothing.
    empty = MemoryCache.for_model(model)
    assert empty.merge(read_by(model, texts[1], end=False)) == {0: "replay"}
    assert_same_memory(empty, read_by(model, texts[1]))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(30,), (70, 10), (100, 70)], ids=str)
def test_tokens_that_wait_for_their_segment_are_merged_too(lengths: tuple[int, ...]) -> None:
    """Segments of 150 tokens: what is older than the journal may not be written yet."""
    layers = senri_layers(1, update_rule="delta", memory_head_dim=8, memory_segment_length=150)
    model, texts = GATED.build(seed=4, layers=layers), [tokens(2, length, seed=length) for length in lengths]
    theirs, expected = MemoryCache.for_model(model), MemoryCache.for_model(model)
    for ids in texts:
        model(ids, past_key_values=theirs)
        model(ids, past_key_values=expected)
    expected.clear_context()
    merged = MemoryCache.for_model(model)
    assert merged.merge(theirs) == {0: "replay"}
    assert_same_memory(merged, expected)


@torch.no_grad()
def test_what_cannot_be_merged_is_refused_and_changes_nothing() -> None:
    model = one_layer("delta")
    memory = read_by(model, tokens(2, 9))
    before = memory.state_dict()
    for other, message in (
        (read_by(model, tokens(2, 9)), "cannot be written again"),  # its conversation is over
        (read_by(model, tokens(2, 200), end=False), "cannot be written again"),
        (read_by(model, tokens(3, 9), end=False), "holds 2 row.*3"),
        (read_by(one_layer("delta", heads=2), tokens(2, 9)), "do not fit"),
        (read_by(SLOTTED.model(), tokens(2, 9)), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.merge(other)
    assert_identical_memory(memory.state_dict(), before)
    model(tokens(2, 3), past_key_values=memory)
    with pytest.raises(ValueError, match="open conversation"):
        memory.merge(read_by(model, tokens(2, 9), end=False))


@torch.no_grad()
def test_nothing_comes_of_merging_with_nothing() -> None:
    model = one_layer("delta")
    memory = read_by(model, tokens(2, 9))
    before = memory.state_dict()
    memory.merge(MemoryCache.for_model(model))
    assert_identical_memory(memory.state_dict(), before)


# Reading backwards.


@pytest.mark.parametrize(("rule", "share"), [("additive", 0.9), ("delta", 0.9), ("gated_delta", 1.0)])
def test_a_value_finds_its_key(rule: str, share: float) -> None:
    """Eight random pairs in a head of 64: what Mᵀ gives for a value is nearest to its key, crowded as keys may be."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(16, 8, 64, generator=generator), torch.randn(16, 8, 64, generator=generator)
    gated = rule == "gated_delta"
    k = unit_features(k) if gated else elu_features(k)
    gates = (torch.ones(16, 8), torch.zeros(16, 8)) if gated else (None, None)
    empty = torch.zeros(16, 64, 64), torch.zeros(16, 64)
    _, memory, _ = read_and_write(*empty, k, k, v, UpdateRule(rule), *gates)
    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    centred = k - k.mean(1, keepdim=True)
    nearest = (unit(read_backwards(memory, v)) @ unit(centred).transpose(1, 2)).argmax(-1)
    assert (nearest == torch.arange(8)).float().mean() >= share


@torch.no_grad()
def test_a_memory_reads_backwards_by_layer_and_row() -> None:
    model = SLOTTED.model()
    memory = read_by(model, tokens(2, 18))
    values = torch.randn(2, 5, 4, 8)
    keys = memory.read_reverse(values)
    held = memory.state_dict()["model.2.memory"].sum(1)  # [B, H, d_k, d_v]
    assert_close(keys, torch.einsum("bthv,bhkv->bthk", values, held))
    assert torch.equal(memory.read_reverse(values, layer_idx=2), keys)
    with pytest.raises(ValueError, match=r"layer_idx=0.*\[2\]"):
        memory.read_reverse(values, layer_idx=0)
    with pytest.raises(ValueError, match=r"\[2, 5, 3, 8\]"):
        memory.read_reverse(values[:, :, :3])
    plain = MemoryCache.for_model(BuiltIn("senri", "built_in", "default").model())
    with pytest.raises(ValueError, match="holds nothing yet"):
        plain.read_reverse(values)
