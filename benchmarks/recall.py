"""Recall of what was told in earlier conversations, scored on what `generate()` says.

    python benchmarks/recall.py --model smollm2-135m-instruct \\
        --adapter examples/name_recall/adapters/smollm2-135m-instruct

Every suite runs four ways on the same episodes: with memory (told in one process, saved to a file, asked in another),
with no memory, with the conversations kept in the context, and with their text prepended to the question. What is done
already is read from `--output`, so an interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from adapter_digest import adapter_digest
from peft import PeftModel
from tqdm import tqdm
from transformers import DynamicCache

import senri_hf
from senri_hf.files import write_json
from senri_hf.tasks import Episode, recall_episodes, score_reply
from senri_hf.training import ask, tell
from senri_hf.training.evaluation import answer, asked, read


SUITES: dict[str, dict[str, Any]] = {
    "200 unseen names": {"num_episodes": 200, "relations": "name"},
    "four facts, four conversations": {"num_episodes": 300, "facts": 4},
    "held-out relations": {"num_episodes": 100, "relations": "held_out"},
    "held-out relations, four facts": {"num_episodes": 100, "relations": "held_out", "facts": 4},
    "ten facts, ten conversations": {"num_episodes": 100, "facts": 10},
    "after a correction": {"num_episodes": 100, "correction": True},
    "after 20 distractor conversations": {"num_episodes": 100, "distractors": 20},
}
METHODS = ("memory", "no memory", "kept in context", "text prepended")
ROWS = 25


def episodes_of(suite: str) -> list[Episode]:
    return recall_episodes(split="validation", seed=20, **SUITES[suite])


def digest_of(suite: str, dtype: str) -> str:
    """What a figure is of: the first 12 digits of the SHA-256 of a suite's episodes, and the model's dtype."""
    text = json.dumps([[episode.conversations, episode.questions[0].wrong] for episode in episodes_of(suite)])
    return hashlib.sha256(f"{dtype} {text}".encode()).hexdigest()[:12]


def batches(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + ROWS] for start in range(0, len(items), ROWS)]


def load(model_name: str, adapter: str | None, dtype: str) -> tuple[Any, Any]:
    model, tokenizer = senri_hf.load_base(model_name, dtype=dtype)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return model, tokenizer


def tell_all(args: argparse.Namespace) -> None:
    """Tell all batches of a suite and save their memories."""
    model, tokenizer = load(args.model, args.adapter, args.dtype)
    start, written = time.perf_counter(), 0
    for index, batch in enumerate(tqdm(batches(episodes_of(args.suite)), desc="telling", leave=False)):
        memory = tell(model, tokenizer, [episode.told for episode in batch])
        written += int(memory.tokens_seen.sum())
        memory.save_pretrained(args.folder / str(index))
    (args.folder / "told.json").write_text(
        json.dumps({"seconds": time.perf_counter() - start, "tokens": written, "bytes": memory.nbytes / memory.rows})
    )


def ask_all(args: argparse.Namespace) -> None:
    """Load the memories and ask."""
    model, tokenizer = load(args.model, args.adapter, args.dtype)
    episodes = episodes_of(args.suite)
    replies, start = [], time.perf_counter()
    for index, batch in enumerate(tqdm(batches(episodes), desc="asking", leave=False)):
        memory = senri_hf.MemoryCache.from_pretrained(args.folder / str(index), model=model)
        replies += ask(model, tokenizer, [episode.questions[0].messages for episode in batch], memory)
    seconds = (time.perf_counter() - start) / len(episodes)
    told = json.loads((args.folder / "told.json").read_text())
    result = score(episodes, replies) | {"bytes": told["bytes"], "seconds": seconds, "told": told}
    (args.folder / "result.json").write_text(json.dumps(result))


def score(episodes: list[Episode], replies: list[str]) -> dict[str, Any]:
    right = [score_reply(reply, episode.questions[0]) for episode, reply in zip(episodes, replies, strict=True)]
    wrong = [
        [episode.questions[0].messages[-1]["content"], episode.questions[0].answer, reply]
        for episode, reply, good in zip(episodes, replies, right, strict=True)
        if not good
    ]
    return {"exact": sum(right) / len(right), "episodes": len(right), "wrong": wrong[:10]}


def with_memory(suite: str, args: argparse.Namespace) -> dict[str, Any]:
    """Told in one process, saved, asked in another."""
    with tempfile.TemporaryDirectory() as folder:
        for step in ("tell", "ask"):
            command = [sys.executable, __file__, "--step", step, "--folder", folder, "--suite", suite]
            command += ["--model", args.model, "--adapter", args.adapter, "--dtype", args.dtype]
            subprocess.run(command, check=True)
        return json.loads((Path(folder) / "result.json").read_text())


def without_memory(suite: str, method: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The base model alone, with nothing, with the conversations in its cache, or with their text in the question.

    Seconds are those of an answer: what is kept in the context was read before, as what is remembered was.
    """
    episodes = episodes_of(suite)
    replies, seconds, size = [], 0.0, 0.0
    for batch in tqdm(batches(episodes), desc=method, leave=False):
        questions = [[{"role": "user", "content": e.questions[0].messages[-1]["content"]}] for e in batch]
        told = [[{"role": m["role"], "content": m["content"]} for c in e.told for m in c] for e in batch]
        cache = DynamicCache(config=model.config)
        if method == "text prepended":
            texts = ["\n".join(f"{m['role']}: {m['content']}" for m in messages) for messages in told]
            size += sum(len(text.encode()) for text in texts)
            for (question,), text in zip(questions, texts, strict=True):
                question["content"] = f"Here is what we talked about before:\n{text}\n\n{question['content']}"
        if method == "kept in context":
            questions = [before + question for before, question in zip(told, questions, strict=True)]
            inputs = asked(model, tokenizer, questions)
            lengths = [len(tokenizer.apply_chat_template(before)["input_ids"]) for before in told]
            longest = int((inputs["attention_mask"].sum(1) - torch.tensor(lengths)).max())
            read(model, inputs, cache, inputs["input_ids"].shape[1] - longest)
            size += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        start = time.perf_counter()
        replies += answer(model, tokenizer, asked(model, tokenizer, questions), cache)
        seconds += time.perf_counter() - start
    return score(episodes, replies) | {"bytes": size / len(episodes), "seconds": seconds / len(episodes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--adapter", required=True, help="folder of the trained adapter")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--output", type=Path, default=Path("docs/recall.json"))
    add("--suite", choices=list(SUITES), help="this one only")
    add("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    add("--step", choices=("tell", "ask"), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "tell":
        return tell_all(args)
    if args.step == "ask":
        return ask_all(args)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    done = results.setdefault(args.model, {})
    digest = adapter_digest(args.adapter)
    if done.get("adapter") != digest:  # what stands beside another adapter was timed in another run
        done.clear()
        done["adapter"] = digest
    base = None
    suites = [args.suite] if args.suite else list(SUITES)
    for suite in tqdm(suites, desc=args.model):
        for method in args.methods:
            if done.setdefault(suite, {}).get(method, {}).get("of") == digest_of(suite, args.dtype):
                continue
            if method == "memory":
                done[suite][method] = with_memory(suite, args)
            else:
                base = base or load(args.model, None, args.dtype)
                done[suite][method] = without_memory(suite, method, *base)
            done[suite][method]["of"] = digest_of(suite, args.dtype)
            write_json(args.output, results)
            print(f"{suite:36s} {method:16s} {done[suite][method]['exact']:.3f}")
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
