"""Recall against decay cycles, of the whole memory and of its decaying buffer alone, and what the surprise gate kept.

python benchmarks/forgetting.py --model smollm2-135m-instruct --adapter FOLDER
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from adapter_digest import adapter_digest
from peft import PeftConfig, PeftModel
from tqdm import tqdm

import senri_hf
from senri_hf.files import whole, write_json
from senri_hf.memory import EpisodicLayer
from senri_hf.tasks import recall_episodes, score_reply
from senri_hf.tasks.text import ordinary_text
from senri_hf.training import ask, tell


CYCLES = (0, 10, 20, 30, 40, 50, 60, 120)
EPISODES = 50
PROSE, PARAGRAPH = ("heart-of-darkness", "dubliners"), 3
# The memory as it was trained, without its long-term part, and with the other measure of surprise.
MEMORIES: dict[str, dict[str, Any]] = {
    "buffer and store": {},
    "buffer alone, of 256 slots": {"buffer_slots": 256, "store_slots": 0},
    "buffer and store, surprise = nll": {"surprise": "nll"},
}


def load_with(model_name: str, adapter: str, dtype: str, **settings: Any) -> tuple[PeftModel, Any]:
    """The model with the adapter, whose memory has other settings than it was trained with."""
    base, tokenizer = senri_hf.load_base(model_name, dtype=dtype)
    config = PeftConfig.from_pretrained(adapter)
    for name, value in settings.items():
        setattr(config, name, value)
    return PeftModel.from_pretrained(base, adapter, config=config).eval(), tokenizer


def forgetting(model, tokenizer) -> list[float]:
    """Exact recall of four facts after so many conversations in which nothing was said, for every number of them."""
    episodes = recall_episodes(EPISODES, split="validation", facts=4, seed=11)
    told = tell(model, tokenizer, [episode.told for episode in episodes])
    exact = []
    for cycles in tqdm(CYCLES, desc="decay"):
        memory = told.snapshot()
        memory.decay(cycles)
        replies = ask(model, tokenizer, [episode.questions[0].messages for episode in episodes], memory)
        right = [score_reply(r, e.questions[0]) for r, e in zip(replies, episodes, strict=True)]
        exact.append(sum(right) / len(right))
    return exact


def kept_tokens(model, tokenizer) -> list[dict]:
    """For told conversations and prose, the tokens that the store of each memory layer kept and those that it did not.

    Means over layers: `kept` is the share of the text's tokens, `surprise` what those had, `dropped_surprise` what the
    others had.
    """
    texts = [
        (episode.questions[0].answer, tokenizer.apply_chat_template(episode.told[0], tokenize=False))
        for episode in recall_episodes(6, split="validation", seed=12)
    ]
    texts += [(f"prose: {source}", ordinary_text(source)[PARAGRAPH]) for source in PROSE]
    rows = []
    for title, text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        memory, surprises = senri_hf.MemoryCache.for_model(model), defaultdict(list)
        append = EpisodicLayer.append

        def noting(layer, tokens, append=append, surprises=surprises):
            surprises[layer.layer_idx].append(tokens.surprise[0])
            append(layer, tokens)

        with torch.no_grad(), patch.object(EpisodicLayer, "append", noting):
            model(**encoded, past_key_values=memory)
        memory.clear_context()
        ids = encoded.input_ids[0].tolist()
        layers = [layer.state_dict() for layer in memory.memory_layers]
        tags = [layer["tag"][0] for layer in layers]
        share = [sum(int((tag == position).any()) for tag in tags) / len(tags) for position in range(len(ids))]
        held = [torch.isin(torch.arange(len(ids)), tag) for tag in tags]
        found = [torch.cat(surprises[layer.layer_idx]) for layer in memory.memory_layers]
        words = [tokenizer.decode(token) for token in ids]
        rows.append(
            {
                "answer": title,
                "tokens": list(zip(words, share, strict=True)),
                "kept": sum(share) / len(share),
                "surprise": mean(float(own[kept].mean()) for own, kept in zip(found, held, strict=True)),
                "dropped_surprise": mean(float(own[~kept].mean()) for own, kept in zip(found, held, strict=True)),
            }
        )
    return rows


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, exact in curves.items():
        axes.plot(CYCLES, exact, marker="o", label=name)
    axes.legend()
    axes.set_xlabel("decay cycles since the facts were told")
    axes.set_ylabel("facts recalled exactly")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    stored = arguments.output / f"forgetting-{arguments.model}.json"
    digest = adapter_digest(arguments.adapter)
    found = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    if found.get("adapter") != digest:  # of another adapter, or none: what was measured of this one goes on
        found = {"adapter": digest, "cycles": list(CYCLES), "exact": {}, "kept": {}}
    for title, settings in MEMORIES.items():
        if title in found["exact"]:
            continue
        base, words = load_with(arguments.model, arguments.adapter, arguments.dtype, **settings)
        if base.peft_config["default"].store_slots:
            found["kept"][title] = kept_tokens(base, words)
        found["exact"][title] = forgetting(base, words)
        write_json(stored, found)
        plot(found["exact"], stored.with_suffix(".png"))
    print(json.dumps(found["exact"], indent=1))
    print(f"The plot is {stored.with_suffix('.png')}")
