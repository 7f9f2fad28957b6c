"""The chat: its context is what the template says, its memory what that leaves, and a failed turn leaves nothing."""

import contextlib
from typing import Any

import pytest
import torch
from chatting import TEMPLATES, byte_tokenizer, chat_model, word_tokenizer
from models import assert_close, assert_identical_memory, assert_same_memory, remembering, tiny_model, tokens
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList

from senri_hf import MemoryCache, MemoryChat
from senri_hf.chat import PLAIN_TEMPLATE


TOKENIZERS = {"bytes": byte_tokenizer, "words": word_tokenizer}
SAID = ["hello my name is Alice", "and now tell me", "what can you not tell", "and me"]


def rendered(chat: MemoryChat, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    template = PLAIN_TEMPLATE if chat.tokenizer.chat_template is None else None
    return chat.tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True, **kwargs)["input_ids"]


@torch.no_grad()
def read(model: PeftModel, memory: MemoryCache, ids: list[int], update: bool = True) -> None:
    with contextlib.nullcontext() if update else memory.read_only():
        model(input_ids=torch.tensor([ids]), past_key_values=memory)


def assert_same_context(model: PeftModel, ours: MemoryCache, theirs: MemoryCache) -> None:
    """The same keys and values: the next logits are the same."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    token = torch.tensor([[7]])
    with torch.no_grad():
        a, b = (model(input_ids=token, past_key_values=memory.snapshot()).logits for memory in (ours, theirs))
    assert_close(a, b, "logits")


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def model(words: PreTrainedTokenizerFast) -> PeftModel:
    return chat_model(words)


@pytest.fixture
def chat(model: PeftModel, words: PreTrainedTokenizerFast) -> MemoryChat:
    return MemoryChat(model, words)


@pytest.mark.parametrize(("kind", "arch"), [("words", "llama"), ("bytes", "llama"), ("bytes", "gemma3")])
@pytest.mark.parametrize("template", TEMPLATES)
def test_context_and_memory_are_those_of_the_whole_conversation(kind: str, template: str, arch: str) -> None:
    tokenizer = TOKENIZERS[kind](TEMPLATES[template])
    model = chat_model(tokenizer, arch)
    chat = MemoryChat(model, tokenizer)
    for turn, text in enumerate(SAID[:3]):
        pieces: list[str] = []
        reply, info = chat.say(text, max_new_tokens=24, streamer=pieces.append)
        assert "".join(pieces) == reply
        assert chat.history[2 * turn :] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": reply},
        ]
        assert chat.context_ids == rendered(chat, chat.history)
        assert 1 <= info.tokens_generated <= 24
    whole = MemoryCache.for_model(model)
    read(model, whole, chat.context_ids)
    assert_same_context(model, chat.memory, whole)
    assert_same_memory(chat.memory, whole)


def test_replies_are_those_of_generate(chat: MemoryChat, model: PeftModel) -> None:
    memory = MemoryCache.for_model(model)
    for text in SAID[:2]:
        prompt = rendered(chat, [*chat.history, {"role": "user", "content": text}], add_generation_prompt=True)
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=memory.snapshot(), max_new_tokens=12
        )
        reply, _ = chat.say(text, max_new_tokens=12)
        assert reply == chat.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        memory = chat.memory.snapshot()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_turn_has_its_own_memory_update(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    model = chat_model(tokenizer)
    chat, whole = MemoryChat(model, tokenizer), MemoryCache.for_model(model)
    before = 0
    for text, update in zip(SAID[:3], (True, False, True), strict=True):
        _, info = chat.say(text, update_memory=update, max_new_tokens=70)
        ids = chat.context_ids
        read(model, whole, ids[before:], update)
        assert info.tokens_written == update * (len(ids) - before)
        before = len(ids)
    assert_same_context(model, chat.memory, whole)
    assert_same_memory(chat.memory, whole)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_replies_are_not_written_when_the_adapter_says_so(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    model = chat_model(tokenizer, write_generated=False)
    chat, whole = MemoryChat(model, tokenizer), MemoryCache.for_model(model)
    before = 0
    for text in SAID[:2]:
        said = [*chat.history, {"role": "user", "content": text}]
        _, info = chat.say(text, max_new_tokens=70)
        prompt = rendered(chat, said, add_generation_prompt=True)
        read(model, whole, prompt[before:])
        read(model, whole, chat.context_ids[len(prompt) :], update=False)
        assert info.tokens_written == info.tokens_read == len(prompt) - before
        before = len(chat.context_ids)
    assert_same_memory(chat.memory, whole)


def test_without_update_nothing_changes(model: PeftModel, words: PreTrainedTokenizerFast) -> None:
    chat = MemoryChat(model, words, remembering(model))
    before = chat.memory.state_dict()
    reply, info = chat.say(SAID[0], update_memory=False, max_new_tokens=8)
    assert_identical_memory(before, chat.memory.state_dict())
    assert info.tokens_written == 0 and len(chat.context_ids) > 8
    chat.new_conversation()
    assert_identical_memory(before, chat.memory.state_dict())
    assert chat.say(SAID[0], max_new_tokens=8)[0] == reply


def test_memory_is_read_from_the_next_conversation_on(chat: MemoryChat, model: PeftModel) -> None:
    first = [chat.say(text, max_new_tokens=12)[0] for text in SAID]
    with model.disable_adapter():
        base = MemoryChat(model, chat.tokenizer)
        assert [base.say(text, max_new_tokens=12)[0] for text in SAID] == first
    chat.new_conversation()
    assert chat.history == [] and chat.context_ids == [] and chat.memory.get_seq_length() == 0
    seen = chat.memory.tokens_seen.item()
    assert seen > 0
    assert [chat.say(text, max_new_tokens=12)[0] for text in SAID] != first
    chat.reset()
    assert chat.history == [] and chat.memory.tokens_seen.numel() == 0
    assert [chat.say(text, max_new_tokens=12)[0] for text in SAID] == first


def test_clearing_the_memorys_context_is_a_new_conversation(chat: MemoryChat) -> None:
    chat.say(SAID[0], max_new_tokens=4)
    chat.memory.clear_context()
    chat.say(SAID[1], max_new_tokens=4)
    assert [message["role"] for message in chat.history] == ["user", "assistant"]
    assert chat.history[0]["content"] == SAID[1]
    assert chat.context_ids == rendered(chat, chat.history)


class Broken(Exception):
    """Raised by a streamer."""


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("turns", [0, 1])
def test_a_failed_turn_leaves_nothing(
    model: PeftModel, words: PreTrainedTokenizerFast, turns: int, error: type[BaseException]
) -> None:
    chat, other = MemoryChat(model, words, remembering(model)), MemoryChat(model, words, remembering(model))
    for text in SAID[:turns]:
        assert chat.say(text, max_new_tokens=6)[0] == other.say(text, max_new_tokens=6)[0]
    history, context, state = chat.history, chat.context_ids, chat.memory.state_dict()

    def fail(piece: str) -> None:
        raise error

    with pytest.raises(error):
        chat.say(SAID[2], max_new_tokens=20, streamer=fail)
    assert (chat.history, chat.context_ids) == (history, context)
    assert chat.memory.get_seq_length() == len(context)
    assert_identical_memory(state, chat.memory.state_dict())
    assert chat.say(SAID[3], max_new_tokens=6)[0] == other.say(SAID[3], max_new_tokens=6)[0]
    assert_identical_memory(other.memory.state_dict(), chat.memory.state_dict())


def test_a_stopped_reply_is_a_shorter_reply(chat: MemoryChat) -> None:
    pieces: list[str] = []

    def enough(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([len(pieces) >= 3])

    reply, info = chat.say(
        SAID[0], max_new_tokens=60, streamer=pieces.append, stopping_criteria=StoppingCriteriaList([enough])
    )
    assert info.tokens_generated < 60 and "".join(pieces) == reply
    assert chat.context_ids == rendered(chat, chat.history)


def test_plain_replies_end_where_the_model_writes_for_the_user(model: PeftModel) -> None:
    tokenizer = byte_tokenizer(None)
    chat = MemoryChat(chat_model(tokenizer), tokenizer)
    script = tokenizer("Well.\nUsual\nUser: and").input_ids

    def follow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        start = len(rendered(chat, [{"role": "user", "content": "hello"}], add_generation_prompt=True))
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([script[ids.shape[1] - start]]), 0.0)

    pieces: list[str] = []
    reply, _ = chat.say("hello", max_new_tokens=len(script), streamer=pieces.append, logits_processor=[follow])
    assert reply == "Well.\nUsual" == "".join(pieces)
    assert tokenizer.decode(chat.context_ids) == "<bos>User: hello\nAssistant: Well.\nUsual\n"


def test_sampling_and_cost(chat: MemoryChat) -> None:
    greedy, info = chat.say(SAID[0], max_new_tokens=16)
    assert info.tokens_read == len(rendered(chat, chat.history[:1], add_generation_prompt=True))
    assert info.tokens_written == len(chat.context_ids)
    assert info.memory_bytes == chat.memory.nbytes > 0
    assert info.seconds_per_token == pytest.approx(info.seconds / info.tokens_generated) and info.seconds > 0
    chat.reset()
    assert chat.say(SAID[0], max_new_tokens=16, do_sample=True, temperature=9.0)[0] != greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "a message is a text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 5000}, "new_conversation"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(chat: MemoryChat, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat.say(**{"text": SAID[0], **arguments})
    assert chat.history == [] and chat.memory.get_seq_length() == 0


def test_memories_that_are_no_chats_are_refused(model: PeftModel, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="2 rows"):
        MemoryChat(model, words, remembering(model, rows=2))
    memory = MemoryCache.for_model(model)
    read(model, memory, tokens(1, 5)[0].tolist())
    with pytest.raises(ValueError, match="clear_context"):
        MemoryChat(model, words, memory)


def test_a_plain_model_remembers_without_training(words: PreTrainedTokenizerFast) -> None:
    chat = MemoryChat(tiny_model("llama", vocab_size=len(words)), words)
    chat.say(SAID[0], max_new_tokens=4)
    chat.new_conversation()
    assert chat.memory.remembered() and "remembers" in chat.memory.summary()


def test_a_context_that_something_else_was_read_into_is_refused(chat: MemoryChat, model: PeftModel) -> None:
    chat.say(SAID[0], max_new_tokens=4)
    read(model, chat.memory, [7, 8])
    with pytest.raises(ValueError, match="something else"):
        chat.say(SAID[1], max_new_tokens=4)
    chat.new_conversation()
    chat.say(SAID[1], max_new_tokens=4)
