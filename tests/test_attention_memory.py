"""Memory without training: what is kept, and what it promises; most laws are in test_laws."""

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chatting import byte_tokenizer
from models import (
    ARCHITECTURES,
    BOS,
    DEFAULTS,
    EOS,
    FEW_SLOTS,
    VOCABULARY,
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
    tiny_model,
    tokens,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from senri_hf import MemoryCache
from senri_hf.configuration.attention_memory import READ_BY, AttentionMemoryConfig
from senri_hf.memory import file
from senri_hf.memory.attention_memory import Said, Slots, consolidate
from senri_hf.memory.served import NotServedError
from senri_hf.memory.surprise import token_surprise
from senri_hf.memory.words import slots_that_say


CONVERSATIONS = [tokens(1, length, seed=length) for length in (23, 9, 14)]
every_architecture = pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
MODELS = {arch: tiny_model(arch) for arch in ARCHITECTURES}


# What it promises.


@every_architecture
@pytest.mark.parametrize("lengths", [[7, 5], [3, 20]], ids=str)
@torch.no_grad()
def test_with_everything_kept_the_logits_are_those_of_one_context(arch: str, lengths: list[int]) -> None:
    """One conversation remembered and the next one, as if it went on; sliding windows and turn markers included."""
    model, ids = MODELS[arch], tokens(2, sum(lengths), seed=4)
    ids[:, [0, lengths[0]]] = BOS
    memory = blank(model, policy="all", slots=sum(lengths))
    feed(model, memory, ids[:, : lengths[0]])
    memory.clear_context()
    assert memory.get_seq_length() == 0
    ours = feed(model, memory, ids[:, lengths[0] :])
    whole = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits[:, lengths[0] :]
    assert_close(ours, whole, "logits")


@every_architecture
@torch.no_grad()
def test_memory_is_read(arch: str) -> None:
    """A plain model gets it without a word, and it changes what is said."""
    model, ids = MODELS[arch], tokens(1, 12, seed=9)
    assert MemoryCache.for_model(model).attention_memory is not None
    read = feed(model, remembering(model), ids)
    assert not torch.allclose(read, feed(model, remembering(model, seed=5), ids), atol=0.05)
    assert not torch.allclose(read, model(input_ids=ids).logits, atol=0.05)


def test_a_model_with_an_adapter_reads_both() -> None:
    """What either remembers changes the logits."""
    model, ids = DEFAULTS[0].model(), tokens(1, 6, seed=9)
    memory = blank(model, **FEW_SLOTS)
    assert {type(layer).__name__ for layer in memory.memory_layers} == {"EpisodicLayer", "AttentionMemoryLayer"}
    with torch.no_grad():
        talk(model, memory, CONVERSATIONS)
        both = feed(model, memory.snapshot(), ids)
        with model.disable_adapter():
            assert not torch.allclose(feed(model, memory.snapshot(), ids), both, atol=1e-3)
        assert memory.attention_memory is not None
        memory.attention_memory.reset()
        assert not torch.allclose(feed(model, memory, ids), both, atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("mechanism", ["episodic", "compressive"])
@torch.no_grad()
def test_both_memories_take_in_the_same_tokens(arch: str, mechanism: str) -> None:
    """Of conversations that open alike, and of a padded batch as of its rows alone."""
    (subject,) = (s for s in subjects(arch, ["default"]) if s.mechanism == mechanism)
    model = subject.model()
    memory = blank(model, **FEW_SLOTS)
    for seed in range(3):
        talk(model, memory, [opened(1, 10, seed)])
        counts = [layer.tokens_seen.tolist() for layer in memory.memory_layers if layer.tokens_seen is not None]
        assert len(counts) > 1 and all(count == [10 + 9 * seed] for count in counts)
    rows = [tokens(1, length, seed=length) for length in (4, 9)]
    for side in ("left", "right"):
        batch = memory.fork(2)
        logits = model(**padded(rows, side), past_key_values=batch).logits
        for index, row in enumerate(rows):
            alone = memory.snapshot()
            columns = slice(9 - row.shape[1], None) if side == "left" else slice(row.shape[1])
            assert_close(logits[index : index + 1, columns], feed(model, alone, row), "logits")
            assert_same_memory(batch.select_rows([index]), alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 6},
        {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, "partial_rotary_factor": 0.5},
        # Neighbouring channels are turned together, by angles that stand in halves.
        {"model_type": "glm", "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8},
        {"model_type": "ernie4_5", "num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8},
    ],
    ids=lambda settings: settings["model_type"],
)
@torch.no_grad()
def test_other_models_are_served_too(settings: dict[str, Any]) -> None:
    """By name: with everything kept their logits are those of one context."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**settings, **sizes, num_hidden_layers=3, bos_token_id=1, eos_token_id=2)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(2, 16, seed=4)
    memory = blank(model, policy="all", slots=9)
    feed(model, memory, ids[:, :9])
    memory.clear_context()
    whole = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits[:, 9:]
    assert_close(feed(model, memory, ids[:, 9:], [4, 1]), whole, "logits")


@pytest.mark.parametrize(("vocabulary", "pad"), [(VOCABULARY, 11), (VOCABULARY, 48), (200, 159)])
def test_whatever_pads_a_text_does_not_get_a_model_refused(vocabulary: int, pad: int) -> None:
    """Memory takes in no padding, so that it is no token to try a model with."""
    memory = blank(tiny_model("llama", vocab_size=vocabulary, pad_token_id=pad))
    assert memory.attention_memory is not None


GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=1)
BLOOM = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
MPT = MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
MODERNBERT = ModernBertDecoderConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: GPT2LMHeadModel(GPT2), "has no rotary module"),
        (
            lambda: tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "changes with the length",
        ),
        (lambda: MptForCausalLM(MPT), r"generate\(\) feeds it the whole text at every step"),
        (lambda: ModernBertDecoderForCausalLM(MODERNBERT), "surprise is told; policy='recent' needs none"),
        (lambda: tiny_model("llama", max_position_embeddings=10), "reads 10 tokens at most"),
    ],
    ids=["absolute positions", "dynamic rotary embedding", "whole text", "layers before the head", "short"],
)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(model: Any, reason: str) -> None:
    """And stays as it was."""
    refused = model()
    refused.train()
    before = attached(refused)
    with pytest.raises(NotServedError, match=reason):
        MemoryCache.for_model(refused)
    assert refused.training and attached(refused) == before


def attached(model: nn.Module) -> list[Any]:
    """What a model's modules have besides weights: hooks and attributes."""
    return [
        (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]


@torch.no_grad()
def test_a_model_whose_surprise_is_not_known_has_a_memory_of_what_was_last() -> None:
    """And a model that has a memory keeps it when another one is refused."""
    model, ids = ModernBertDecoderForCausalLM(MODERNBERT).eval(), tokens(1, 16, seed=4)
    memory = blank(model, policy="recent")
    with pytest.raises(NotServedError, match="surprise"):
        blank(model)
    feed(model, memory, ids[:, :9])
    memory.clear_context()
    whole = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits[:, 9:]
    assert_close(feed(model, memory, ids[:, 9:]), whole, "logits")


@pytest.mark.parametrize(
    ("model_type", "kind", "why"),
    [
        ("llama", "served", "positions: 8 of 8 channels"),
        ("glm", "served", "positions: 4 of 8 channels"),
        ("falcon", "served", "positions: 8 of 8 channels"),
        ("qwen3_moe", "served", "positions: 8 of 8 channels"),
        ("bloom", "served", "positions: none"),
        ("memory_transformer", "served", "positions: 8 of 8 channels"),
        ("symbolic_transformer", "refused", "has no rotary module"),
        ("gptj", "refused", "has no rotary module"),
        ("nanochat", "refused", "otherwise than its rotary module says"),
        ("deepseek_v3", "refused", "holds as a token's values depends on the token's position"),
        ("lfm2", "refused", "LinearAttentionLayer"),
        ("musicgen", "not built with these sizes", "MusicgenConfig"),
    ],
)
def test_the_list_of_architectures_says_what_becomes_of_a_model(
    model_type: str, kind: str, why: str, load: Callable[[str], ModuleType]
) -> None:
    found = load("architectures.py").outcome(model_type)
    assert found[0] == kind and why in found[1]


def test_positions_that_are_distances_need_no_moving() -> None:
    """ALiBi: keys carry no position."""
    memory = blank(BloomForCausalLM(BLOOM).eval())
    assert memory.attention_memory is not None
    assert [layout and layout.rotated for layout in memory.attention_memory.layouts] == [0, 0]


# 1. Splitting changes nothing.


@every_architecture
@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}], ids=["prompt lookup", "assisted"]
)
@torch.no_grad()
def test_speculative_decoding_says_and_remembers_the_same(arch: str, how: dict[str, Any]) -> None:
    """Rejected tokens are taken back."""
    model, ids = MODELS[arch], tokens(1, 5, seed=12).repeat(1, 3)
    before = remembering(model)
    plain, other = before.snapshot(), before.snapshot()
    expected = greedy(model, ids, plain)
    settings = {"assistant_model": tiny_model(arch, seed=1)} if "assistant" in how else how
    assert torch.equal(greedy(model, ids, other, **settings), expected)
    plain.clear_context()
    other.clear_context()
    assert_same_memory(other, plain)


