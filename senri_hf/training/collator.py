"""Episodes of different lengths as one batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .episodes import IGNORED, encode_conversation


@dataclass
class EpisodeCollator:
    """Makes a batch of episodes, each `{"conversations": [...]}`.

    A conversation is a list of chat messages, or `{"input_ids": [...], "labels": [...]}` made by `encode_conversation`.
    A reply that is to be learned may say, as `"told_in"`, in which conversation of its episode its answer was told.
    Episodes of a batch may have different numbers of conversations: the last ones stand side by side, and a row that
    has none yet is all padding, which memory passes by.

    Args:
        padding_side: `"right"` or `"left"`.
        max_length: Tokens of a conversation to keep, the last ones.

    Returns (when called):
        `{"conversations": [...]}`, for every step a dict of `input_ids`, `attention_mask`, `labels`, `judged` (the
        tokens by which a reply is judged) and `keep` [B, T]; `told_ago` [B], how many conversations ago the answer was
        told, 0 where that is not said; and `learns`, `keeps`: whether any token of it is labelled, or marked to stay
        as it is without memory.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: str = "right"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} was given, but it must be 'left' or 'right'")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token; set tokenizer.pad_token, for example to its eos_token"
            )

    def __call__(self, episodes: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [[self.encode(conversation) for conversation in episode["conversations"]] for episode in episodes]
        if not all(rows):
            raise ValueError("An episode has no conversation; every episode needs at least one")
        steps = max(len(row) for row in rows)
        nothing: dict[str, list[int]] = {"input_ids": [], "labels": [], "judged": [], "keep": []}
        aligned = [[nothing] * (steps - len(row)) + row for row in rows]
        batch = [self.pad([row[step] for row in aligned]) for step in range(steps)]
        told_ago = torch.zeros(steps, len(rows), dtype=torch.long)
        for row, episode in enumerate(episodes):
            conversations = episode["conversations"]
            told_ago[steps - len(conversations) :, row] = torch.tensor(list(map(ago, range(steps), conversations)))
        return {"conversations": [step | {"told_ago": told_ago[index]} for index, step in enumerate(batch)]}

    def encode(self, conversation: Any) -> dict[str, list[int]]:
        if isinstance(conversation, dict):
            size = len(conversation["input_ids"])
            whole = {"labels": [IGNORED] * size, "keep": [0] * size, **conversation}
            whole.setdefault("judged", [int(label != IGNORED) for label in whole["labels"]])
            cut = slice(-self.max_length, None) if self.max_length is not None else slice(None)
            return {name: values[cut] for name, values in whole.items()}
        return encode_conversation(self.tokenizer, conversation, self.max_length)

    def pad(self, conversations: list[dict[str, list[int]]]) -> dict[str, Tensor | bool]:
        length = max(len(conversation["input_ids"]) for conversation in conversations)
        fill = {
            "input_ids": self.tokenizer.pad_token_id,
            "labels": IGNORED,
            "judged": 0,
            "keep": 0,
            "attention_mask": 0,
        }
        columns: dict[str, list[list[int]]] = {name: [] for name in fill}
        for conversation in conversations:
            real = conversation | {"attention_mask": [1] * len(conversation["input_ids"])}
            for name, value in fill.items():
                padding = [value] * (length - len(conversation["input_ids"]))
                columns[name].append(padding + real[name] if self.padding_side == "left" else real[name] + padding)
        batch: dict[str, Tensor | bool] = {name: torch.tensor(column) for name, column in columns.items()}
        batch["learns"] = any(label != IGNORED for row in columns["labels"] for label in row)
        batch["keeps"] = any(kept for row in columns["keep"] for kept in row)
        return batch


def ago(index: int, conversation: Any) -> int:
    """How many conversations before this one, the episode's `index`-th, its answer was told; 0 where it is not said."""
    told_in = None if isinstance(conversation, dict) else conversation[-1].get("told_in")
    if told_in is None:
        return 0
    if not 0 <= told_in < index:
        raise ValueError(
            f"told_in={told_in} was given in conversation {index} of an episode, but it must name an earlier one"
        )
    return index - int(told_in)
