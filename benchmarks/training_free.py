"""Recall of memory without training: by policy and slots, beside the whole context, its text, and a trained adapter.

    python benchmarks/training_free.py --model smollm2-135m-instruct --episodes 40 --seeds 2

Facts are told in as many conversations, others about other things may follow, and all facts are asked, each in a
conversation of its own that starts from the same memory. The reply is begun for the model up to the value ("Your name
is"), as a small base model otherwise declines to answer, and `generate()` goes on until the value would be there; every
method gets the same start. Values and phrasings are of the validation split. Each row says how many minutes are left;
what is done already is read from `--output`, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from training_free_page import write_page
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import senri_hf
from senri_hf.commands.chat import shipped_adapter
from senri_hf.tasks import Episode, Question, recall_episodes, score_reply
from senri_hf.training import ask, tell


ROWS = 25
SLACK = 3  # tokens that may stand before a value or in it beyond those of the value itself
SUITES: dict[str, dict[str, Any]] = {
    "five facts": {"facts": 5, "questions": 5},
    "names": {"relations": "name"},
    "after a correction": {"facts": 3, "correction": True},
}
SLOTS = (64, 128, 256, 512, 1024)
POLICIES = ("surprise", "recent", "random")
BASELINES = ("no memory", "kept in context", "text prepended", "trained adapter")
HEADING = "Here is what we talked about before:"


def plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Chat messages without what training adds to them."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def lead_of(question: Question) -> str:
    """The reply up to its value."""
    return question.reply[: question.reply.casefold().index(question.answer.casefold())].rstrip()


def text_of(tokenizer: Any, episode: Episode, question: Question, told: int, method: str) -> str:
    """What the model reads of a question after the first `told` conversations, with the reply begun."""
    asked = plain(question.messages)
    before = [message for conversation in episode.told[:told] for message in plain(conversation)]
    if method == "kept in context":
        asked = before + asked
    if method == "text prepended":
        said = "\n".join(f"{message['role']}: {message['content']}" for message in before)
        asked = [{"role": "user", "content": f"{HEADING}\n{said}\n\n{asked[-1]['content']}"}]
    return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)) + lead_of(question)


class ValueWouldBeThere(StoppingCriteria):
    """Ends a row where its first sentence ends, or once as many tokens are there as its value needs and some more."""

    def __init__(self, start: int, budgets: torch.Tensor, ends: torch.Tensor) -> None:
        self.start, self.budgets, self.ends = start, budgets, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids.shape[1] - self.start >= self.budgets) | torch.isin(input_ids[:, -1], self.ends)


def sentence_ends(tokenizer: Any) -> torch.Tensor:
    """Ids of the tokens that end a sentence or a line."""
    ends = [i for i in range(len(tokenizer)) if any(mark in tokenizer.decode([i]) for mark in ".\n")]
    return torch.tensor([*ends, tokenizer.eos_token_id])


def left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask, [B, T]."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones(len(row)).long() for row in rows], batch_first=True, padding_side="left")
    return ids, mask


def shared(rows: list[list[int]]) -> int:
    """Ids with which all rows begin, less than all of any row."""
    longest = min(len(row) for row in rows) - 1
    return next((i for i in range(longest) if len({row[i] for row in rows}) > 1), longest)


@dataclass
class Reader:
    """A model that is asked, with what every question needs."""

    model: Any
    tokenizer: Any
    ends: torch.Tensor

    @torch.no_grad()
    def answer(self, texts: list[list[str]], values: list[list[str]], memory: Any) -> list[list[str]]:
        """Replies to several questions for every row, each from the memory as it is.

        What a row's questions begin with, the same for all, is read once; then memory and context are forked.
        """
        rows = [[self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in texts]
        starts = [shared(row) for row in rows]
        pad, each = self.tokenizer.pad_token_id, len(rows[0])
        cache = DynamicCache(config=self.model.config) if memory is None else memory.snapshot()
        first, first_mask = left_padded([row[0][:start] for row, start in zip(rows, starts, strict=True)], pad)
        positions = (first_mask.cumsum(1) - 1).clamp_min(0)
        self.model(
            input_ids=first,
            attention_mask=first_mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(each)
        rest = [ids[start:] for row, start in zip(rows, starts, strict=True) for ids in row]
        ids, mask = left_padded(rest, pad)
        ids = torch.cat([first.repeat_interleave(each, 0), ids], dim=1)
        mask = torch.cat([first_mask.repeat_interleave(each, 0), mask], dim=1)
        lengths = [len(self.tokenizer(" " + v, add_special_tokens=False)["input_ids"]) for row in values for v in row]
        budgets = torch.tensor(lengths) + SLACK
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=int(budgets.max()),
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([ValueWouldBeThere(ids.shape[1], budgets, self.ends)]),
        )
        said = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        # What follows the first sentence is no answer any more.
        replies = [reply.split("\n")[0].split(".")[0] for reply in said]
        return [replies[start : start + each] for start in range(0, len(replies), each)]


@dataclass(frozen=True)
class Run:
    """A row of the table to be: a method in a suite, asked after every number of distractors."""

    suite: str
    method: str
    settings: dict[str, Any] | None
    distractors: tuple[int, ...]
    episodes: int
    seed: int
    free: bool  # whether replies that were not begun are scored too

    def name(self, distractors: int) -> str:
        return f"{self.suite}, {distractors} distractors" if distractors else self.suite


def methods(slots: list[int], policies: list[str]) -> dict[str, dict[str, Any] | None]:
    """Memory settings by name; None for those without memory of ours."""
    ours = {f"{policy}, {count} slots": {"policy": policy, "slots": count} for count in slots for policy in policies}
    return {**dict.fromkeys(BASELINES), **ours}


def batches(run: Run, split: str = "validation") -> Iterator[list[Episode]]:
    episodes = recall_episodes(
        run.episodes, split=split, seed=run.seed, distractors=max(run.distractors), **SUITES[run.suite]
    )
    for start in range(0, run.episodes, ROWS):
        yield episodes[start : start + ROWS]


def measure(reader: Reader, run: Run) -> dict[int, dict[str, Any]]:
    """What was recalled, by the number of distractors."""
    adapted = run.method == "trained adapter"
    remembers = adapted or run.settings is not None
    found: dict[int, dict[str, Any]] = {}
    for batch in batches(run):
        settings = run.settings or {}
        memory = senri_hf.MemoryCache.for_model(reader.model, **settings) if remembers else None
        read = 0
        for count in run.distractors:
            until = len(batch[0].told) - max(run.distractors) + count
            if memory is not None:
                tell(reader.model, reader.tokenizer, [episode.told[read:until] for episode in batch], memory)
            read = until
            texts = [[text_of(reader.tokenizer, e, q, until, run.method) for q in e.questions] for e in batch]
            values = [[question.answer for question in episode.questions] for episode in batch]
            replies = reader.answer(texts, values, memory)
            pairs = [
                (q, r) for e, row in zip(batch, replies, strict=True) for q, r in zip(e.questions, row, strict=True)
            ]
            row = found.setdefault(count, {"right": [], "free": [], "bytes": 0.0, "said": []})
            row["right"] += [score_reply(reply, question) for question, reply in pairs]
            if run.free:
                row["free"] += free_replies(reader, batch, memory)
            row["bytes"] += kept(reader, batch, until, run.method, memory)
            row["said"] += [[q.messages[-1]["content"], q.reply, reply] for q, reply in pairs[:3]]
    for row in found.values():
        right, free = row.pop("right"), row.pop("free")
        row |= {
            "recall": sum(right) / len(right),
            "answers": len(right),
            "free": sum(free) / len(free) if free else None,
        }
        row["bytes"] /= run.episodes
        row |= {"episodes": run.episodes, "said": row["said"][:6]}
    return found


def free_replies(reader: Reader, batch: list[Episode], memory: Any) -> list[bool]:
    """Whether the first question of every episode is answered in a reply that was not begun."""
    questions = [episode.questions[0] for episode in batch]
    replies = ask(reader.model, reader.tokenizer, [plain(question.messages) for question in questions], memory, 24)
    return [score_reply(reply, question) for reply, question in zip(replies, questions, strict=True)]


def kept(reader: Reader, batch: list[Episode], told: int, method: str, memory: Any) -> float:
    """Bytes that a batch keeps: memory, or the keys and values of the text that was told."""
    if memory is not None:
        return float(memory.nbytes)
    if method == "no memory":
        return 0.0
    config = reader.model.config
    per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * reader.model.dtype.itemsize
    )
    said = [[message for c in episode.told[:told] for message in plain(c)] for episode in batch]
    return float(sum(len(reader.tokenizer.apply_chat_template(text)["input_ids"]) for text in said) * per_token)


def save(results: dict[str, Any], path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def planned(args: argparse.Namespace) -> list[Run]:
    """Every row that is asked for."""
    chosen = {
        name: settings
        for name, settings in methods(args.slots, args.policies).items()
        if settings is not None or name in args.baselines
    }
    return [
        Run(suite, method, settings, tuple(sorted(args.distractors)), args.episodes, seed, args.free)
        for seed in range(args.seeds)
        for suite in args.suites
        for method, settings in chosen.items()
    ]


def readers(args: argparse.Namespace) -> Iterator[tuple[Reader, list[Run]]]:
    """The model with the rows that it has to run, and the one with the adapter, if its row is asked for."""
    runs = planned(args)
    groups = [[run for run in runs if (run.method == "trained adapter") == adapted] for adapted in (False, True)]
    for adapted, group in enumerate(groups):
        adapter = shipped_adapter(args.model)
        if not group or (adapted and adapter is None):
            continue
        model, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
        if adapted:
            model = PeftModel.from_pretrained(model, str(adapter))
        yield Reader(model.eval(), tokenizer, sentence_ends(tokenizer)), group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--episodes", type=int, default=200)
    add("--seeds", type=int, default=2)
    add("--suites", nargs="*", default=list(SUITES), choices=list(SUITES))
    add("--slots", nargs="*", type=int, default=list(SLOTS))
    add("--policies", nargs="*", default=list(POLICIES), choices=POLICIES)
    add("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    add("--distractors", nargs="+", type=int, default=[0], help="asked after each of these numbers of them")
    add("--free", action="store_true", help="score replies that are not begun, too")
    add("--output", type=Path, default=Path("docs/training_free.json"))
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    recall = results.setdefault("recall", {}).setdefault(args.model, {})
    for reader, runs in readers(args):
        todo = [
            run
            for run in runs
            if any(str(run.seed) not in recall.get(run.name(n), {}).get(run.method, {}) for n in run.distractors)
        ]
        started = time.perf_counter()
        for index, run in enumerate(todo):
            for count, row in measure(reader, run).items():
                recall.setdefault(run.name(count), {}).setdefault(run.method, {})[str(run.seed)] = row
                print(f"{run.name(count):32s} {run.method:22s} {row['recall']:.3f} {row['free'] or ''}", flush=True)
            save(results, args.output)
            minutes = (time.perf_counter() - started) / 60
            print(f"  about {minutes / (index + 1) * (len(todo) - index - 1):.0f} minutes left", flush=True)
    write_page(results, args.output.parent)


if __name__ == "__main__":
    main()