@torch.no_grad()
def test_tokens_taken_back_were_never_said() -> None:
    model, ids = MODELS["llama"], tokens(1, 20, seed=13)
    memory, expected = remembering(model), remembering(model)
    feed(model, expected, ids[:, :11])
    feed(model, memory, ids, [3, 9])
    assert memory.forget(last=9) == 9
    assert_same_memory(memory, expected)
    assert_close(feed(model, memory, ids[:, 11:]), feed(model, expected, ids[:, 11:]))
    with pytest.raises(ValueError, match="taken back"):
        memory.forget(last=21)


# 2. Rows are strangers.


@torch.no_grad()
def test_beams_have_memories_of_their_own() -> None:
    model, ids = MODELS["llama"], tokens(1, 7, seed=12)
    before = remembering(model)
    memory = before.fork(4)
    out = greedy(model, ids, memory, new=9, num_beams=4, num_return_sequences=4)
    assert out.unique(dim=0).shape[0] == 4
    layer = memory.attention_memory
    assert layer is not None
    read = torch.cat([columns.token for columns in layer.said], dim=1)
    for index in range(4):
        alone = before.snapshot()
        feed(model, alone, read[index : index + 1])
        assert_same_memory(memory.select_rows([index]), alone)


@pytest.mark.parametrize("kind", ["pad_token_id", "eos_token_id"])
@torch.no_grad()
def test_padding_that_a_model_is_told_of_later_is_not_written(kind: str) -> None:
    """It counts what the configs say as it is fed."""
    model = tiny_model("llama", pad_token_id=None, eos_token_id=None)
    memory = blank(model)
    setattr(model.generation_config, kind, EOS)
    ids = tokens(1, 9, seed=3)
    ids[:, 5:] = EOS
    for piece in ids.split([6, 1, 1, 1], dim=1):  # as a row that has ended is fed while others are decoded
        feed(model, memory, piece)
    assert memory.tokens_seen.tolist() == [5 if kind == "pad_token_id" else 6]


