"""The memory cache: what a person does with a memory, and how it goes through generation."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    ARCHITECTURES,
    BUILT_IN_SUBJECTS,
    DEFAULTS,
    LLAMA,
    REMEMBERING,
    WITHOUT_TRAINING,
    Subject,
    assert_close,
    assert_identical_memory,
    assert_same_memory,
    blank,
    feed,
    greedy,
    held_tensors,
    remembering,
    subjects,
    talk,
    tiny_model,
    tokens,
)
from peft import PeftModel
from torch import Tensor

from senri_hf import MemoryCache
from senri_hf.memory.decoder import find_decoder
from senri_hf.memory.layer import ROLLBACK_TOKENS
from senri_hf.memory.real_tokens import real_tokens


every_setting = pytest.mark.parametrize("subject", LLAMA, ids=str)
every_architecture = pytest.mark.parametrize(
    "subject", [subject for arch in ARCHITECTURES for subject in subjects(arch, ["default"])], ids=str
)
every_mechanism = pytest.mark.parametrize("subject", DEFAULTS, ids=str)
every_remembering = pytest.mark.parametrize("subject", REMEMBERING, ids=str)
# Those whose memory fades with conversations passed.
every_fading = pytest.mark.parametrize("subject", [s for s in LLAMA if s.mechanism == "episodic"], ids=str)


# The life of a memory.


@every_remembering
@torch.no_grad()
def test_clear_context_ends_the_conversation_and_keeps_the_memory(subject: Subject) -> None:
    """Attention sees nothing any more; what was said is read from then on."""
    model, said, asked = subject.model(), tokens(1, 11, seed=1), tokens(1, 8, seed=2)
    memory = remembering(model)
    expected = memory.snapshot()
    feed(model, memory, said)
    assert memory.get_seq_length() == 11 and memory.context_nbytes > 0
    memory.clear_context()
    assert memory.get_seq_length() == 0 and memory.context_nbytes == 0
    assert memory.tokens_seen.tolist() == [23 + 17 + 11]
    difference = feed(model, memory, asked) - feed(model, expected, asked)
    assert difference.abs().max() > 1e-2


@every_setting
@torch.no_grad()
def test_clearing_an_empty_context_changes_nothing(subject: Subject) -> None:
    """However often: no time passes in which nothing was said."""
    memory = remembering(subject.model())
    before = memory.state_dict()
    memory.clear_context()
    memory.clear_context()
    assert_identical_memory(memory.state_dict(), before)


@every_setting
@torch.no_grad()
def test_reset_memory_is_a_new_memory(subject: Subject) -> None:
    """It holds nothing, and goes on as one that never held anything."""
    model = subject.model()
    memory = remembering(model, rows=2)
    feed(model, memory, tokens(2, 4))
    memory.reset_memory()
    assert memory.state_dict() == {} and memory.nbytes == 0 and memory.get_seq_length() == 0
    assert memory.rows is None and memory.tokens_seen.tolist() == []
    again, new = tokens(1, 9, seed=3), MemoryCache.for_model(model)
    assert torch.equal(feed(model, memory, again), feed(model, new, again))
    assert_identical_memory(memory.state_dict(), new.state_dict())


@every_mechanism
def test_read_only_ends_when_an_error_does(subject: Subject) -> None:
    """And one inside another ends alone."""
    memory = remembering(subject.model())
    with pytest.raises(RuntimeError, match="stop"), memory.read_only():
        with memory.read_only():
            pass
        assert all(layer.is_read_only for layer in memory.memory_layers)
        raise RuntimeError("stop")
    assert not any(layer.is_read_only for layer in memory.memory_layers)


@every_fading
@torch.no_grad()
def test_decay_passes_conversations(subject: Subject) -> None:
    """Two at once are one after another; in the end nothing of the buffer is read; none change nothing."""
    model, ids = subject.model(), tokens(1, 8, seed=4)
    memory = remembering(model)
    twice, at_once, none = memory.snapshot(), memory.snapshot(), memory.snapshot()
    twice.decay(1)
    twice.decay(1)
    at_once.decay(2)
    none.decay(0)
    assert_same_memory(twice, at_once)
    assert_identical_memory(none.state_dict(), memory.state_dict())
    twice.decay(80)
    assert (feed(model, twice, ids) - feed(model, memory, ids)).abs().max() > 1e-4
    MemoryCache.for_model(model).decay(3)


@every_setting
@pytest.mark.parametrize("last", [0, 1, 3, 5, 8, 14])
@torch.no_grad()
def test_forgotten_tokens_were_never_read(subject: Subject, last: int) -> None:
    """Within a segment, at its edge and across several; in context, memory and counters."""
    model, ids, later = subject.model(), tokens(2, 14, seed=5), tokens(2, 9, seed=6)
    before = remembering(model, rows=2)
    memory, expected = before.snapshot(), before.snapshot()
    feed(model, memory, ids, [4, 1])
    if last < 14:
        feed(model, expected, ids[:, : 14 - last])
    memory.forget(last=last)
    assert memory.get_seq_length() == expected.get_seq_length() == 14 - last
    assert memory.tokens_seen.tolist() == expected.tokens_seen.tolist()
    assert_same_memory(memory, expected)
    assert_close(feed(model, memory, later), feed(model, expected, later), "logits")
    assert_same_memory(memory, expected)


@every_setting
@given(turns=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4))
@torch.no_grad()
def test_forgetting_again_and_again_leaves_what_was_not_forgotten(
    subject: Subject, turns: list[tuple[int, float]]
) -> None:
    """As far back as is promised at any time."""
    model = subject.model()
    memory, kept = remembering(model), tokens(1, 0)
    expected = memory.snapshot()
    for seed, (length, part) in enumerate(turns):
        ids = tokens(1, length, seed=seed)
        feed(model, memory, ids, [7])
        kept = torch.cat([kept, ids], dim=1)
        last = int(part * min(kept.shape[1], ROLLBACK_TOKENS))
        memory.forget(last)
        kept = kept[:, : kept.shape[1] - last]
    if kept.shape[1]:
        feed(model, expected, kept)
    assert_same_memory(memory, expected)
    later = tokens(1, 6, seed=99)
    assert_close(feed(model, memory, later), feed(model, expected, later), "logits")


@every_setting
@torch.no_grad()
def test_what_lies_too_far_back_is_not_forgotten(subject: Subject) -> None:
    """An error says how far it goes; context and memory stay, and the promised tokens can still be forgotten."""
    model, ids = subject.model(), tokens(1, 150, seed=7)
    memory = remembering(model)
    expected = memory.snapshot()
    feed(model, memory, ids)
    before, length = memory.state_dict(), memory.get_seq_length()
    with pytest.raises(ValueError, match=r"149 tokens are to be taken back, but .*last \d+"):
        memory.forget(last=149)
    assert_identical_memory(memory.state_dict(), before)
    assert memory.get_seq_length() == length
    memory.forget(last=ROLLBACK_TOKENS)
    feed(model, expected, ids[:, :-ROLLBACK_TOKENS])
    assert_same_memory(memory, expected)


@every_remembering
@torch.no_grad()
def test_a_past_conversation_is_not_forgotten_by_tokens(subject: Subject) -> None:
    """What can be taken back ends where the conversation began."""
    memory = remembering(subject.model())
    before = memory.state_dict()
    with pytest.raises(ValueError, match="only the last 0 can be"):
        memory.forget(last=1)
    assert_identical_memory(memory.state_dict(), before)


@every_mechanism
@torch.no_grad()
def test_crop_is_forget_in_the_words_of_transformers(subject: Subject) -> None:
    """A negative number of tokens; a positive one is refused."""
    model, ids = subject.model(), tokens(1, 13, seed=8)
    memory = remembering(model)
    feed(model, memory, ids)
    other = memory.snapshot()
    memory.crop(-6)
    other.forget(last=6)
    assert_identical_memory(memory.state_dict(), other.state_dict())
    assert memory.recent_ids is not None and torch.equal(memory.recent_ids, ids[:, :7])
    with pytest.raises(ValueError, match="negative"):
        memory.crop(3)
    assert memory.get_seq_length() == 7


WRONG_CALLS: dict[str, tuple[Callable[[MemoryCache], Any], str]] = {
    "decay(-1)": (lambda m: m.decay(-1), "cycles"),
    "decay(0.5)": (lambda m: m.decay(0.5), "cycles"),  # type: ignore[arg-type]
    "decay(True)": (lambda m: m.decay(True), "cycles"),
    "forget(-2)": (lambda m: m.forget(-2), "last"),
    "forget(1.0)": (lambda m: m.forget(1.0), "last"),  # type: ignore[arg-type]
    "fork(0)": (lambda m: m.fork(0), "copies"),
    "select_rows([1])": (lambda m: m.select_rows([1]), "rows 0 to 0"),
    "select_rows([-1])": (lambda m: m.select_rows([-1]), "rows 0 to 0"),
    "restore of another": (lambda m: m.restore(MemoryCache(m_config(), [])), "layers"),
}


def m_config() -> Any:
    return tiny_model("llama").config


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_wrong_calls_name_what_is_wrong(call: str) -> None:
    """And change nothing."""
    memory = remembering(DEFAULTS[0].model())
    before = memory.state_dict()
    function, message = WRONG_CALLS[call]
    with pytest.raises(ValueError, match=message):
        function(memory)
    assert_identical_memory(memory.state_dict(), before)


# Copies.


COPIES: dict[str, Callable[[MemoryCache], MemoryCache]] = {
    "snapshot": lambda m: m.snapshot(),
    "fork": lambda m: m.fork(1),
    "select_rows": lambda m: m.select_rows([0, 1]),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "fork after clear_context": lambda m: m.fork(1),
}


@every_setting
@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_a_copy_goes_its_own_way(subject: Subject, kind: str) -> None:
    """Whatever is done to either leaves the other as it was, and both go on alike."""
    model, ids = subject.model(), tokens(2, 6, seed=9)
    memory = remembering(model, rows=2)
    if "clear" not in kind:
        feed(model, memory, tokens(2, 7, seed=10))
    expected_memory = memory.snapshot()
    before = memory.state_dict()
    expected = feed(model, expected_memory, ids)
    copied = COPIES[kind](memory)
    for one, other in ((memory, copied), (copied, memory)):
        trial = COPIES[kind](one)
        feed(model, trial, tokens(2, 8, seed=11))
        trial.clear_context()
        trial.decay(2)
        trial.reset_memory()
        assert_identical_memory(other.state_dict(), before)
    for cache in (memory, copied):
        assert torch.equal(feed(model, cache, ids), expected)
        assert_identical_memory(cache.state_dict(), expected_memory.state_dict())


@every_setting
@torch.no_grad()
def test_restore_goes_back_and_can_do_so_again(subject: Subject) -> None:
    """To an open conversation, after anything; the snapshot stays usable."""
    model, ids = subject.model(), tokens(1, 6, seed=12)
    memory = remembering(model)
    feed(model, memory, tokens(1, 7, seed=13))
    before, held = memory.snapshot(), memory.state_dict()
    after = None
    for undo in (lambda: feed(model, memory, tokens(1, 30)), memory.clear_context, memory.reset_memory):
        undo()
        memory.restore(before)
        assert_identical_memory(memory.state_dict(), held)
        logits = feed(model, memory, ids)
        assert after is None or torch.equal(logits, after)
        after = logits


@every_setting
@torch.no_grad()
def test_rows_are_picked_repeated_and_reordered_after_the_context_is_cleared(subject: Subject) -> None:
    """Attention holds nothing then, and must take another number of rows."""
    model = subject.model()
    memory = remembering(model, rows=2)
    ids = tokens(2, 6, seed=14)
    expected = feed(model, memory.snapshot(), ids)
    for rows, moved in (([1], memory.select_rows([1])), ([0, 0, 0, 1, 1, 1], memory.fork(3))):
        assert moved.rows == len(rows)
        assert_close(feed(model, moved, ids[rows]), expected[rows], "logits")


# What a person asks.


@every_setting
@torch.no_grad()
def test_counters_say_what_is_held(subject: Subject) -> None:
    """Tokens and bytes, with a forecast that an hour later is still true."""
    model = subject.model()
    memory = MemoryCache.for_model(model)
    assert (memory.nbytes, memory.rows, memory.tokens_seen.tolist()) == (0, None, [])
    ids = tokens(3, 12, seed=15)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=memory)
    assert memory.tokens_seen.tolist() == [12, 7, 12] and memory.rows == 3
    memory.clear_context()
    assert memory.tokens_seen.tolist() == [12, 7, 12]
    held = memory.state_dict().values()
    # Counters of a few bytes a row may be left out.
    assert memory.nbytes <= sum(t.numel() * t.element_size() for t in held) <= memory.nbytes + 100 * 3 * len(held)
    assert memory.fork(2).nbytes == 2 * memory.nbytes


@every_setting
@torch.no_grad()
def test_the_summary_is_for_a_person(subject: Subject) -> None:
    """One line a layer, before and after something was read."""
    model = subject.model()
    assert MemoryCache.for_model(model).summary().count("empty") == 2
    memory = remembering(model, rows=2)
    lines = memory.summary().splitlines()
    assert len(lines) == 3 and f"{memory.nbytes:,} bytes" in lines[0] and "[40, 40]" in lines[0]
    assert all("nan" not in line and "layer" in line for line in lines[1:])


@every_setting
@torch.no_grad()
def test_a_state_dict_is_the_memory_after_the_conversation(subject: Subject) -> None:
    """Another cache that loads it goes on alike; the open conversation goes on undisturbed."""
    model, ids = subject.model(), tokens(1, 7, seed=16)
    memory = remembering(model)
    feed(model, memory, ids)
    undisturbed = memory.snapshot()
    held = memory.state_dict()
    assert torch.equal(feed(model, memory, ids), feed(model, undisturbed, ids))
    loaded = remembering(model, seed=80)
    feed(model, loaded, ids)
    loaded.load_state_dict(held)
    assert loaded.get_seq_length() == 0
    assert_identical_memory(loaded.state_dict(), held)
    undisturbed.forget(ids.shape[1])
    undisturbed.clear_context()
    assert torch.equal(feed(model, loaded, ids), feed(model, undisturbed, ids))


@every_mechanism
@torch.no_grad()
def test_an_empty_memory_is_data_too(subject: Subject) -> None:
    """Loading it forgets."""
    model = subject.model()
    memory = remembering(model)
    memory.load_state_dict(MemoryCache.for_model(model).state_dict())
    assert memory.state_dict() == {}


@pytest.mark.parametrize("subject", [*LLAMA, *WITHOUT_TRAINING[:1], *BUILT_IN_SUBJECTS], ids=str)
@torch.no_grad()
def test_moving_to_a_device_moves_all_that_is_held(subject: Subject) -> None:
    """Context, memory and what an open conversation keeps; `to` returns the same cache."""
    model = subject.model()
    memory = remembering(model)
    feed(model, memory, tokens(1, 5, seed=17), [4, 1])
    assert len(held_tensors(memory)) > len(memory.memory_layers)
    assert memory.to("meta") is memory
    assert {tensor.device.type for tensor in held_tensors(memory)} == {"meta"}


@pytest.mark.parametrize("subject", [*LLAMA, *BUILT_IN_SUBJECTS], ids=str)
@torch.no_grad()
def test_memory_follows_the_layer_that_reads_it(subject: Subject) -> None:
    """All that a layer holds, open conversation included; where it already is, nothing moves."""
    model = subject.model()
    memory = remembering(model)
    feed(model, memory, tokens(1, 5, seed=17), [4, 1])
    for layer in memory.memory_layers:
        before = held_tensors(layer)
        layer.follow(torch.device("cpu"))
        assert all(one is other for one, other in zip(held_tensors(layer), before, strict=True))
        layer.follow(torch.device("meta"))
        assert {tensor.device.type for tensor in held_tensors(layer)} == {"meta"}
        assert layer.device is not None and layer.device.type == "meta"


@every_remembering
def test_detach_ends_backpropagation(subject: Subject) -> None:
    """What was written before gets no gradient; the reading still does, and the values stay."""
    model, ids = subject.build(), tokens(1, 9, seed=18)
    memory = MemoryCache.for_model(model)
    talk(model, memory, [tokens(1, 12, seed=19)])
    held = memory.state_dict()
    memory.detach()
    assert_identical_memory(memory.state_dict(), held)
    assert not any(tensor.requires_grad for tensor in memory.state_dict().values())
    loss = feed(model, memory, ids).square().mean()
    loss.backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "memory_adapter" in n
    )


# Generation.


WAYS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {"assistant_model": "same"},
    "another assistant": {"assistant_model": "other"},
    "chunked prefill": {"prefill_chunk_size": 3},
}


@every_architecture
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*assistant.*")
@torch.no_grad()
def test_every_way_to_decode_greedily_gives_the_same_text_and_memory(subject: Subject, way: str) -> None:
    """What was proposed and refused was never written."""
    assert_decoding_is_greedy(subject, way)


@pytest.mark.parametrize("subject", [s for s in LLAMA if s not in DEFAULTS], ids=str)
@pytest.mark.parametrize("way", ["prompt lookup", "another assistant", "chunked prefill"])
@torch.no_grad()
def test_every_setting_allows_every_way_to_decode(subject: Subject, way: str) -> None:
    """The same for what is read within a conversation or is surprising to the model itself."""
    assert_decoding_is_greedy(subject, way)


def assert_decoding_is_greedy(subject: Subject, way: str) -> None:
    model, ids = subject.model(), tokens(1, 6, seed=20).repeat(1, 3)
    kwargs = dict(WAYS[way])
    if "assistant_model" in kwargs:
        kwargs["assistant_model"] = tiny_model(subject.arch, **({"seed": 3} if "another" in way else {}))
    before = remembering(model)
    plain, memory = before.snapshot(), before.snapshot()
    expected = greedy(model, ids, plain, new=14)
    assert torch.equal(greedy(model, ids, memory, new=14, **kwargs), expected)
    assert memory.get_seq_length() == plain.get_seq_length()
    assert_same_memory(memory, plain)


@every_mechanism
@torch.no_grad()
def test_more_candidates_than_can_be_taken_back_are_refused(subject: Subject) -> None:
    """Before anything is taken in, with what to set."""
    model, ids = subject.model(), tokens(1, ROLLBACK_TOKENS + 9, seed=28).repeat(1, 3)
    memory = remembering(model)
    before = memory.state_dict()
    with pytest.raises(ValueError, match=r"65 candidates .* 64 tokens .*prompt_lookup_num_tokens"):
        greedy(model, ids, memory, prompt_lookup_num_tokens=ROLLBACK_TOKENS + 1)
    assert memory.get_seq_length() == 0
    assert_identical_memory(memory.state_dict(), before)
    plain = memory.snapshot()
    expected = greedy(model, ids, plain)
    assert torch.equal(greedy(model, ids, memory, prompt_lookup_num_tokens=ROLLBACK_TOKENS), expected)
    assert_same_memory(memory, plain)


@every_architecture
@torch.no_grad()
def test_a_returned_cache_is_continued(subject: Subject) -> None:
    """Text generated in two calls is that of one call, and so is its memory."""
    model, ids = subject.model(), tokens(1, 7, seed=21)
    before = remembering(model)
    whole, parts = before.snapshot(), before.snapshot()
    expected = greedy(model, ids, whole, new=11)
    out = model.generate(
        input_ids=ids,
        past_key_values=parts,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        attention_mask=torch.ones_like(ids),
    )
    assert out.past_key_values is parts
    assert torch.equal(greedy(model, out.sequences, out.past_key_values, new=6), expected[:, 5:])
    assert_same_memory(parts, whole)


@every_setting
@torch.no_grad()
def test_several_samples_of_one_memory_are_its_forks(subject: Subject) -> None:
    """`num_return_sequences` takes a memory with as many rows; each then holds its own text."""
    model, ids = subject.model(), tokens(1, 6, seed=22)
    before = remembering(model)
    memory = before.fork(3)
    torch.manual_seed(1)
    out = model.generate(
        input_ids=ids,
        past_key_values=memory,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        eos_token_id=None,
        attention_mask=torch.ones_like(ids),
    )
    assert out.unique(dim=0).shape[0] == 3
    for row in range(3):
        alone = before.snapshot()
        feed(model, alone, out[row : row + 1, :-1])
        assert_same_memory(memory.select_rows([row]), alone)


@every_mechanism
@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "samples"]
)
def test_a_memory_with_too_few_rows_says_what_to_do(subject: Subject, kwargs: dict[str, Any]) -> None:
    """And still serves afterwards."""
    model, ids = subject.model(), tokens(1, 6, seed=23)
    memory = remembering(model)
    expected = greedy(model, ids, memory.snapshot())
    with pytest.raises(ValueError, match=r"1 row\(s\), but the batch has 3.*fork"):
        greedy(model, ids, memory, **kwargs)
    assert torch.equal(greedy(model, ids, memory), expected)


@every_mechanism
@torch.no_grad()
def test_generated_tokens_are_not_written_when_that_is_set(subject: Subject) -> None:
    """Memory is that of the prompt, however it was decoded."""
    model, ids = not_writing_replies(subject), tokens(1, 6, seed=24).repeat(1, 3)
    before = remembering(model)
    expected = before.snapshot()
    feed(model, expected, ids)
    for kwargs in ({}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 17}):
        memory = before.snapshot()
        greedy(model, ids, memory, new=13, **kwargs)
        assert_same_memory(memory, expected)


def not_writing_replies(subject: Subject) -> PeftModel:
    """A model whose memory takes in prompts alone."""
    if "write_generated" not in subject.fresh().peft_config["default"].to_dict():
        pytest.skip("the mechanism has no such setting")
    return subject.build(write_generated=False)


@every_mechanism
@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.filterwarnings("ignore:.*assistant.*")
@torch.no_grad()
def test_accepted_candidates_are_not_written_when_that_is_set(subject: Subject, length: int) -> None:
    """Those that come with the prompt in the first pass included."""
    model, ids = not_writing_replies(subject), tokens(1, length, seed=26)
    memory, expected = MemoryCache.for_model(model), MemoryCache.for_model(model)
    feed(model, expected, ids)
    assistant = subject.plain()  # with a new memory it is the model itself
    assistant.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    passes: list[int] = []
    decoder = find_decoder(model.get_base_model())
    decoder.register_forward_pre_hook(lambda module, args, given: passes.append(1), with_kwargs=True)
    assert greedy(model, ids, memory, new=12, assistant_model=assistant).shape[1] == 12
    assert len(passes) <= 3
    assert memory.tokens_seen.tolist() == [length]
    assert_same_memory(memory, expected)


@every_mechanism
@pytest.mark.parametrize("way", ["plain", "prompt lookup"])
@torch.no_grad()
def test_a_later_prompt_is_written_when_replies_are_not(subject: Subject, way: str) -> None:
    """However the reply before it was decoded."""
    model, ids = not_writing_replies(subject), tokens(1, 6, seed=24).repeat(1, 3)
    memory = remembering(model)
    expected = memory.snapshot()
    said = greedy(model, ids, memory, new=9, **WAYS.get(way, {}))
    whole = torch.cat([ids, said, tokens(1, 7, seed=27)], dim=1)
    greedy(model, whole, memory, new=5)
    fed = memory.get_seq_length() - 4
    feed(model, expected, ids)
    with expected.read_only():
        feed(model, expected, said[:, :-1])
    feed(model, expected, whole[:, ids.shape[1] + said.shape[1] - 1 :])
    assert fed == whole.shape[1] == expected.get_seq_length()
    assert_same_memory(memory, expected)


@every_mechanism
@torch.no_grad()
def test_a_bool_mask_tells_padding_too(subject: Subject) -> None:
    """As some callers give it."""
    model, ids = subject.model(), tokens(2, 9, seed=25)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions: Tensor = (mask.cumsum(1) - 1).clamp_min(0)
    held = []
    for kind in (mask, mask.bool()):
        memory = MemoryCache.for_model(model)
        model(input_ids=ids, attention_mask=kind, position_ids=positions, past_key_values=memory)
        held.append(memory.state_dict())
    assert_identical_memory(*held)


SIDES = {"left": slice(0, 4), "right": slice(7, None)}
# How callers say which token sees which, [B, 1, T, columns] bool.
KINDS_OF_MASK: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda mask: mask,
    "added": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
    # A static cache's columns are all there from the start.
    "wider": lambda mask: torch.nn.functional.pad(mask, (0, 5)),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS_OF_MASK)
def test_a_mask_of_which_token_sees_which_tells_padding(side: str, kind: str) -> None:
    """In the first pass of a context and in a later one."""
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, SIDES[side]] = False
    for past, length in ((0, 11), (3, 8), (10, 1)):
        seen = (torch.ones(11, 11, dtype=torch.bool).tril() & mask[:, None, None])[:, :, past:]
        real, _ = real_tokens(torch.zeros(2, length), KINDS_OF_MASK[kind](seen), None, {}, past)
        assert torch.equal(real, mask[:, past:])


@pytest.mark.parametrize("subject", [*DEFAULTS, WITHOUT_TRAINING[0], BUILT_IN_SUBJECTS[0]], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
@torch.no_grad()
def test_a_mask_of_which_token_sees_which_writes_no_padding(subject: Subject, side: str, positions: bool) -> None:
    """Memory is that of a mask of tokens."""
    model, ids = subject.model(), tokens(2, 11, seed=25)
    mask = torch.ones_like(ids)
    mask[0, SIDES[side]] = 0
    given = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if positions else {}
    seen = torch.ones(11, 11, dtype=torch.bool).tril() & mask[:, None, None].bool()
    held = []
    for kind in (mask, KINDS_OF_MASK["added"](seen)):
        memory = blank(model)
        model(input_ids=ids, attention_mask=kind, past_key_values=memory, **given)
        held.append(memory)
        assert memory.tokens_seen.tolist() == [7, 11]
    for row in ([0], [1]):
        assert_same_memory(held[0].select_rows(row), held[1].select_rows(row))


@pytest.mark.parametrize("subject", [*DEFAULTS, WITHOUT_TRAINING[0], BUILT_IN_SUBJECTS[0]], ids=str)
def test_a_mask_that_does_not_tell_padding_is_refused(subject: Subject) -> None:
    model = subject.model()
    memory = blank(model)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 5, 5\] was given"):
        model(input_ids=tokens(1, 5), attention_mask=torch.ones(1, 5, 5), past_key_values=memory)
    assert memory.get_seq_length() == 0 and memory.state_dict() == {}


@pytest.mark.parametrize("copy", ["snapshot", "fork", "select_rows"])
def test_a_copy_made_while_only_reading_can_be_written(copy: str) -> None:
    model = next(iter(subjects("llama", ["default"]))).build()
    memory = MemoryCache.for_model(model)
    ids = torch.randint(3, 90, (1, 12))
    with torch.no_grad():
        model(ids, past_key_values=memory)
        with memory.read_only():
            other = {"snapshot": memory.snapshot, "fork": lambda: memory.fork(1)}.get(
                copy, lambda: memory.select_rows([0])
            )()
            memory.restore(other)
            before = memory.tokens_seen.clone()
            model(ids, past_key_values=memory)
            assert torch.equal(memory.tokens_seen, before)
        model(ids, past_key_values=other)
        assert torch.equal(other.tokens_seen, before + ids.shape[1])
        model(ids, past_key_values=memory)
        assert torch.equal(memory.tokens_seen, before + ids.shape[1])


def test_rows_are_not_named_by_truth_values() -> None:
    model = next(iter(subjects("llama", ["default"]))).build()
    memory = MemoryCache.for_model(model)
    with pytest.raises(ValueError, match="whole numbers"):
        memory.select_rows(torch.tensor([True, False]))


def test_a_memory_of_which_one_adapter_is_blank_loads_again() -> None:
    model = next(iter(subjects("llama", ["default"]))).build()
    model.add_adapter("idle", copy.deepcopy(model.peft_config["default"]))
    memory = MemoryCache.for_model(model)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 12)), past_key_values=memory)
    memory.clear_context()
    other = MemoryCache.for_model(model)
    other.load_state_dict(memory.state_dict())
    before, after = memory.state_dict(), other.state_dict()
    assert {name.partition(".")[0] for name in before} == {"default"}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
