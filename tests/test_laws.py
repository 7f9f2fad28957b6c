"""The six laws of memory, for every architecture, mechanism and setting that is registered in `models`."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ARCHITECTURES,
    BUILT_IN_SUBJECTS,
    DEFAULTS,
    LLAMA,
    PAD,
    REMEMBERING,
    SETTINGS,
    SMALL,
    SUBJECTS,
    VOCABULARY,
    WITHOUT_TRAINING,
    Subject,
    assert_close,
    assert_identical_memory,
    assert_same_memory,
    blank,
    feed,
    greedy,
    held_storage,
    padded,
    remembering,
    subjects,
    talk,
    tokens,
)
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import StoppingCriteria

from senri_hf import MemoryCache
from senri_hf.adapters.mechanisms import MECHANISMS
from senri_hf.memory import file
from senri_hf.memory.owner import owners


every_subject = pytest.mark.parametrize("subject", SUBJECTS + BUILT_IN_SUBJECTS + WITHOUT_TRAINING, ids=str)
every_state = pytest.mark.parametrize("subject", SUBJECTS + BUILT_IN_SUBJECTS, ids=str)  # other than keys and values
every_adapter = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
every_setting = pytest.mark.parametrize("subject", LLAMA + BUILT_IN_SUBJECTS + WITHOUT_TRAINING[:1], ids=str)
every_setting_of_states = pytest.mark.parametrize("subject", LLAMA + BUILT_IN_SUBJECTS, ids=str)
every_adapter_mechanism = pytest.mark.parametrize("subject", DEFAULTS, ids=str)
every_mechanism = pytest.mark.parametrize("subject", DEFAULTS + WITHOUT_TRAINING[:1], ids=str)
CONVERSATIONS = [tokens(1, length, seed=length) for length in (23, 9, 14)]
pieces = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def test_every_mechanism_is_tested() -> None:
    """A mechanism joins the laws by its entry in the tables of `models`."""
    assert set(MECHANISMS) == set(SETTINGS) == set(SMALL)
    assert {subject.arch for subject in SUBJECTS} == set(ARCHITECTURES)


@every_adapter
def test_memory_is_read(subject: Subject) -> None:
    """What the other tests compare is not empty: memory changes the logits, and their texts are varied."""
    model, ids = subject.model(), tokens(1, 12, seed=9)
    with torch.no_grad():
        read = feed(model, remembering(model), ids)
        if subject.remembers:
            assert not torch.allclose(read, feed(model, remembering(model, seed=5), ids), atol=0.1)
        with model.disable_adapter():
            assert not torch.allclose(read, model(input_ids=ids).logits, atol=0.1)
    assert greedy(model, ids, remembering(model)).unique().numel() >= 4


# 1. Splitting changes nothing.


@every_subject
@given(lengths=pieces)
@torch.no_grad()
def test_pieces_give_the_logits_and_the_memory_of_the_whole(subject: Subject, lengths: list[int]) -> None:
    """In every one of several conversations, in random pieces."""
    assert_splitting_changes_nothing(subject, lengths)


@every_subject
@torch.no_grad()
def test_token_by_token_gives_the_logits_and_the_memory_of_the_whole(subject: Subject) -> None:
    """As generation feeds them."""
    assert_splitting_changes_nothing(subject, [1])


def assert_splitting_changes_nothing(subject: Subject, lengths: list[int]) -> None:
    model = subject.model()
    whole, split = blank(model), blank(model)
    expected, logits = talk(model, whole, CONVERSATIONS), talk(model, split, CONVERSATIONS, lengths)
    for ours, theirs in zip(logits, expected, strict=True):
        assert_close(ours, theirs, "logits")
    assert_same_memory(split, whole)
    assert split.tokens_seen.tolist() == [sum(ids.shape[1] for ids in CONVERSATIONS)]


@every_subject
@torch.no_grad()
def test_a_conversation_longer_than_what_can_be_taken_back_splits_too(subject: Subject) -> None:
    """Old tokens are taken in without a journal; that changes nothing."""
    model, ids = subject.model(), [tokens(1, 171, seed=3), tokens(1, 8, seed=4)]
    whole, split = blank(model), blank(model)
    for ours, theirs in zip(talk(model, split, ids, [67, 1, 30]), talk(model, whole, ids), strict=True):
        assert_close(ours, theirs, "logits")
    assert_same_memory(split, whole)


@every_subject
@torch.no_grad()
def test_greedy_generation_is_that_of_whole_texts_without_a_context(subject: Subject) -> None:
    """Every token is the choice after reading the whole conversation anew from the memory before it."""
    model, ids = subject.model(), tokens(1, 7, seed=11)
    before = remembering(model)
    memory, text = before.snapshot(), ids
    for _ in range(12):
        anew = before.snapshot()
        choice = feed(model, anew, text)[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, choice], dim=1)
    assert torch.equal(greedy(model, ids, memory), text[:, ids.shape[1] :])
    assert_same_memory(memory, anew)


@every_subject
@pytest.mark.parametrize("lengths", [[1], [4, 7]], ids=["token by token", "pieces"])
def test_pieces_give_the_gradients_of_the_whole(subject: Subject, lengths: list[int]) -> None:
    """Of a loss over a later conversation, through what memory kept of earlier ones."""
    model, question = subject.build(), tokens(1, 8, seed=21)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(split: list[int] | None) -> dict[str, Tensor | None]:
        memory = blank(model)
        talk(model, memory, CONVERSATIONS[:2], split)
        logits = feed(model, memory, question, split)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], question[0, 1:])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    whole, split = gradients(None), gradients(lengths)
    used = [name for name, gradient in whole.items() if gradient is not None and gradient.abs().max() > 0]
    assert set(used) == {name for name in parameters if "predictor" not in name}
    for name in used:
        ours, theirs = split[name], whole[name]
        assert ours is not None and theirs is not None
        assert_close(ours / theirs.norm(), theirs / theirs.norm(), name, tolerance=2e-3)


# 2. Rows are strangers.


ROWS = [[tokens(1, length, seed=10 * row + turn) for turn, length in enumerate(lengths)]
        for row, lengths in enumerate([(21, 4), (6, 16), (1, 9)])]  # fmt: skip


@every_subject
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_in_a_padded_batch_is_as_alone(subject: Subject, side: str) -> None:
    """Logits and memory, over two conversations of different lengths."""
    model = subject.model()
    together = blank(model)
    batches = [padded([row[turn] for row in ROWS], side) for turn in range(2)]
    logits = []
    for batch in batches:
        logits.append(model(**batch, past_key_values=together).logits)
        together.clear_context()
    for index, row in enumerate(ROWS):
        alone = blank(model)
        for turn, expected in enumerate(talk(model, alone, row)):
            real = batches[turn]["attention_mask"][index].bool()
            assert_close(logits[turn][index][real], expected[0], f"row {index}, conversation {turn}")
        assert_same_memory(together.select_rows([index]), alone)


@every_subject
@torch.no_grad()
def test_left_padded_generation_of_a_row_is_as_alone(subject: Subject) -> None:
    """The text and the memory."""
    model = subject.model()
    rows = [row[1] for row in ROWS]
    batch = padded(rows, "left")
    before = remembering(model, rows=3)
    together = before.snapshot()
    texts = greedy(model, batch["input_ids"], together, attention_mask=batch["attention_mask"])
    for index, row in enumerate(rows):
        alone = before.select_rows([index])
        assert torch.equal(greedy(model, row, alone)[0], texts[index])
        assert_same_memory(together.select_rows([index]), alone)


@every_setting_of_states
@torch.no_grad()
def test_another_row_changes_nothing_bit_for_bit(subject: Subject) -> None:
    """Only what the first row says counts for the first row."""
    model, shared = subject.model(), [tokens(1, length, seed=length) for length in (17, 9)]
    seen = []
    for seed in (50, 60):
        memory = blank(model)
        others = [tokens(1, ids.shape[1], seed=seed + ids.shape[1]) for ids in shared]
        logits = talk(model, memory, [torch.cat(pair) for pair in zip(shared, others, strict=True)])
        seen.append((logits, memory.select_rows([0]).state_dict()))
    for ours, theirs in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(ours[0], theirs[0])
    assert_identical_memory(seen[0][1], seen[1][1])


@every_setting
@pytest.mark.parametrize("is_open", [False, True], ids=["between conversations", "in an open conversation"])
@torch.no_grad()
def test_moved_rows_carry_their_own_memory(subject: Subject, is_open: bool) -> None:
    """Reordered, selected and repeated rows go on as they would have where they were."""
    model, ids = subject.model(), tokens(3, 6, seed=31)
    memory, start = remembering(model, rows=3), tokens(3, 7, seed=30)
    if is_open:
        feed(model, memory, start)
    moves: dict[str, tuple[list[int], Callable[[MemoryCache], Any]]] = {
        "reorder_cache": ([2, 0, 0], lambda m: m.reorder_cache(torch.tensor([2, 0, 0]))),
        "batch_select_indices": ([1, 2], lambda m: m.batch_select_indices(torch.tensor([1, 2]))),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], lambda m: m.batch_repeat_interleave(2)),
    }
    expected_memory = memory.snapshot()
    expected = feed(model, expected_memory, ids)
    for name, (rows, move) in moves.items():
        moved = memory.snapshot()
        move(moved)
        assert_close(feed(model, moved, ids[rows]), expected[rows], name)
        assert_same_memory(moved, expected_memory.select_rows(rows))


@every_adapter_mechanism
@torch.no_grad()
def test_every_beam_carries_its_own_memory(subject: Subject) -> None:
    """After beam search each row of the cache holds the memory of the text that it says it read."""
    model, ids = subject.model(), tokens(1, 7, seed=12)
    before = remembering(model)
    memory = before.fork(4)
    out = greedy(model, ids, memory, new=9, num_beams=4, num_return_sequences=4)
    assert out.unique(dim=0).shape[0] == 4
    read = memory.recent_ids
    assert read is not None
    for index in range(4):
        alone = before.snapshot()
        feed(model, alone, read[index : index + 1])
        assert_same_memory(memory.select_rows([index]), alone)
    texts = {tuple(row) for row in torch.cat([ids.expand(4, -1), out], dim=1)[:, :-1].tolist()}
    assert texts & {tuple(row) for row in read.tolist()}


class StopsAfter(StoppingCriteria):
    """Ends a row after a token, as `stop_strings` do after a text."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.token