# 4. Memory is data.


@torch.no_grad()
def test_a_memory_moves_between_dtypes(tmp_path: Path) -> None:
    model, ids = MODELS["llama"], tokens(1, 9, seed=17)
    remembering(model).save_pretrained(tmp_path)
    half = copy.deepcopy(model).to(torch.bfloat16)
    ours = feed(half, MemoryCache.from_pretrained(tmp_path, model=half), ids).float()
    theirs = feed(model, MemoryCache.from_pretrained(tmp_path, model=model), ids)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95


@torch.no_grad()
def test_a_model_may_change_its_dtype_before_a_memory_is_loaded(tmp_path: Path) -> None:
    model, ids = copy.deepcopy(MODELS["llama"]), tokens(1, 9, seed=17)
    saved, blank_before = remembering(model), blank(model)
    saved.save_pretrained(tmp_path)
    model.to(torch.bfloat16)
    expected = feed(model, MemoryCache.from_pretrained(tmp_path, model=model), ids)
    blank_before.load_state_dict(saved.state_dict())
    assert expected.dtype == torch.bfloat16 and torch.equal(feed(model, blank_before, ids), expected)


DAMAGES: dict[str, Any] = {
    "a tensor is missing": lambda held: dict(list(held.items())[1:]),
    "a tensor is unknown": lambda held: {**held, "attention.0.more": torch.zeros(1)},
    "other shapes": lambda held: {n: t[..., :-1] for n, t in held.items()},
    "other heads": lambda held: {n: t.repeat_interleave(2, 1) if t.dim() == 4 else t for n, t in held.items()},
    "no rows": lambda held: {n: t[0] for n, t in held.items()},
    "other dtypes": lambda held: {n: t.double() if t.dim() < 4 else t for n, t in held.items()},
    "not finite": lambda held: {n: t / 0 if t.is_floating_point() else t for n, t in held.items()},
    "more slots": lambda held: {n: t.repeat_interleave(3, 2 if t.dim() == 4 else 1) if t.dim() > 1 else t
                                for n, t in held.items()},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@torch.no_grad()
def test_a_refused_load_leaves_the_memory_in_use_as_it_was(damage: str) -> None:
    model = MODELS["llama"]
    memory, other = remembering(model), remembering(model, seed=70).state_dict()
    feed(model, memory, tokens(1, 8, seed=18))
    before, seen = memory.state_dict(), memory.get_seq_length()
    with pytest.raises(ValueError, match="memory"):
        memory.load_state_dict(DAMAGES[damage](other))
    assert_identical_memory(memory.state_dict(), before)
    assert memory.get_seq_length() == seen


@pytest.mark.parametrize("settings", [[], 3, "slots", None, {"tokenizer": 3}, {"slots": "many"}], ids=str)
def test_a_file_without_sensible_settings_is_refused(
    tmp_path: Path, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = remembering(MODELS["llama"])
    monkeypatch.setattr(file, "card", lambda description: "")
    file.save(memory.state_dict(), {**memory.description(), "attention_memory": settings}, tmp_path)
    with pytest.raises(ValueError, match=r"attention_memory|no setting|slots"):
        MemoryCache.from_pretrained(tmp_path, model=MODELS["llama"])


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "with an adapter"])
def test_its_card_says_what_it_is_and_how_to_load_it(tmp_path: Path, adapter: bool) -> None:
    remembering(DEFAULTS[0].model() if adapter else MODELS["llama"], **FEW_SLOTS).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| kept without training | 24 slots, surprise |" in card
    assert ("with a memory adapter" in card) == ("PeftModel" in card) == adapter


