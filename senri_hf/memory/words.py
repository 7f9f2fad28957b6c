"""The tokens that memory holds, as the words that a person reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .attention_memory import Slots


# Characters from which on a part of a word is taken for it.
LEAST = 3


@dataclass(frozen=True)
class Remembered:
    """Tokens that stood side by side in a conversation and were kept.

    Attributes:
        text: What they say.
        surprise: The largest of their surprises, in nats.
        conversations_ago: 1 for the last conversation.
    """

    text: str
    surprise: float
    conversations_ago: int


def runs(slots: Slots, row: int) -> list[list[int]]:
    """The slots of a row, those of neighbouring tokens of one conversation together."""
    live = slots.live[row].tolist()
    number, conversation = slots.number[row].tolist(), slots.conversation[row].tolist()
    found: list[list[int]] = []
    for index in (index for index, alive in enumerate(live) if alive):
        last = found[-1][-1] if found else None
        follows = last is not None and (number[last] + 1, conversation[last]) == (number[index], conversation[index])
        found[-1].append(index) if follows else found.append([index])
    return found


def remembered(slots: Slots, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> list[Remembered]:
    """What a row remembers, oldest first, but for what says nothing: special tokens and spaces alone."""
    token, surprise = slots.token[row].tolist(), slots.surprise[row].tolist()
    said, now = slots.conversation[row].tolist(), int(slots.conversations[row])
    found = []
    for run in runs(slots, row):
        ids = [token[index] for index in run]
        if str(tokenizer.decode(ids, skip_special_tokens=True)).strip():
            text, most = str(tokenizer.decode(ids)), max(surprise[index] for index in run)
            found.append(Remembered(text, most, now - said[run[0]]))
    return found


def slots_that_say(slots: Slots, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """[B, M] the slots of the tokens that say `text`, in any case.

    Also where only its beginning was kept, at the end of what stands together, or its end, at the beginning.
    """
    found = torch.zeros_like(slots.live)
    wanted = text.casefold().strip()
    for row in range(slots.batch_size):
        token = slots.token[row].tolist()
        for run in runs(slots, row):
            upto = [str(tokenizer.decode([token[i] for i in run[:n]])).casefold() for n in range(len(run) + 1)]
            for start, stop in places(upto[-1], wanted):
                for place, index in enumerate(run):
                    # A character of which some bytes are still to come is not said yet.
                    if len(upto[place].rstrip("\ufffd")) < stop and len(upto[place + 1]) > start:
                        found[row, index] = True
    return found


def places(said: str, wanted: str) -> list[tuple[int, int]]:
    """Where `wanted` is said, from and to; and where it begins at the end of `said`, or ends at its beginning.

    A part has at least LEAST characters, or half of a short word, and stands apart from other words.
    """
    found = [(start, start + len(wanted)) for start in range(len(said)) if said.startswith(wanted, start)]
    for size in range(min(LEAST, (len(wanted) + 1) // 2), min(len(wanted), len(said) + 1)):
        begins, ends = len(said) - size, size
        if said.endswith(wanted[:size]) and not said[:begins][-1:].isalnum():
            found.append((begins, len(said)))
        if said.startswith(wanted[-size:]) and not said[ends : ends + 1].isalnum():
            found.append((0, ends))
    return found
