"""Texts and chats as rows of tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .episodes import IGNORED, encode_conversation


BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Characters of one document of ordinary text: paragraphs that follow one another.
DOCUMENT = 4000
HELD_OUT = 0.1
RECALL_CHATS = {"train": 2000, "test": 200}


def load_rows(name: str, subset: str | None, split: str) -> Any:
    """The rows of a data set: `ordinary_text`, `recall`, a file, or one on the Hub (see `TrainingSection`).

    Raises:
        ValueError: for a split or subset that there is not. OSError: when it cannot be read.
    """
    if name in ("ordinary_text", "recall"):
        if split not in ("train", "test"):
            raise ValueError(f"split {split!r} was asked for, but {name} has 'train' and 'test'")
        return ordinary_text_rows(subset, split) if name == "ordinary_text" else recall_rows(split)
    from datasets import load_dataset

    path = Path(name)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise OSError(f"dataset_name={name} was given, but there is no such file")
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split)
    return load_dataset(name, subset, split=split)


def ordinary_text_rows(subset: str | None, split: str) -> list[dict[str, str]]:
    """Stretches of books; the last tenth of each book is held out as `test`."""
    from ..tasks.text import TEXT_SOURCES, ordinary_text

    rows = []
    for source in [subset] if subset else TEXT_SOURCES[:-1]:
        paragraphs = ordinary_text(source)
        cut = round(len(paragraphs) * (1 - HELD_OUT))
        document = ""
        for paragraph in paragraphs[:cut] if split == "train" else paragraphs[cut:]:
            document += ("\n\n" if document else "") + paragraph
            if len(document) >= DOCUMENT:
                rows.append({"text": document})
                document = ""
        if document:
            rows.append({"text": document})
    return rows


def recall_rows(split: str) -> list[dict[str, Any]]:
    """Chats in which someone is told something about a person and asked for it again."""
    from ..tasks import recall_episodes

    episodes = recall_episodes(
        RECALL_CHATS[split], split="train" if split == "train" else "validation", facts=1, seed=0
    )
    return [{"messages": [message for said in episode.conversations for message in said]} for episode in episodes]


def encode_chats(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, field: str, max_length: int
) -> list[dict[str, list[int]]]:
    """Chats through the chat template, the assistant's answers labelled; those without a label are left out."""
    encoded = []
    for row in rows:
        messages = [
            {**{key: message[key] for key in ("role", "content")}, "train": message["role"] == "assistant"}
            for message in column(row, field)
        ]
        one = encode_conversation(tokenizer, messages, max_length)
        if any(label != IGNORED for label in one["labels"]):
            encoded.append({"input_ids": one["input_ids"], "labels": one["labels"]})
    return encoded


def pack_texts(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, field: str, max_length: int
) -> list[dict[str, list[int]]]:
    """Texts one after another in rows of exactly `max_length` tokens.

    Positions start anew with every document, by which attention and routing keep them apart. A document that does not
    end with its row goes on in the next one as a document that begins: with the tokens that the tokenizer puts before a
    text, which some models do not read without. A document's first token is not learned: what precedes it says nothing
    of it. What is left over at the end is dropped.

    Raises:
        ValueError: when a row has no room for more than those tokens.
    """
    begin = tokens_before(tokenizer)
    if max_length <= len(begin):
        raise ValueError(
            f"max_length={max_length} was given, but each row begins with {len(begin)} tokens of the tokenizer's own"
        )
    packed, ids, positions = [], [], []  # type: ignore[var-annotated]
    for document in encoded_texts(rows, tokenizer, field):
        while document:
            piece = [*begin, *document][: max_length - len(ids)]
            document = document[max(len(piece) - len(begin), 0) :]
            ids += piece
            positions += range(len(piece))
            if len(ids) == max_length:
                labels = [IGNORED if position == 0 else token for token, position in zip(ids, positions, strict=True)]
                packed.append({"input_ids": ids, "labels": labels, "position_ids": positions})
                ids, positions = [], []
    return packed


def tokens_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord: a token of the beginning, or nothing."""
    given, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return given[: given.index(bare[0])] if bare and bare[0] in given else []


def encoded_texts(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, field: str
) -> Iterator[list[int]]:
    """The ids of every text, with an end token where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        ids = tokenizer(column(row, field), add_special_tokens=False)["input_ids"]
        if ids:
            yield ids + end


def column(row: dict[str, Any], field: str) -> Any:
    """A row's value, or a ValueError that names the columns that there are."""
    if field not in row:
        raise ValueError(f"text_field={field!r} was given, but the data has the columns {sorted(row)}")
    return row[field]


@dataclass
class RowCollator:
    """Rows of tokens as a batch, padded on the right; packed rows, which are of one length, keep their positions.

    Args:
        pad_token_id: What pads.
        with_prompt_lengths: Also say how many tokens of each row come before its first label, for hybrid routing.
    """

    pad_token_id: int
    with_prompt_lengths: bool = False

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        if "position_ids" in rows[0]:
            return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        padded: dict[str, list[list[int]]] = {name: [] for name in fill}
        for row in rows:
            whole = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for name, value in fill.items():
                padded[name].append(whole[name] + [value] * (length - len(row["input_ids"])))
        batch = {name: torch.tensor(values) for name, values in padded.items()}
        if self.with_prompt_lengths:
            batch["prompt_lengths"] = (batch["labels"] != IGNORED).int().argmax(1)
        return batch