# By a token that one row says and one that none says: what a model's config says of ends, what `generate()` is told,
# and what it pads with.
ENDINGS: dict[str, Callable[[int, int], tuple[dict[str, Any], dict[str, Any], int]]] = {
    "padding of its own": lambda end, unsaid: ({"eos_token_id": end}, {"eos_token_id": end}, PAD),
    "no padding": lambda end, unsaid: ({"eos_token_id": end, "pad_token_id": None}, {"eos_token_id": end}, end),
    "two ends": lambda end, unsaid: (
        {"eos_token_id": [end, unsaid], "pad_token_id": None},
        {"eos_token_id": [unsaid, end]},
        unsaid,
    ),
    "padding is the end": lambda end, unsaid: (
        {"eos_token_id": end, "pad_token_id": end},
        {"eos_token_id": end},
        end,
    ),
    "padding is the end for generate": lambda end, unsaid: (
        {"eos_token_id": end},
        {"eos_token_id": end, "pad_token_id": end},
        end,
    ),
    "an end for generate": lambda end, unsaid: ({"eos_token_id": unsaid}, {"eos_token_id": end}, PAD),
    # Without any end `generate()` would pad nothing.
    "stopped": lambda end, unsaid: (
        {"eos_token_id": unsaid},
        {"eos_token_id": unsaid, "stopping_criteria": [StopsAfter(end)]},
        PAD,
    ),
}


