"""Recall of memory without training: by policy and slots, beside the whole context and the text prepended.

    python benchmarks/training_free.py --model smollm2-135m-instruct --episodes 50 --seeds 1

Five facts are told in as many conversations (or with distractors after them) and one is asked. The reply is begun for
the model up to the value ("Your name is"), as a small base model otherwise declines to answer, and `generate()` goes
on; every method gets the same start. Nothing is trained, so phrasings are those of the training split. What is done
already is read from `--output`, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import senri_hf
from senri_hf.tasks import Episode, Question, recall_episodes, score_reply
from senri_hf.training import tell


ROWS = 25
SUITES: dict[str, dict[str, Any]] = {
    "five facts": {"facts": 5},
    "five facts, 5 distractors": {"facts": 5, "distractors": 5},
    "after a correction": {"facts": 3, "correction": True},
}
SLOTS = (32, 64, 128, 256)
POLICIES = ("surprise", "recent", "random")


def methods() -> dict[str, dict[str, Any] | None]:
    """Memory settings by name; None for those without memory."""
    with_memory = {
        f"{policy}, {slots} slots": {"policy": policy, "slots": slots} for slots in SLOTS for policy in POLICIES
    }
    return {"no memory": None, "kept in context": None, "text prepended": None, **with_memory}


def lead_of(question: Question) -> str:
    """The reply up to its value."""
    return question.reply[: question.reply.casefold().index(question.answer.casefold())].rstrip()


def plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, batch: list[Episode], method: str, memory: Any) -> list[str]:
    """Replies, begun up to the value and ended by `generate()`."""
    texts = []
    for episode in batch:
        question = episode.questions[0]
        asked = plain(question.messages)
        told = [message for conversation in episode.told for message in plain(conversation)]
        if method == "kept in context":
            asked = told + asked
        if method == "text prepended":
            said = "\n".join(f"{message['role']}: {message['content']}" for message in told)
            content = f"Here is what we talked about before:\n{said}\n\n{asked[-1]['content']}"
            asked = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts.append(text + lead_of(question))
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    cache = None if memory is None else memory.snapshot()
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=10, do_sample=False)
    replies = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    # What follows the first sentence is no answer any more.
    return [reply.split("\n")[0].split(".")[0] for reply in replies]


def measure(
    model: Any, tokenizer: Any, suite: str, method: str, settings: Any, count: int, seed: int
) -> dict[str, Any]:
    episodes = recall_episodes(count, split="train", seed=seed, **SUITES[suite])
    replies: list[str] = []
    stored, told_tokens, seconds = 0, 0, time.perf_counter()
    for start in tqdm(range(0, count, ROWS), desc=f"{suite}: {method}", leave=False):
        batch, memory = episodes[start : start + ROWS], None
        if settings is not None:
            memory = senri_hf.MemoryCache.for_model(model, **settings)
            tell(model, tokenizer, [episode.told for episode in batch], memory)
            stored += memory.nbytes
            told_tokens += int(memory.tokens_seen.sum())
        elif method != "no memory":
            for episode in batch:
                messages = [message for conversation in episode.told for message in plain(conversation)]
                tokens = len(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
                config = model.config
                per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
                stored += tokens * per_token * model.dtype.itemsize
        replies += answer(model, tokenizer, batch, method, memory)
    right = [score_reply(reply, episode.questions[0]) for reply, episode in zip(replies, episodes, strict=True)]
    return {
        "exact": sum(right) / count,
        "episodes": count,
        "seed": seed,
        "bytes": stored / count,
        "seconds": (time.perf_counter() - seconds) / count,
        "said": [
            [e.questions[0].messages[-1]["content"], e.questions[0].reply, reply]
            for e, reply in list(zip(episodes, replies, strict=True))[:5]
        ],
    }


def render(results: dict[str, Any], folder: Path) -> None:
    """A page with a table for every model, and a plot of recall against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [
        "# Memory without training: results",
        "",
        "Written by `python benchmarks/training_free.py`; `--suites`, `--slots`, `--episodes` and `--seeds` choose",
        "what runs, here what has a row: rows of 50 episodes are `--episodes 50 --seeds 1`.",
        "",
    ]
    for model, suites in results.items():
        figure, axes = plt.subplots(1, len(suites), figsize=(5 * len(suites), 4), sharey=True, squeeze=False)
        lines += [f"## {model}", "", f"![recall against bytes](training-free-{model}.png)", ""]
        for axis, (suite, found) in zip(axes[0], suites.items(), strict=True):
            lines += [f"### {suite}", "", "| method | recall | episodes | kB per person |", "|---|---|---|---|"]
            for method, runs in found.items():
                share, count = (sum(run[key] for run in runs.values()) for key in ("exact", "episodes"))
                size = sum(run["bytes"] for run in runs.values()) / len(runs)
                lines.append(f"| {method} | {share / len(runs):.1%} | {count} | {size / 1000:,.0f} |")
            lines.append("")
            for policy, colour in zip(POLICIES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
                points = [
                    (run["bytes"] / 1000, run["exact"])
                    for method, runs in found.items()
                    if method.startswith(policy)
                    for run in runs.values()
                ]
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), marker="o", color=colour, label=policy)
            for method, mark in (("kept in context", "s"), ("text prepended", "^"), ("no memory", "x")):
                for run in found.get(method, {}).values():
                    axis.plot(run["bytes"] / 1000, run["exact"], mark, color="black", label=method)
            axis.set_title(suite)
            axis.set_xlabel("kB kept per person")
        axes[0][0].set_ylabel("right answers")
        handles, labels = axes[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes[0][0].legend(unique.values(), unique.keys(), fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"training-free-{model}.png", dpi=120)
        plt.close(figure)
    (folder / "training_free_results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--episodes", type=int, default=200)
    add("--seeds", type=int, default=2)
    add("--suites", nargs="*", default=list(SUITES), choices=list(SUITES))
    add("--slots", nargs="*", type=int, default=list(SLOTS))
    add("--output", type=Path, default=Path("docs/training_free.json"))
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    model, tokenizer = senri_hf.load_base(args.model, dtype=args.dtype)
    wanted = {
        name: settings for name, settings in methods().items() if settings is None or settings["slots"] in args.slots
    }
    for suite in args.suites:
        for method, settings in wanted.items():
            for seed in range(args.seeds):
                runs = results.setdefault(args.model, {}).setdefault(suite, {}).setdefault(method, {})
                if str(seed) in runs:
                    continue
                runs[str(seed)] = measure(model, tokenizer, suite, method, settings, args.episodes, seed)
                scratch = args.output.with_suffix(".tmp")
                scratch.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                scratch.replace(args.output)
                print(f"{suite:28s} {method:24s} {runs[str(seed)]['exact']:.3f}", flush=True)
    render(results, args.output.parent)


if __name__ == "__main__":
    main()