def test_a_memory_of_another_model_is_refused(tmp_path: Path) -> None:
    remembering(MODELS["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base model"):
        MemoryCache.from_pretrained(tmp_path, model=tiny_model("llama", seed=3))


# 5. Fixed size.


@pytest.mark.parametrize("policy", ["surprise", "recent"])
@pytest.mark.parametrize("pieces", [None, [41], [1]], ids=str)
@torch.no_grad()
def test_what_an_open_conversation_holds_is_context_but_for_a_bounded_rest(
    policy: str, pieces: list[int] | None
) -> None:
    """And between conversations what is held is what `nbytes` says."""
    model, rest = MODELS["llama"], []
    for length in (50, 200, 500) if pieces == [1] else (50, 500, 2000):
        memory = remembering(model, policy=policy)
        assert held_storage(memory.layers) == memory.nbytes and memory.context_nbytes == 0
        ids = tokens(1, length, seed=19)
        feed(model, memory, ids, pieces)
        rest.append(held_storage(memory.layers) - memory.nbytes - memory.context_nbytes)
    assert rest[2] <= 1.1 * rest[1] + ids.nbytes, rest  # of which the last pieces are views


@torch.no_grad()
def test_what_was_read_is_counted_however_long_ago() -> None:
    """Also when tokens were taken back; but not further than memory knows."""
    model, ids = MODELS["llama"], tokens(2, 300, seed=6)
    memories = [remembering(model, rows=2) for _ in range(2)]
    for memory, pieces in zip(memories, ([300], [7]), strict=True):
        feed(model, memory, ids, pieces)
    feed(model, memories[1], tokens(2, 60, seed=7))
    memories[1].forget(last=60)
    ours, theirs = (memory.attention_memory.reads.total for memory in memories)  # type: ignore[union-attr]
    assert theirs is not None and theirs.sum() > 30
    assert_close(ours, theirs)
    assert_same_memory(*memories)
    with pytest.raises(ValueError, match=r"200 tokens .* only the last"):
        memories[1].forget(last=200)


@torch.no_grad()
def test_memory_does_not_grow_with_what_was_said() -> None:
    """Neither in bytes nor in what attention sees."""
    model = MODELS["llama"]
    memory, sizes = blank(model), []
    for turn in range(12):
        talk(model, memory, [tokens(1, 40, seed=turn)])
        sizes.append(memory.nbytes)
        assert memory.layers[0].columns <= FEW_SLOTS["slots"] and memory.get_seq_length() == 0
    assert len(set(sizes[2:])) == 1


# 6. Off means off.


@every_architecture
@torch.no_grad()
def test_with_an_empty_memory_the_model_is_the_base_model(arch: str) -> None:
    """Bit for bit, and token for token; a model with other caches is not touched."""
    model, ids = MODELS[arch], tokens(2, 9, seed=20)
    expected = tiny_model(arch)(input_ids=ids, use_cache=True).logits
    memory = remembering(model, rows=2)
    memory.reset_memory()
    for empty in (memory, blank(model)):
        assert torch.equal(feed(model, empty, ids), expected)
    assert torch.equal(model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits, expected)
    plain = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert torch.equal(greedy(model, ids, blank(model), new=10), plain[:, 9:])


# What is kept.


def said(surprise: list[float], **columns: Any) -> Said:
    count = len(surprise)
    return Said(
        **{
            "token": torch.arange(10, 10 + count)[None],
            "surprise": torch.tensor([surprise]),
            "written": torch.ones(1, count, dtype=torch.bool),
            "same": torch.full((1, count), -1),
            "read": torch.zeros(1, 1),
            **columns,
        }
    )


def after(conversations: list[Said], **settings: Any) -> Slots:
    plain = {"span": 0, "keep_share": 1.0, "decay_rate": 1.0, "min_surprise": 0.0}
    read = {name: value for name, value in plain.items() if settings.get("policy", "surprise") in READ_BY[name]}
    config = AttentionMemoryConfig(**{"slots": 8, "sinks": 0, **read, **settings})
    slots = Slots.empty(1, 0, torch.device("cpu"))
    for conversation in conversations:
        slots, _ = consolidate(slots, conversation, config)
    return slots


def kept(*conversations: Said, **settings: Any) -> list[int]:
    """Which tokens of conversations stay, by their number."""
    return after(list(conversations), **settings).number[0].tolist()


A, B = [1.0, 9.0, 2.0, 8.0, 3.0], [5.0, 0.5, 7.0]


def check_slots() -> None:
    assert kept(said(A), said(B), slots=4) == [1, 3, 5, 7]
    assert kept(said(A), said(B), slots=7) == [0, 1, 2, 3, 4, 5, 7]


def check_policy() -> None:
    assert kept(said(A), said(B), slots=3, policy="recent") == [5, 6, 7]
    assert kept(said(A), said(B), slots=8, policy="all") == list(range(8))
    with pytest.raises(ValueError, match=r"8 tokens do not fit into slots=7"):
        kept(said(A), said(B), slots=7, policy="all")
    chance = [
        kept(said([0.0] * 64, token=torch.arange(64)[None] + 64 * n), slots=16, policy="random") for n in range(3)
    ]
    assert all(len(numbers) == 16 for numbers in chance) and chance[0] != chance[1] != chance[2]
    assert all(max(numbers) > 40 and min(numbers) < 24 for numbers in chance)


def check_keep_share() -> None:
    assert kept(said(A), keep_share=0.4) == [1, 3]
    assert kept(said(A), keep_share=0.6) == [1, 3, 4]


def check_span() -> None:
    assert kept(said([0.0, 9.0, 0.0, 0.0, 0.0, 8.0, 0.0]), span=1) == [1, 2, 5, 6]
    assert kept(said([0.0, 9.0, 0.0, 0.0, 0.0, 8.0, 0.0]), span=2) == [1, 2, 3, 5, 6]
    gap = torch.tensor([[True, True, False, True, True, True, True]])
    assert kept(said([0.0, 9.0, 0.0, 0.0, 0.0, 8.0, 0.0], written=gap), span=1) == [1, 2, 4, 5]


def check_sinks() -> None:
    assert kept(said([0.0, 0.0, 9.0, 8.0]), said(B), slots=4, sinks=2) == [0, 1, 2, 3]


def check_decay_rate() -> None:
    assert kept(said(A), *[said(B)] * 2, slots=2, decay_rate=1.0) == [1, 3]
    assert kept(said(A), *[said(B)] * 2, slots=2, decay_rate=0.5) == [8, 10]


def check_min_importance() -> None:
    assert kept(said(A), min_importance=2.5) == [1, 3, 4]
    assert kept(said(A), said(B), min_importance=2.5, decay_rate=0.3) == [1, 5, 7]


def check_min_surprise() -> None:
    """What was taken in stays, though it fades."""
    assert kept(said(A), min_surprise=2.5) == [1, 3, 4]
    assert kept(said(A), said(B), min_surprise=2.5, decay_rate=0.3) == [1, 3, 4, 5, 7]


def check_read_gain() -> None:
    """What is read stays."""
    read = torch.tensor([[2.0, 0.0]])
    assert kept(said(A), said(B, read=read), slots=2, read_gain=0.0) == [1, 3]
    assert kept(said([9.0, 8.0]), said([8.5]), slots=2, read_gain=0.0) == [0, 2]
    assert kept(said([9.0, 8.0]), said([8.5], read=read.flip(1)), slots=2, read_gain=1.0) == [0, 1]
    held = after([said([9.0, 8.0]), said([8.5], read=read)], read_gain=3.0, decay_rate=0.5)
    assert held.importance.tolist() == [[7.5, 4.0, 8.5]]


def check_sharpness() -> None:
    """The scores of remembered tokens are so many times as high."""
    model, queries = MODELS["llama"], torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    memories = [blank(model, sharpness=factor) for factor in (1.0, 2.0)]
    for memory in memories:
        talk(model, memory, CONVERSATIONS[:1])
        feed(model, memory, CONVERSATIONS[1])
    plain, sharp = (memory.layers[1] for memory in memories)
    assert torch.equal(sharp.memory_values, plain.memory_values) and torch.equal(sharp.memory_keys, plain.memory_keys)
    keys = [layer.keys[:, :, : layer.memory_length].transpose(2, 3) for layer in (plain, sharp)]
    assert_close(queries @ keys[1], 2 * queries @ keys[0])


def check_merge_similarity() -> None:
    """What is said again in the same words is not stored again, and lasts."""
    model = MODELS["llama"]
    held = []
    for threshold in (0.9, 1.1):
        memory = blank(model, slots=64, keep_share=1.0, merge_similarity=threshold, min_surprise=0.0)
        feed(model, memory, CONVERSATIONS[0])
        memory.clear_context()
        layer = memory.attention_memory
        assert layer is not None and layer.slots is not None
        first = layer.slots.size
        again = Said(
            CONVERSATIONS[0][:, :3],
            torch.full((1, 3), 5.0),
            torch.ones(1, 3, dtype=torch.bool),
            torch.tensor([[1, -1, 2]]),
            torch.zeros(1, 1),
        )
        slots, _ = consolidate(layer.slots, again, layer.config)
        assert slots.size == first + 1 and slots.importance[0, 1] >= 5 and slots.importance[0, 2] >= 5
        feed(model, memory, CONVERSATIONS[0])
        memory.clear_context()
        held.append(layer.slots.size)
    assert held[0] < held[1]


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", [field.name for field in fields(AttentionMemoryConfig)])
@torch.no_grad()
def test_every_setting_does_what_it_says(name: str) -> None:
    """A field without a check fails."""
    CHECKS[name]()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots=0"),
        ({"policy": "best"}, "policy='best'.*surprise"),
        ({"keep_share": 0}, "keep_share=0"),
        ({"keep_share": 1.5}, "keep_share=1.5"),
        ({"sharpness": 0.0}, "sharpness=0"),
        ({"sharpness": float("inf")}, "sharpness=inf"),
        ({"read_gain": float("inf")}, "read_gain=inf"),
        ({"decay_rate": float("nan")}, "decay_rate=nan"),
        ({"span": True}, "span=True"),
        ({"sinks": 30, "slots": 30}, "sinks=30.*no room"),
        (
            {"policy": "recent", "keep_share": 0.3},
            "keep_share=0.3 .*policy='recent'.* for policy='surprise' or 'random'",
        ),
        ({"policy": "random", "decay_rate": 0.5}, "decay_rate=0.5 .*policy='random'.* for policy='surprise'"),
        ({"slot": 12}, "'slot'; did you mean 'slots'"),
        ({"zzz": 12}, "there are slots, policy"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryCache.for_model(MODELS["llama"], **settings)


@every_architecture
@torch.no_grad()
def test_surprise_is_the_models_negative_log_likelihood(arch: str) -> None:
    model, ids = MODELS[arch], tokens(2, 9, seed=3)
    out = model(input_ids=ids, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert_close(token_surprise(model, out.hidden_states[-1][:, :-1], ids[:, 1:]), expected)
    memory = blank(model, keep_share=1.0, span=0, min_importance=0.0, min_surprise=0.0)
    talk(model, memory, [ids])
    layer = memory.attention_memory
    assert layer is not None and layer.slots is not None
    assert_close(layer.slots.surprise[:, 1:], expected)


@torch.no_grad()
def test_decay_forgets_in_the_end() -> None:
    """All but the sinks."""
    memory = remembering(MODELS["llama"])
    memory.decay(10_000)
    layer = memory.attention_memory
    assert layer is not None and layer.slots is not None
    assert layer.slots.number.tolist() == [[0, 1]] and memory.layers[0].columns == 2


@every_architecture
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_to_memory_is_the_models_own(arch: str, attention: str) -> None:
    """Of the middle layer, mean over heads; the same piece by piece, and of no account where nothing is written."""
    model, ids = copy.deepcopy(MODELS[arch]), tokens(2, 9, seed=8)
    model.set_attn_implementation(attention)
    before = remembering(model, rows=2)
    length = before.layers[0].columns
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    weights = reference(
        input_ids=ids, past_key_values=remembering(reference, rows=2), output_attentions=True
    ).attentions
    expected = weights[len(weights) // 2][..., :length].mean(1)
    for pieces in (None, [1], [4, 2]):
        memory = before.snapshot()
        feed(model, memory, ids, pieces)
        layer = memory.attention_memory
        assert layer is not None
        assert_close(torch.cat([columns for _, columns in layer.reads.recent], dim=1), expected)
    with before.read_only():
        feed(model, before, ids)
    assert before.attention_memory is not None
    assert before.attention_memory.reads.total is None


@torch.no_grad()
def test_attention_is_watched_no_longer_than_it_lasts() -> None:
    """Even when a pass fails."""
    model = copy.deepcopy(MODELS["llama"])
    memory = remembering(model)

    def fail(*_: Any) -> None:
        raise error

    projection = model.model.layers[len(model.model.layers) // 2].self_attn.o_proj
    for error in (RuntimeError(), KeyboardInterrupt()):
        hook = projection.register_forward_hook(fail)
        with pytest.raises(type(error)):
            feed(model, memory.snapshot(), tokens(1, 4))
        hook.remove()
    feed(model, memory, tokens(1, 4))
    assert not torch.overrides._get_current_function_mode_stack()


# A text has one beginning.


def opened(count: int, length: int, seed: int) -> torch.Tensor:
    """Conversations that open with the token with which texts begin."""
    ids = tokens(count, length, seed=seed)
    ids[ids == BOS] = BOS + 1
    ids[:, 0] = BOS
    return ids


@every_architecture
@pytest.mark.parametrize("pieces", [None, [1], [3, 2]], ids=str)
@torch.no_grad()
def test_a_later_conversation_begins_no_new_text(arch: str, pieces: list[int] | None) -> None:
    """Its opening token, with which memory begins already, is passed by."""
    model = tiny_model(arch)
    told, asked = opened(2, 7, seed=4), opened(2, 6, seed=5)
    memory = blank(model, policy="recent", sharpness=1.0, slots=7)
    feed(model, memory, told)
    memory.clear_context()
    ours = feed(model, memory, asked, pieces)[:, 1:]
    ids = torch.cat([told, asked], dim=1)
    mask = torch.ones_like(ids)
    mask[:, 7] = 0
    whole = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(13)[None].expand(2, -1)).logits[:, 8:]
    assert_close(ours, whole, "logits")
    assert memory.tokens_seen.tolist() == [12, 12]


@torch.no_grad()
def test_only_a_beginning_that_memory_holds_is_passed_by() -> None:
    """Row by row, and wherever padding is."""
    model = tiny_model("llama")
    told = torch.cat([opened(1, 7, seed=4), tokens(1, 7, seed=4) + 1])
    memory = blank(model)
    feed(model, memory, told)
    memory.clear_context()
    asked = opened(2, 6, seed=5)
    asked[:, 3] = BOS
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), asked], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    feed(model, memory, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    layer = memory.attention_memory
    assert layer is not None and layer.slots is not None
    assert layer.said[0].repeated.nonzero().tolist() == [[0, 2]]
    alone = memory.select_rows([0])
    alone.clear_context()
    layer = alone.attention_memory
    assert layer is not None and layer.slots is not None
    layer.forget_slots(layer.slots.number == 0)
    feed(model, alone, asked[:1])
    assert not layer.said[0].repeated.any()


# What a person sees.


@torch.no_grad()
def test_words_are_remembered_and_can_be_forgotten() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    memory = MemoryCache.for_model(model, tokenizer=tokenizer, keep_share=1.0)
    assert memory.remembered() == [] and memory.forget(matching="alice") == 0
    for text in ("my name is alice", "the sea"):
        feed(model, memory, tokenizer(text, return_tensors="pt").input_ids)
        memory.clear_context()
    told = [(part.text, part.conversations_ago) for part in memory.remembered()]
    assert any("alice" in text and ago == 2 for text, ago in told) and any(
        "sea" in text and ago == 1 for text, ago in told
    )
    assert "alice" in memory.summary()
    before = memory.nbytes
    assert memory.forget(matching="Alice") >= 1
    assert "alice" not in memory.summary() and "sea" in memory.summary() and memory.nbytes < before
    feed(model, memory, tokens(1, 3, seed=1))
    with pytest.raises(ValueError, match="open conversation"):
        memory.forget(matching="sea")
    memory.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        memory.forget(matching="sea")
    with pytest.raises(ValueError, match="one of last"):
        memory.forget()


@pytest.mark.parametrize(
    ("held", "wanted", "gone"),
    [
        ("name is barthol", "Bartholomew", "barthol"),
        ("omew is here", "Bartholomew", "omew"),
        ("bob and bob", "bob", "bobbob"),
        ("東京", "東京都", "東京"),
        ("a baritone is", "Bartholomew", ""),
        ("this is", "Israel", ""),
        ("flower", "Lowell", ""),
        ("sea", "sea", "sea"),
    ],
)
def test_what_is_forgotten_is_the_word_and_what_stayed_of_it(held: str, wanted: str, gone: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(held, return_tensors="pt").input_ids
    written = torch.ones_like(ids, dtype=torch.bool)
    slots = replace(
        Slots.empty(1, ids.shape[1], torch.device("cpu")), token=ids, number=written.cumsum(1) - 1, live=written
    )
    chosen = ids[slots_that_say(slots, tokenizer, wanted)]
    assert tokenizer.decode(chosen) == gone