@every_setting
@torch.no_grad()
def test_a_finished_row_writes_no_padding(subject: Subject) -> None:
    """While the others go on, its memory stays that of its own text and the end that it was fed."""
    assert_padding_is_not_written(subject, "padding of its own")


@pytest.mark.parametrize("subject", [*DEFAULTS, *WITHOUT_TRAINING[:1], *BUILT_IN_SUBJECTS[:1]], ids=str)
@pytest.mark.parametrize("ending", list(ENDINGS)[1:])
@torch.no_grad()
def test_a_finished_row_writes_no_padding_however_it_ends(subject: Subject, ending: str) -> None:
    """Whatever ends it, and whatever it is padded with."""
    assert_padding_is_not_written(subject, ending)


def assert_padding_is_not_written(subject: Subject, ending: str) -> None:
    plain = subject.build()
    for seed in range(40, 60):  # until one row says something that the other does not
        ids = tokens(2, 7, seed)
        text = greedy(plain, ids, remembering(plain, rows=2), new=14)
        ends = [t for t in text[0].tolist() if t not in text[1].tolist() and t not in text[0, :2].tolist()]
        if ends and text[0].tolist().index(ends[0]) < 11:
            end = ends[0]
            break
    unsaid = next(token for token in range(3, VOCABULARY) if token not in text)
    config, told, filler = ENDINGS[ending](end, unsaid)
    model = subject.build(model=config)
    before = remembering(model, rows=2)
    memory = before.snapshot()
    out = greedy(model, ids, memory, new=14, **told)
    stop = out[0].tolist().index(end) + 1
    assert (out[0, stop:] == filler).all() and out.shape[1] > stop + 2
    alone = before.select_rows([0])
    feed(model, alone, torch.cat([ids[:1], out[:1, :stop]], dim=1))
    assert_same_memory(memory.select_rows([0]), alone)


