"""Episodes as tokens: conversations of one person in order, and the words in them that are to be learned."""

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase


IGNORED = -100


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], max_length: int | None = None
) -> dict[str, list[int]]:
    """A conversation through the model's own chat template.

    Args:
        messages: Chat messages with `role` and `content`. `"train": True` marks an answer to be learned, `"keep": True`
            one at which the model is to stay as it is without memory. A single message of role `"text"` is plain text,
            read as it is, without the template.
        max_length: Tokens to keep, the last ones.

    Returns:
        `input_ids`; `labels`, the ids where an answer is to be learned and -100 elsewhere; `keep`, 1 where the model is
        to stay as it is.

    Raises:
        ValueError: when the tokenizer has no chat template, or a marked message is not the assistant's.
    """
    if messages[0]["role"] == "text":
        return encode_text(tokenizer, messages, max_length)
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, so conversations cannot be written as text. Set "
            "tokenizer.chat_template, or load the model with senri_hf.load_base"
        )
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels, keep = [IGNORED] * len(ids), [0] * len(ids)
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
        for position, (first, last) in enumerate(offsets):
            if start <= first < stop and last > first:
                if message.get("train"):
                    labels[position] = ids[position]
                if message.get("keep"):
                    keep[position] = 1
    cut = slice(-max_length, None) if max_length is not None else slice(None)
    return {"input_ids": ids[cut], "labels": labels[cut], "keep": keep[cut]}


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
    return {"input_ids": ids, "labels": [IGNORED] * len(ids), "keep": [int(bool(message.get("keep")))] * len(ids)}


def learned_columns(wanted: Tensor) -> Tensor:
    """The columns whose next token is wanted, [B, T], in some row: those whose logits are needed."""
    return wanted.any(0)[1:].nonzero()[:, 0]
