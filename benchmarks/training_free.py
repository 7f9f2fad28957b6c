"""Recall of memory without training: by policy and slots, beside the whole context, its text, and a trained adapter.

    python benchmarks/training_free.py --model smollm2-135m-instruct --budget-minutes 30

Facts are told in as many conversations, others about other things may follow, and all facts are asked, each in a
conversation of its own that starts from the same memory. The reply is begun for the model up to the value ("Your name
is"), as a small base model otherwise declines to answer, and `generate()` goes on until the value would be there; every
method gets the same start. Values and phrasings are of the validation split.

Every method has its turn at the first `--batch` episodes, then at the next: a run that ends early is a fair one of
fewer episodes. What is done is read from `--output`: a run goes on where the last one ended. A memory that never had
more tokens than a smaller one has slots for is what that one would have been; its answers count for both.
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from training_free_grid import BASELINES, DISTRACTORS, EPISODES, POLICIES, SEEDS, SLOTS, SUITES, cell, methods
from training_free_page import write_page
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import senri_hf
from senri_hf.commands.chat import shipped_adapter
from senri_hf.files import write_json
from senri_hf.tasks import Episode, Question, recall_episodes, score_reply
from senri_hf.training import ask, tell


COLUMNS_AT_ONCE = 60_000
SLACK = 3  # tokens that may stand before a value or in it beyond those of the value itself
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
    marks = (".", "\n", "Ċ")  # the last is a line feed in vocabularies of bytes
    ends = [i for piece, i in tokenizer.get_vocab().items() if any(mark in piece for mark in marks)]
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
        # As many questions at once as memory has room for.
        columns = len(rows) * max(layer.keys.shape[2] for layer in cache.layers if layer.keys is not None)
        group = min(each, max(1, COLUMNS_AT_ONCE // columns))
        replies: list[list[str]] = [[] for _ in rows]
        for index in range(0, each, group):
            asked = [row[index : index + group] for row in rows]
            wanted = [row[index : index + group] for row in values]
            mine = copy.deepcopy(cache) if memory is None else cache.snapshot()
            said = self.reply(mine, first, first_mask, asked, wanted)
            for ours, more in zip(replies, said, strict=True):
                ours += more
        return replies

    def reply(
        self,
        cache: Any,
        first: torch.Tensor,
        first_mask: torch.Tensor,
        asked: list[list[list[int]]],
        values: list[list[str]],
    ) -> list[list[str]]:
        """Replies to a few questions for every row, of which `first` is read already."""
        each, start = len(asked[0]), first_mask.sum(1).tolist()
        cache.batch_repeat_interleave(each)
        rest = [ids[known:] for row, known in zip(asked, start, strict=True) for ids in row]
        ids, mask = left_padded(rest, self.tokenizer.pad_token_id)
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
        return [replies[index : index + each] for index in range(0, len(replies), each)]


@dataclass(frozen=True)
class Run:
    """One method on one batch of episodes, asked after every number of distractors."""

    suite: str
    method: str
    settings: dict[str, Any] | None
    distractors: tuple[int, ...]
    seed: int
    start: int
    count: int
    free: bool  # whether replies that were not begun are scored too

    @property
    def part(self) -> str:
        """What the batch is called in the results."""
        return f"seed {self.seed}, episodes {self.start} to {self.start + self.count - 1}"

    def episodes(self) -> list[Episode]:
        return recall_episodes(
            self.start + self.count,
            split="validation",
            seed=self.seed,
            distractors=max(DISTRACTORS),  # the same episodes, however many of these are told
            **SUITES[self.suite],
        )[self.start :]


def measure(reader: Reader, run: Run, distractors: list[int]) -> dict[int, dict[str, Any]]:
    """What was recalled, by the number of distractors."""
    batch = run.episodes()
    remembers = run.method == "trained adapter" or run.settings is not None
    memory = senri_hf.MemoryCache.for_model(reader.model, **run.settings or {}) if remembers else None
    found: dict[int, dict[str, Any]] = {}
    read, most = 0, 0
    for count in distractors:
        until = len(batch[0].told) - max(DISTRACTORS) + count
        for index in range(read, until if memory is not None else read):
            tell(reader.model, reader.tokenizer, [episode.told[index : index + 1] for episode in batch], memory)
            most = max(most, slots_held(memory))
        read = until
        texts = [[text_of(reader.tokenizer, e, q, until, run.method) for q in e.questions] for e in batch]
        values = [[question.answer for question in episode.questions] for episode in batch]
        replies = reader.answer(texts, values, memory)
        pairs = [(q, r) for e, row in zip(batch, replies, strict=True) for q, r in zip(e.questions, row, strict=True)]
        right = [score_reply(reply, question) for question, reply in pairs]
        free = free_replies(reader, batch, memory) if run.free else []
        found[count] = {
            "recall": sum(right) / len(right),
            "answers": len(right),
            "right": "".join(str(int(was)) for was in right),
            "free": sum(free) / len(free) if free else None,
            "bytes": kept(reader, batch, until, run.method, memory) / len(batch),
            "episodes": len(batch),
            "most": most,
            "said": [[q.messages[-1]["content"], q.reply, reply] for q, reply in pairs[:3]],
        }
    return found


def slots_held(memory: Any) -> int:
    """The most tokens that any row of a memory without training holds."""
    layer = memory.attention_memory
    return 0 if layer is None else int(layer.slots.live.sum(1).max())


def stands_for(recall: dict[str, Any], run: Run, distractors: int) -> dict[str, Any] | None:
    """What a memory with more slots gave, where it never had more tokens than this one has slots for."""
    if run.settings is None:
        return None
    for count in SLOTS:
        larger = f"{run.settings['policy']}, {count} slots"
        row = recall.get(cell(run.suite, distractors), {}).get(larger, {}).get(run.part)
        if row is not None and row["most"] <= run.settings["slots"] < count:
            return dict(row)
    return None


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


def planned(args: argparse.Namespace) -> list[Run]:
    """Everything that is asked for, in its order."""
    chosen = {
        name: settings
        for name, settings in methods(tuple(args.slots), tuple(args.policies)).items()
        if settings is not None or name in args.baselines
    }
    counts = tuple(sorted(args.distractors))
    starts = range(0, args.episodes, args.batch)
    return [
        Run(suite, method, settings, counts, seed, start, min(args.batch, args.episodes - start), args.free)
        for start in starts
        for seed in range(args.seeds)
        for suite in args.suites
        for method, settings in chosen.items()
    ]


def load_reader(args: argparse.Namespace, adapted: bool) -> Reader | None:
    """The model, with its shipped adapter or without one; None where there is no such adapter."""
    adapter = shipped_adapter(args.model)
    if adapted and adapter is None:
        return None
    model, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
    if adapted:
        model = PeftModel.from_pretrained(model, str(adapter))
    return Reader(model.eval(), tokenizer, sentence_ends(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--episodes", type=int, default=EPISODES)
    add("--seeds", type=int, default=SEEDS)
    add("--batch", type=int, default=25, help="episodes at once, the same for all methods of a results file")
    add("--suites", nargs="*", default=list(SUITES), choices=list(SUITES))
    add("--slots", nargs="*", type=int, default=list(SLOTS))
    add("--policies", nargs="*", default=list(POLICIES), choices=POLICIES)
    add("--baselines", nargs="*", default=list(BASELINES), choices=BASELINES)
    add("--distractors", nargs="+", type=int, default=list(DISTRACTORS), choices=DISTRACTORS)
    add("--budget-minutes", type=float, default=float("inf"), help="begin nothing new after so many minutes")
    add("--free", action="store_true", help="score replies that are not begun, too")
    add("--output", type=Path, default=Path("docs/training_free.json"))
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    recall = results.setdefault("recall", {}).setdefault(args.model, {})
    started = time.perf_counter()
    readers: dict[bool, Reader | None] = {}
    for run in planned(args):
        if time.perf_counter() - started > 60 * args.budget_minutes:
            break
        missing = [n for n in run.distractors if run.part not in recall.get(cell(run.suite, n), {}).get(run.method, {})]
        rows = {n: row for n in missing if (row := stands_for(recall, run, n)) is not None}
        todo = [n for n in missing if n not in rows]
        adapted = run.method == "trained adapter"
        if todo and adapted not in readers:
            readers[adapted] = load_reader(args, adapted)
        reader = readers.get(adapted)
        if todo and reader is not None:
            rows |= measure(reader, run, todo)
        for count, row in rows.items():
            recall.setdefault(cell(run.suite, count), {}).setdefault(run.method, {})[run.part] = row
            minutes = (time.perf_counter() - started) / 60
            what = f"{run.part:26s} {cell(run.suite, count):32s} {run.method:20s}"
            print(f"{minutes:5.1f} {what} {row['recall']:.3f}", flush=True)
        write_json(args.output, results)
    write_page(results, args.output.parent)


if __name__ == "__main__":
    main()
