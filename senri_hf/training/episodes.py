"""Episodes as tokens: conversations of one person in order, and the words in them that are to be learned."""

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


IGNORED = -100


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], max_length: int | None = None
) -> dict[str, list[int]]:
    """A conversation through the model's own chat template.

    Args:
        messages: Chat messages with `role` and `content`. `"train": True` marks a reply to be learned, in which
            `"answer"` may name the words that count when it is judged; `"keep": True` marks one at which the model is
            to stay as it is without memory. A single message of role `"text"` is plain text, read as it is, without
            the template.
        max_length: Tokens to keep, the last ones.

    Returns:
        `input_ids`; `labels`, the ids where a reply is to be learned and -100 elsewhere; `judged`, 1 where it has to be
        right, which is at its answer, or everywhere if it names none; `keep`, 1 where the model is to stay as it is.

    Raises:
        ValueError: when the tokenizer has no chat template, a marked message is not the assistant's, or a reply does
            not hold its answer.
    """
    if messages[0]["role"] == "text":
        return encode_text(tokenizer, messages, max_length)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, so conversations cannot be written as text. Set "
            "tokenizer.chat_template, or load the model with senri_hf.load_base"
        )
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = cast(str, tokenizer.apply_chat_template(plain, tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels, judged, keep = [IGNORED] * len(ids), [0] * len(ids), [0] * len(ids)
    for index, message in enumerate(messages):
        if not message.get("train") and not message.get("keep"):
            continue
        if message["role"] != "assistant":
            raise ValueError(
                f"A message of role {message['role']!r} is marked to be learned; only the assistant's can be"
            )
        start = len(tokenizer.apply_chat_template(plain[:index], tokenize=False, add_generation_prompt=True))
        upto = cast(str, tokenizer.apply_chat_template(plain[: index + 1], tokenize=False))
        stop = len(upto.rstrip())
        begin, end = answer_span(message, text, start, stop)
        for position, (first, last) in enumerate(offsets):
            if start <= first < stop and last > first:
                if message.get("train"):
                    labels[position] = ids[position]
                    judged[position] = int(first < end and last > begin)
                if message.get("keep"):
                    keep[position] = 1
    cut = slice(-max_length, None) if max_length is not None else slice(None)
    return {"input_ids": ids[cut], "labels": labels[cut], "judged": judged[cut], "keep": keep[cut]}


def answer_span(message: dict[str, Any], text: str, start: int, stop: int) -> tuple[int, int]:
    """Where in `text` a reply's answer begins and ends; the reply stands from `start` to `stop`."""
    answer = message.get("answer")
    if answer is None:
        return start, stop
    begin = text.lower().find(answer.lower(), start, stop)
    if not answer or begin < 0:
        raise ValueError(f"answer={answer!r} was given for the reply {message['content']!r}, which does not hold it")
    return begin, begin + len(answer)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], max_length: int | None
) -> dict[str, list[int]]:
    """A conversation that is one plain text; its first `max_length` tokens."""
    (message,) = messages if len(messages) == 1 else (None,)
    if message is None or message.get("train"):
        raise ValueError(
            'A message of role "text" is a whole conversation and is not learned: it stands alone, without "train"'
        )
    ids = tokenizer(message["content"], truncation=max_length is not None, max_length=max_length)["input_ids"]
    unlearned = {"labels": [IGNORED] * len(ids), "judged": [0] * len(ids)}
    return {"input_ids": ids, **unlearned, "keep": [int(bool(message.get("keep")))] * len(ids)}


def learned_columns(wanted: Tensor) -> Tensor:
    """The columns whose next token is wanted, [B, T], in some row: those whose logits are needed."""
    return wanted.any(0)[1:].nonzero()[:, 0]


def before(wanted: Tensor) -> Tensor:
    """Where the next token is wanted, [B, T]: whose logits are needed. Nothing predicts a row's first token."""
    return nn.functional.pad(wanted[:, 1:], (0, 1))
