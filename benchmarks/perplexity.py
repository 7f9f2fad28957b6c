"""What memory leaves as it was: perplexity on ordinary English prose, and replies to general questions.

Prose is read with an empty memory, with a full one, and with the adapter disabled; questions are asked with a full one.

python benchmarks/perplexity.py --model smollm2-135m-instruct --adapter FOLDER
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from adapter_digest import adapter_digest
from recall import load
from tqdm import tqdm

import senri_hf
from senri_hf.files import write_json
from senri_hf.tasks import general_conversations, recall_episodes
from senri_hf.tasks.text import ordinary_text
from senri_hf.training import ask, tell


SOURCES = ("heart-of-darkness", "doctor-moreau", "dubliners")
PARAGRAPHS = 40
TOKENS = 256
FULL = "memory full of facts"
MOST_TOLD = 20  # tens of facts


@torch.no_grad()
def token_losses(model, ids: torch.Tensor, memory: "senri_hf.MemoryCache | None") -> torch.Tensor:
    """Negative log-likelihoods of a document's tokens after the first, each document read with the same memory."""
    cache = None if memory is None else memory.snapshot()
    logits = model(input_ids=ids, past_key_values=cache).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def filled(model, tokenizer) -> tuple["senri_hf.MemoryCache", list[str]]:
    """A memory whose store has no free slot in any layer, and the values of the facts it was told for that."""
    memory, told = senri_hf.MemoryCache.for_model(model), []
    for episode in recall_episodes(MOST_TOLD, split="validation", facts=10, seed=3):
        memory = tell(model, tokenizer, [episode.told], memory)
        told += [episode.questions[0].answer, *episode.questions[0].wrong]
        used = [layer.summary()["store slots used"] for layer in memory.memory_layers]
        if min(used) == 1.0:  # a share of the slots
            return memory, told
    raise ValueError(f"after {len(told)} facts a layer's store still has room: {used}; raise MOST_TOLD")


def said(value: str, reply: str) -> bool:
    """Whether a reply has a value as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply, re.IGNORECASE) is not None


def general(model, tokenizer, memory: "senri_hf.MemoryCache", told: list[str]) -> dict[str, Any]:
    """How replies to questions that are not about the user differ from those of the model without memory."""
    asked = [conversation[:1] for conversation in general_conversations("validation")]
    before, after = ask(model, tokenizer, asked), ask(model, tokenizer, asked, memory.fork(len(asked)))
    pairs = list(zip(before, after, strict=True))
    return {
        "general questions": len(asked),
        "share that begin with the same word": sum(a.split()[:1] == b.split()[:1] for a, b in pairs) / len(pairs),
        "share that are the same": sum(a == b for a, b in pairs) / len(pairs),
        "share that newly name a remembered value": sum(
            any(said(value, b) and not said(value, a) for value in told) for a, b in pairs
        )
        / len(pairs),
        "replies": [[q[0]["content"], a, b] for q, (a, b) in zip(asked, pairs, strict=True) if a != b],
    }


def measure(model_name: str, adapter: str, dtype: str) -> dict[str, Any]:
    model, tokenizer = load(model_name, adapter, dtype)
    base, _ = load(model_name, None, dtype)
    full, told = filled(model, tokenizer)
    conditions = {"empty memory": senri_hf.MemoryCache.for_model(model), FULL: full}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in ["base model", *conditions, "adapter disabled"]}
    texts = [text for source in SOURCES for text in ordinary_text(source)[:PARAGRAPHS]]
    for text in tqdm(texts, desc="perplexity"):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        losses["base model"].append(token_losses(base, ids, None))
        for name, memory in conditions.items():
            losses[name].append(token_losses(model, ids, memory))
        with model.disable_adapter():
            losses["adapter disabled"].append(token_losses(model, ids, conditions[FULL]))
    joined = {name: torch.cat(parts) for name, parts in losses.items()}
    return {
        "adapter": adapter_digest(adapter),
        "tokens": joined["base model"].numel(),
        "facts in memory": len(told),
        **{name: math.exp(values.mean()) for name, values in joined.items()},
        "empty memory is bit-identical": torch.equal(joined["base model"], joined["empty memory"]),
        "disabled adapter is bit-identical": torch.equal(joined["base model"], joined["adapter disabled"]),
        "full over base": math.exp(joined[FULL].mean() - joined["base model"].mean()),
        "general": general(model, tokenizer, full, told),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("docs/perplexity.json"))
    arguments = parser.parse_args()
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    found[arguments.model] = measure(arguments.model, arguments.adapter, arguments.dtype)
    write_json(arguments.output, found)
    print(json.dumps(found[arguments.model], indent=1))
