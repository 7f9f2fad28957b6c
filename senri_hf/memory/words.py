"""The tokens that memory holds, as the words that a person reads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .attention_memory import Slots


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
    """What a row remembers, oldest first."""
    token, surprise = slots.token[row].tolist(), slots.surprise[row].tolist()
    said, now = slots.conversation[row].tolist(), int(slots.conversations[row])
    return [
        Remembered(
            str(tokenizer.decode([token[index] for index in run])),
            max(surprise[index] for index in run),
            now - said[run[0]],
        )
        for run in runs(slots, row)
    ]


def slots_that_say(slots: Slots, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """[B, M] the slots of the tokens that say `text`, in any case."""
    found = torch.zeros_like(slots.live)
    wanted = text.casefold()
    for row in range(slots.batch_size):
        token = slots.token[row].tolist()
        for run in runs(slots, row):
            ends = [len(str(tokenizer.decode([token[i] for i in run[: n + 1]])).casefold()) for n in range(len(run))]
            whole = str(tokenizer.decode([token[i] for i in run])).casefold()
            start = whole.find(wanted)
            while start >= 0:
                stop = start + len(wanted)
                for place, index in enumerate(run):
                    begins = ends[place - 1] if place else 0
                    if begins < stop and ends[place] > start:
                        found[row, index] = True
                start = whole.find(wanted, start + 1)
    return found
