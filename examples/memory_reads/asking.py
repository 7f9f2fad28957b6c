"""Questions about what people told, read up to the reply: what an adapter reads there, and what is answered."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import senri_hf
from senri_hf.interpretability import captured
from senri_hf.tasks import Question, recall_episodes
from senri_hf.tasks.recall import load_data
from senri_hf.training import tell


ROWS = 16
IGNORED = -100


@dataclass
class Asked:
    """Questions about one kind of fact, one for each person, read up to the last token before the reply.

    Attributes:
        cache: What the person told, and the question.
        inputs: The last token of the question and the reply, as arguments of the model, [people, T].
        labels: The answer's tokens where they stand, -100 elsewhere, [people, T].
    """

    kind: str
    questions: list[Question]
    cache: senri_hf.MemoryCache
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """[people, T] which columns are no padding."""
        return self.inputs["attention_mask"][:, -self.labels.shape[1] :].bool()

    @property
    def following(self) -> torch.Tensor:
        """[people, T] the token of the answer that comes next, -100 where none does."""
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED)

    @property
    def predicting(self) -> torch.Tensor:
        """[people, T] where a token of the answer comes next."""
        return self.following != IGNORED

    @property
    def columns(self) -> torch.Tensor:
        """Those of T at which a token of anybody's answer comes next."""
        return self.predicting.any(0).nonzero()[:, 0]


def tokens_of(tokenizer: Any, question: Question) -> tuple[list[int], list[int], int]:
    """A question and its reply as ids, those of the answer in it (-100 elsewhere), and where the reply begins."""
    messages = [{"role": m["role"], "content": m["content"]} for m in question.conversation]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    reply = text.rindex(question.reply)
    start = reply + question.reply.lower().rindex(question.answer.lower())
    encoded = tokenizer(text[: reply + len(question.reply)], add_special_tokens=False, return_offsets_mapping=True)
    inside = [last > start and first < start + len(question.answer) for first, last in encoded["offset_mapping"]]
    labels = [i if here else IGNORED for i, here in zip(encoded["input_ids"], inside, strict=True)]
    return (
        encoded["input_ids"],
        labels,
        next(i for i, (_, last) in enumerate(encoded["offset_mapping"]) if last > reply),
    )


def told_and_asked(
    kinds: Sequence[str], people: int, split: str, seed: int
) -> Iterator[tuple[list[list[Any]], list[list[Question]]]]:
    """What people tell and ask, `ROWS` at a time: for every person conversations, and for every kind questions."""
    relations = {kind: [r["key"] for r in load_data()["relations"] if r["category"] == kind and r["split"] == "train"]
                 for kind in kinds}  # fmt: skip
    rng = random.Random(f"{split} {seed}")
    for start in range(0, people, ROWS):
        told: list[list[Any]] = []
        questions: list[list[Question]] = [[] for _ in kinds]
        for _ in range(min(ROWS, people - start)):
            one = [recall_episodes(1, split=split, relations=rng.choice(relations[kind]), seed=rng.randrange(10**9))[0]
                   for kind in kinds]  # fmt: skip
            conversations = [conversation for episode in one for conversation in episode.told]
            told.append(rng.sample(conversations, len(conversations)))
            for of_kind, episode in zip(questions, one, strict=True):
                of_kind.append(episode.questions[0])
        yield told, questions


@torch.no_grad()
def remembered(model: Any, tokenizer: Any, kinds: Sequence[str], people: int, split: str, seed: int) -> list[Asked]:
    """Questions to people who told a fact of every kind."""
    found = []
    for told, questions in told_and_asked(kinds, people, split, seed):
        memory = tell(model, tokenizer, told)
        found += [asked_after(model, tokenizer, memory, *pair) for pair in zip(kinds, questions, strict=True)]
        print(f"{split}: {sum(len(asked.questions) for asked in found)} questions read", flush=True)
    return found


def asked_after(
    model: Any, tokenizer: Any, memory: senri_hf.MemoryCache, kind: str, questions: list[Question]
) -> Asked:
    """Questions, read with a memory."""
    rows = [tokens_of(tokenizer, question) for question in questions]
    before = max(start for _, _, start in rows) - 1
    after = max(len(ids) - start for ids, _, start in rows) + 1
    pad, length = tokenizer.pad_token_id, before + after
    ids, labels, mask = torch.full((len(rows), length), pad), torch.full((len(rows), length), IGNORED), None
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (row_ids, row_labels, start) in enumerate(rows):
        place = slice(before + 1 - start, before + 1 - start + len(row_ids))
        ids[row, place], labels[row, place], mask[row, place] = torch.tensor(row_ids), torch.tensor(row_labels), 1
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = memory.snapshot()
    prompt = {
        "input_ids": ids[:, :before],
        "attention_mask": mask[:, :before],
        "position_ids": position_ids[:, :before],
    }
    model(**prompt, past_key_values=cache, logits_to_keep=1)
    inputs = {"input_ids": ids[:, before:], "attention_mask": mask, "position_ids": position_ids[:, before:]}
    return Asked(kind, questions, cache, inputs, labels[:, before:])


def answered(model: Any, asked: Asked) -> torch.Tensor:
    """Logits [people, columns, V] of what follows at the columns where answers are predicted."""
    logits: torch.Tensor = model(
        **asked.inputs, past_key_values=asked.cache.snapshot(), logits_to_keep=asked.columns
    ).logits
    return logits


@torch.no_grad()
def reads(model: Any, places: Sequence[str], questions: list[Asked]) -> list[list[torch.Tensor]]:
    """What readers at places add at replies, [tokens, d_in] for each of them: by questions."""
    found = []
    for asked in questions:
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(captured(model, place)) for place in places]
            answered(model, asked)
        found.append([output[0][asked.real].float() for output in outputs])
    return found


def log_likelihoods(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """log p of the tokens that follow, [people, columns], 0 where none counts."""
    chosen = logits.float().log_softmax(-1).gather(-1, following.clamp_min(0)[..., None])[..., 0]
    return chosen * (following != IGNORED)


@torch.no_grad()
def recalled(model: Any, questions: list[Asked]) -> dict[str, dict[str, float]]:
    """By kind: `exact`, the share of answers whose every token is the most likely one; `nats`, -log p of a token."""
    found: dict[str, dict[str, list[float]]] = {}
    for asked in questions:
        logits, following = answered(model, asked), asked.following[:, asked.columns]
        part = following != IGNORED
        right = (logits.argmax(-1) == following) | ~part
        entry = found.setdefault(asked.kind, {"exact": [], "nats": []})
        entry["exact"] += right.all(-1).double().tolist()
        entry["nats"] += (-log_likelihoods(logits, following).sum(-1) / part.sum(-1)).tolist()
    return {kind: {name: sum(v) / len(v) for name, v in entry.items()} for kind, entry in found.items()}