@every_mechanism
@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_documents_are_refused(subject: Subject, by: str) -> None:
    """They share a row, and would share its memory."""
    model = subject.model()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    kwargs: dict[str, Any] = {"position_ids": positions}
    if by == "cu_seq_lens_q":
        lengths = torch.tensor([0, 4, 7], dtype=torch.int32)
        kwargs |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 4, "max_length_k": 4}
    memory = blank(model)
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=tokens(1, 7), past_key_values=memory, use_cache=True, **kwargs)
    assert memory.state_dict() == {}


@every_mechanism
def test_another_number_of_rows_is_refused(subject: Subject) -> None:
    """With what to do; the memory stays as it is."""
    model = subject.model()
    memory = remembering(model, rows=2)
    before = memory.state_dict()
    for call in (lambda: feed(model, memory, tokens(3, 4)), lambda: greedy(model, tokens(2, 4), memory, num_beams=2)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"2 row\(s\).*fork"):
            call()
    assert_identical_memory(memory.state_dict(), before)


# 3. A token never reads the future.


@every_subject
@given(place=st.integers(0, 22))
@torch.no_grad()
def test_a_token_changes_nothing_before_it(subject: Subject, place: int) -> None:
    """Bit for bit, in a conversation that reads memory."""
    model, ids = subject.model(), tokens(1, 23, seed=13)
    other = ids.clone()
    other[0, place] = 3 + (ids[0, place] + 1) % 90
    memory = remembering(model)
    a, b = feed(model, memory.snapshot(), ids), feed(model, memory.snapshot(), other)
    assert torch.equal(a[:, :place], b[:, :place])
    assert not torch.equal(a[:, place], b[:, place])


@every_adapter
@torch.no_grad()
def test_a_conversation_reads_what_came_before_it_only(subject: Subject) -> None:
    """What is written meanwhile is not read: a first conversation is the base model's own."""
    model, ids = subject.model(), tokens(1, 23, seed=14)
    memory, again = remembering(model), remembering(model)
    with again.read_only():
        reading = feed(model, again, ids)
    writing = feed(model, memory, ids)
    first = feed(model, blank(model), ids)
    with model.disable_adapter():
        base = model(input_ids=ids, use_cache=True).logits
    if not subject.remembers:
        assert torch.equal(writing, reading)
        assert torch.equal(writing, first)
        assert not torch.allclose(first, base, atol=1e-3)
    elif not subject.reads_own_conversation:
        assert torch.equal(writing, reading)
        assert torch.equal(first, base)
    else:
        length = subject.reads_nothing_for
        assert torch.equal(writing[:, :length], reading[:, :length])
        assert not torch.allclose(writing[:, length:], reading[:, length:], atol=1e-3)
        assert_close(first[:, :length], base[:, :length], "logits of the first segment")
        assert not torch.allclose(first[:, length:], base[:, length:], atol=1e-3)


# 4. Memory is data.


@every_subject
@torch.no_grad()
def test_a_saved_memory_continues_as_the_memory_itself(subject: Subject, tmp_path: Path) -> None:
    """In another copy of the model; an open conversation is saved as if it ended."""
    model, ids = subject.model(), tokens(2, 7, seed=15)
    memory = remembering(model, rows=2)
    feed(model, memory, tokens(2, 8, seed=16))
    memory.save_pretrained(tmp_path / "memory")
    memory.clear_context()
    elsewhere = subject.build()
    loaded = MemoryCache.from_pretrained(tmp_path / "memory", model=elsewhere)
    assert_identical_memory(loaded.state_dict(), memory.state_dict())
    assert loaded.tokens_seen.tolist() == memory.tokens_seen.tolist()
    assert torch.equal(greedy(elsewhere, ids, loaded), greedy(model, ids, memory))
    assert_same_memory(loaded, memory)


@every_mechanism
def test_a_memory_says_where_it_comes_from(subject: Subject, tmp_path: Path) -> None:
    """A continued memory names its parent; the folder holds safetensors, JSON and a card, and no code."""
    model = subject.model()
    remembering(model).save_pretrained(tmp_path / "one")
    loaded = MemoryCache.from_pretrained(tmp_path / "one", model=model)
    loaded.save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / file.DESCRIPTION).read_text()) for name in ("one", "two"))
    assert two["parent"] == one["memory"] != two["memory"] and one["parent"] is None
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == ["README.md", file.DESCRIPTION, file.WEIGHTS]
    assert one["memory"] in (tmp_path / "two" / "README.md").read_text()


