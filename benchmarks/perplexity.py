"""Perplexity on ordinary English prose with an empty memory, a full one, and the adapter disabled.

python benchmarks/perplexity.py --model smollm2-135m-instruct --adapter FOLDER
"""

import argparse
import json
import math
from pathlib import Path

import torch
from adapter_digest import adapter_digest
from recall import load
from tqdm import tqdm

import senri_hf
from senri_hf.tasks import recall_episodes
from senri_hf.tasks.text import ordinary_text
from senri_hf.training import tell


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


def filled(model, tokenizer) -> tuple["senri_hf.MemoryCache", int]:
    """A memory whose store has no free slot in any layer, and how many facts it was told for that."""
    memory, facts = senri_hf.MemoryCache.for_model(model), 0
    for episode in recall_episodes(MOST_TOLD, split="validation", facts=10, seed=3):
        memory = tell(model, tokenizer, [episode.told], memory)
        facts += len(episode.told)
        used = [layer.summary()["store slots used"] for layer in memory.memory_layers]
        if min(used) == 1.0:  # a share of the slots
            return memory, facts
    raise ValueError(f"after {facts} facts a layer's store still has room: {used}; raise MOST_TOLD")


def measure(model_name: str, adapter: str, dtype: str) -> dict[str, float | str]:
    model, tokenizer = load(model_name, adapter, dtype)
    full, facts = filled(model, tokenizer)
    conditions = {"base model": None, "empty memory": senri_hf.MemoryCache.for_model(model), FULL: full}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in [*conditions, "adapter disabled"]}
    texts = [text for source in SOURCES for text in ordinary_text(source)[:PARAGRAPHS]]
    for text in tqdm(texts, desc="perplexity"):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        for name, memory in conditions.items():
            losses[name].append(token_losses(model, ids, memory))
        with model.disable_adapter():
            losses["adapter disabled"].append(token_losses(model, ids, conditions[FULL]))
    joined = {name: torch.cat(parts) for name, parts in losses.items()}
    return {
        "adapter": adapter_digest(adapter),
        "tokens": joined["base model"].numel(),
        "facts in memory": facts,
        **{name: math.exp(values.mean()) for name, values in joined.items()},
        "empty memory is bit-identical": torch.equal(joined["base model"], joined["empty memory"]),
        "disabled adapter is bit-identical": torch.equal(joined["base model"], joined["adapter disabled"]),
        "full over base": math.exp(joined[FULL].mean() - joined["base model"].mean()),
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
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found[arguments.model], indent=1))