def in_bfloat16(model: PeftModel) -> PeftModel:
    """A copy in bfloat16; of a model with an adapter the base only, as PEFT makes it."""
    other = copy.deepcopy(model)
    if not isinstance(other, PeftModel):
        return other.to(torch.bfloat16)
    ours = {id(p) for owner in owners(other) for p in owner.parameters()}  # type: ignore[attr-defined]
    for parameter in other.parameters():
        if id(parameter) not in ours:
            parameter.data = parameter.data.to(torch.bfloat16)
    return other


@every_state
@torch.no_grad()
def test_a_memory_moves_between_dtypes(subject: Subject, tmp_path: Path) -> None:
    """Bit for bit, and read alike, from float32 to bfloat16 and back."""
    model, ids = subject.model(), tokens(1, 9, seed=17)
    other = in_bfloat16(model)
    for writer, reader, name in ((model, other, "down"), (other, model, "up")):
        memory = remembering(writer)
        memory.save_pretrained(tmp_path / name)
        loaded = MemoryCache.from_pretrained(tmp_path / name, model=reader)
        assert_identical_memory(loaded.state_dict(), memory.state_dict())
        with loaded.read_only(), memory.read_only():
            ours, theirs = feed(reader, loaded, ids).float(), feed(writer, memory, ids).float()
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of the default subject of the first mechanism, as a folder."""
    folder = tmp_path_factory.mktemp("saved") / "memory"
    remembering(DEFAULTS[0].model()).save_pretrained(folder)
    return folder


MISFITS: dict[str, tuple[Callable[[Subject], PeftModel], str]] = {
    "other architecture": (
        lambda s: Subject("qwen3", s.mechanism, s.variant).build(),
        "architecture.*'llama'.*'qwen3'",
    ),
    "other hidden size": (lambda s: s.build(model={"hidden_size": 64}), "hidden_size.*32.*64"),
    "other number of layers": (lambda s: s.build(model={"num_hidden_layers": 4}), "num_hidden_layers.*3.*4"),
    "other base weights": (lambda s: s.build(model={"seed": 5}), "base model.*another one"),
    "other adapter weights": (lambda s: s.build(seed=5), "memory adapter.*another one"),
}


@every_adapter_mechanism
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_memory_of_another_model_is_refused(subject: Subject, misfit: str, tmp_path: Path) -> None:
    """With what differs."""
    build, message = MISFITS[misfit]
    remembering(subject.model()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MemoryCache.from_pretrained(tmp_path, model=build(subject))


def test_a_memory_of_other_slots_is_refused(saved: Path) -> None:
    """With the tensor and both shapes."""
    model = DEFAULTS[0].build(buffer_slots=16)
    with pytest.raises(ValueError, match=r"layer 0.*buffer is torch.float32 \[1, 12, 32\].*\[1, 16, 32\]"):
        MemoryCache.from_pretrained(saved, model=model)


def test_a_memory_of_other_layers_is_refused(saved: Path) -> None:
    """With the layers of both."""
    model = DEFAULTS[0].build()
    model.delete_adapter("default")
    from senri_hf import MemoryAdapterConfig

    model.add_adapter("default", MemoryAdapterConfig(**DEFAULTS[0].settings, layers_to_transform=[1]))
    with pytest.raises(ValueError, match=r"memory adapter|layers"):
        MemoryCache.from_pretrained(saved, model=model)


def with_copy(folder: Path, to: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a memory's folder with its weights' bytes changed."""
    to.mkdir(exist_ok=True)
    (to / file.WEIGHTS).write_bytes(change((folder / file.WEIGHTS).read_bytes()))
    return to


@given(part=st.floats(0, 1, exclude_max=True))
@settings(max_examples=20)
def test_a_truncated_file_is_refused(saved: Path, tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    """Wherever it ends."""
    folder = with_copy(saved, tmp_path_factory.mktemp("cut"), lambda data: data[: int(part * len(data))])
    with pytest.raises(ValueError, match="damaged"):
        MemoryCache.from_pretrained(folder, model=DEFAULTS[0].model())


@given(data=st.data())
@settings(max_examples=150)
def test_a_flipped_bit_is_refused(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Wherever it is: in the header's length, the header or the tensors. None makes another memory."""
    raw = (saved / file.WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)))
    changed = bytearray(raw)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    folder = with_copy(saved, tmp_path_factory.mktemp("flip"), lambda _: bytes(changed))
    with pytest.raises(ValueError, match=r"damaged|no memory|format"):
        file.load(folder)


@pytest.mark.parametrize("subject", REMEMBERING, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_though_its_checksum_is_right(
    subject: Subject, bad: float, tmp_path: Path
) -> None:
    """With the tensor that holds it."""
    model = subject.model()
    memory = remembering(model)
    held = memory.state_dict()
    name = next(n for n, t in held.items() if t.is_floating_point() and t.numel())
    held = {**held, name: held[name].clone()}
    held[name].view(-1)[-1] = bad
    file.save(held, memory.description(), tmp_path / "bad")
    with pytest.raises(ValueError, match=f"{name.rpartition('.')[2]} holds NaN or infinity"):
        MemoryCache.from_pretrained(tmp_path / "bad", model=model)


def test_a_later_format_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both versions."""
    memory = MemoryCache.from_pretrained(saved, model=DEFAULTS[0].model())
    monkeypatch.setattr(file, "FORMAT_VERSION", file.FORMAT_VERSION + 1)
    memory.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"format {file.FORMAT_VERSION + 1}.*reads {file.FORMAT_VERSION}"):
        MemoryCache.from_pretrained(tmp_path, model=DEFAULTS[0].model())


@pytest.mark.parametrize("name", ["memory.pt", "memory.bin", "pytorch_model.pkl"])
def test_a_pickle_is_never_opened(name: str, tmp_path: Path) -> None:
    """Alone it is refused by name; beside a memory it is passed by."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(OSError, match=f"{name} can run code"):
        MemoryCache.from_pretrained(tmp_path, model=DEFAULTS[0].model())
    memory = remembering(DEFAULTS[0].model())
    memory.save_pretrained(tmp_path)
    loaded = MemoryCache.from_pretrained(tmp_path, model=DEFAULTS[0].model())
    assert_identical_memory(loaded.state_dict(), memory.state_dict())


def test_a_pickle_under_the_name_of_a_memory_is_refused(tmp_path: Path) -> None:
    """What a file is called changes nothing."""
    torch.save({"buffer": torch.zeros(3)}, tmp_path / file.WEIGHTS)
    with pytest.raises(ValueError, match="no safetensors file"):
        MemoryCache.from_pretrained(tmp_path, model=DEFAULTS[0].model())


def test_what_is_no_memory_is_refused(tmp_path: Path, saved: Path) -> None:
    """An empty folder, a file, other safetensors, a name that neither disk nor Hub knows, a model without memory."""
    model = DEFAULTS[0].model()
    with pytest.raises(OSError, match=r"has no memory\.safetensors"):
        MemoryCache.from_pretrained(tmp_path, model=model)
    with pytest.raises(OSError, match="is a file"):
        MemoryCache.from_pretrained(saved / file.WEIGHTS, model=model)
    with pytest.raises(OSError, match="There is no memory"):
        MemoryCache.from_pretrained("nobody/no-such-memory", model=model)
    file.save_file({"x": torch.zeros(1)}, tmp_path / file.WEIGHTS)
    with pytest.raises(ValueError, match="is no memory"):
        MemoryCache.from_pretrained(tmp_path, model=model)
    with pytest.raises(ValueError, match=r"memory adapter: .* different names"):
        MemoryCache.from_pretrained(saved, model=DEFAULTS[0].plain())


DAMAGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a tensor is missing": lambda held: dict(list(held.items())[1:]),
    "a tensor is unknown": lambda held: {**held, "default.0.more": torch.zeros(1)},
    "a name is no name": lambda held: {**held, "more": torch.zeros(1)},
    "a layer is missing": lambda held: {n: t for n, t in held.items() if ".2." not in n},
    "another layer": lambda held: {n.replace(".2.", ".1."): t for n, t in held.items()},
    "other shapes": lambda held: {n: t[..., :-1] for n, t in held.items()},
    "no rows": lambda held: {n: t[0] for n, t in held.items()},
    "other dtypes": lambda held: {n: t.double() for n, t in held.items()},
    "rows differ": lambda held: {n: t.repeat_interleave(2, 0) if ".2." in n else t for n, t in held.items()},
    "not finite": lambda held: {n: t / 0 if t.is_floating_point() else t for n, t in held.items()},
    "other hidden size": lambda held: {n: torch.cat([t, t], -1) if t.dim() >= 3 else t for n, t in held.items()},
}


@pytest.mark.parametrize("subject", [subject for subject in DEFAULTS if subject.remembers], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("every", [False, True], ids=["one tensor", "every tensor"])
@torch.no_grad()
def test_a_refused_load_leaves_the_memory_in_use_as_it_was(subject: Subject, damage: str, every: bool) -> None:
    """Bit for bit, with its open conversation."""
    model = subject.model()
    memory, other = remembering(model), remembering(model, seed=70).state_dict()
    feed(model, memory, tokens(1, 8, seed=18))
    before, seen = memory.state_dict(), memory.get_seq_length()
    changed = DAMAGES[damage](other)
    if not every and changed.keys() == other.keys():
        name = list(changed)[-1] if changed[list(changed)[-1]].shape != other[list(changed)[-1]].shape else None
        changed = changed if name is None else {**other, name: changed[name]}
    with pytest.raises(ValueError, match=r"memory|name"):
        memory.load_state_dict(changed)
    assert_identical_memory(memory.state_dict(), before)
    assert memory.get_seq_length() == seen


class Disk:
    """Fails in place of a function, from the `good`-th call on."""

    def __init__(self, function: Callable[..., Any], good: int, error: Exception) -> None:
        self.function, self.good, self.error = function, good, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.good -= 1
        if self.good < 0:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "name", "good", "error"),
    [
        (file, "save_file", 0, OSError(28, "No space left on device")),
        (file, "save_file", 0, SafetensorError("Error while serializing: I/O error: No space left on device")),
        *((os, "replace", good, OSError(28, "No space left on device")) for good in range(3)),
    ],
    ids=["writing", "writing, in safetensors", "first rename", "second rename", "third rename"],
)
def test_a_full_disk_leaves_a_whole_memory(
    module: Any, name: str, good: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one, or after the first rename the new one, and no temporary files."""
    model = DEFAULTS[0].model()
    old, new = remembering(model), remembering(model, seed=71)
    old.save_pretrained(tmp_path / "memory")
    monkeypatch.setattr(module, name, Disk(getattr(module, name), good, error))
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "memory")
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["memory"]
    assert sorted(f.name for f in (tmp_path / "memory").iterdir()) == ["README.md", file.DESCRIPTION, file.WEIGHTS]
    loaded = MemoryCache.from_pretrained(tmp_path / "memory", model=model)
    assert_identical_memory(loaded.state_dict(), (new if good else old).state_dict())


@pytest.mark.parametrize("good", range(3))
def test_a_full_disk_leaves_no_empty_folder(good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there was none: after the first rename there is a whole memory, before it nothing. An old one stays."""
    model = DEFAULTS[0].model()
    memory = remembering(model)
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        monkeypatch.setattr(os, "replace", Disk(os.replace, good, OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            memory.save_pretrained(tmp_path / name)
        monkeypatch.undo()
    assert sorted(f.name for f in tmp_path.iterdir()) == (["mine", "new"] if good else ["mine"])
    if good:
        loaded = MemoryCache.from_pretrained(tmp_path / "new", model=model)
        assert_identical_memory(loaded.state_dict(), memory.state_dict())


def test_a_memory_is_not_saved_over_a_file(tmp_path: Path) -> None:
    """The file stays."""
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        remembering(DEFAULTS[0].model()).save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


# 5. Fixed size.


@every_setting_of_states
@pytest.mark.parametrize("way", ["whole", "pieces", "read only", "padding"])
@torch.no_grad()
def test_memory_does_not_grow_with_what_is_read(subject: Subject, way: str) -> None:
    """The context does; neither `nbytes` nor what the layers really keep alive."""
    model = subject.model()
    sizes = []
    for length in (50, 500, 2000) if subject in DEFAULTS else (50, 300, 800):
        memory, ids = remembering(model, lengths=(17,)), tokens(1, length, seed=19)
        mask = torch.ones_like(ids)
        if way == "padding":
            mask[:, :-9] = 0
        settings = (
            {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if way == "padding" else {}
        )
        if way == "read only":
            with memory.read_only():
                feed(model, memory, ids, [41])
        else:
            feed(model, memory, ids, [41] if way == "pieces" else None, **settings)
        held = sum(held_storage(layer) for layer in memory.memory_layers)
        recent = sum(
            held_storage(t)
            for t in (memory.recent_ids, memory.recent_decoded, memory.recent_hidden, memory.recent_real)
        )
        sizes.append((memory.nbytes, held + recent, memory.context_nbytes))
    counted, held_bytes, context = zip(*sizes, strict=True)
    assert max(counted) <= 1.25 * counted[0]
    assert max(held_bytes) <= 4 * held_bytes[0] and held_bytes[2] <= 1.5 * held_bytes[1], held_bytes
    assert context[2] > 10 * context[0] or context[2] == 0


@every_setting_of_states
@torch.no_grad()
def test_memory_between_conversations_has_one_size(subject: Subject) -> None:
    """However many there were."""
    model = subject.model()
    memory, sizes = blank(model), set()
    for turn in range(4):
        talk(model, memory, [tokens(1, 30 * turn + 3, seed=turn)])
        sizes.add(memory.nbytes)
    assert len(sizes) == 1


# 6. Off means off.


@every_adapter
@torch.no_grad()
def test_without_memory_the_model_is_the_base_model(subject: Subject) -> None:
    """Bit for bit, cached or not: an adapter that is fresh, disabled, or reads an empty or a reset memory."""
    fresh, model, ids = subject.fresh(), subject.model(), tokens(2, 9, seed=20)
    base = model.get_base_model()
    with model.disable_adapter():
        expected = base(input_ids=ids, use_cache=False).logits
        expected_cached = base(input_ids=ids, use_cache=True).logits
    assert torch.equal(feed(fresh, remembering(fresh, rows=2), ids), expected_cached)
    memory = remembering(model, rows=2)
    with model.disable_adapter():
        assert torch.equal(feed(model, memory.snapshot(), ids), expected_cached)
    if not subject.remembers:  # a bank is there from the start, whatever was said
        assert torch.equal(fresh(input_ids=ids, use_cache=False).logits, expected)
        return
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(model(input_ids=ids, use_cache=True).logits, expected_cached)
    memory.reset_memory()
    first = slice(max(0, subject.reads_nothing_for - 1) if subject.reads_own_conversation else None)
    for empty in (memory, blank(model)):
        if ids[:, first].shape[1]:
            assert torch.equal(feed(model, empty, ids[:, first]), base_logits(model, ids[:, first]))


def base_logits(model: PeftModel, ids: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(input_ids=ids, use_cache=True).logits


@every_adapter
@torch.no_grad()
def test_generation_with_an_empty_memory_is_the_base_models(subject: Subject) -> None:
    """Token for token; and with a disabled adapter, whatever the memory holds."""
    model, ids = subject.model(), tokens(2, 7, seed=22)
    with model.disable_adapter():
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
        )[:, 7:]
        memory = remembering(model, rows=2)
        assert torch.equal(greedy(model, ids, memory, new=10), expected)
        assert memory.state_dict() == {}
    if subject.remembers and not subject.reads_own_conversation:
        assert torch.equal(greedy(model, ids, blank(model), new=10), expected)


@every_adapter
@torch.no_grad()
def test_a_disabled_adapter_writes_nothing(subject: Subject) -> None:
    """Memory is as it was, bit for bit."""
    model = subject.model()
    memory = remembering(model)
    before = memory.state_dict()
    with model.disable_adapter():
        feed(model, memory, tokens(1, 12, seed=23), [5])
    memory.clear_context()
    assert_identical_memory(memory.state_dict(), before)


@every_subject
@pytest.mark.parametrize("is_open", [False, True], ids=["between conversations", "in an open conversation"])
@torch.no_grad()
def test_read_only_changes_nothing(subject: Subject, is_open: bool) -> None:
    """Bit for bit: no write, no statistics, no access counts; and what was read is what is there."""
    model, ids = subject.model(), tokens(1, 13, seed=24)
    memory = remembering(model)
    if is_open:
        feed(model, memory, tokens(1, 8, seed=25))
    before, seen = memory.state_dict(), memory.tokens_seen.tolist()
    with memory.read_only():
        feed(model, memory, ids, [6])
        greedy(model, torch.cat([tokens(1, 8, seed=25), ids], 1) if is_open else ids, memory, new=4)
    assert_identical_memory(memory.state_dict(), before)
    assert memory.tokens_seen.tolist() == seen
    if not is_open:
        memory.clear_context()
        assert_identical_memory(memory.state_dict(), before)


@every_setting
@torch.no_grad()
def test_a_new_memory_that_was_only_read_is_new(subject: Subject) -> None:
    """It holds nothing, and serves a batch of any size."""
    model, ids = subject.model(), tokens(1, 9, seed=26)
    memory, new = blank(model), blank(model)
    with memory.read_only():
        feed(model, memory, tokens(4, 13, seed=27))
    memory.clear_context()
    assert (memory.nbytes, memory.rows, memory.tokens_seen.tolist(), memory.state_dict()) == (0, None, [], {})
    assert torch.equal(feed(model, memory, ids), feed(model, new, ids))
    assert_identical_memory(memory.state_dict(), new.state_dict())


def test_subjects_of_one_setting_can_be_asked_for() -> None:
    """The tables answer by name."""
    assert [s.variant for s in subjects("qwen2", ["default"])] == ["default"] * len(MECHANISMS)
