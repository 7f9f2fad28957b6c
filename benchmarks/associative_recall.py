"""Associative recall of small models trained on it: which update rule holds how much.

    python benchmarks/associative_recall.py                    # every model, two seeds; what is done is not done again

A model has two layers of width 64. `hybrid` ones are an attention layer, which lets a token know the one before it, and
the layer that is named; `memory only` ones are two layers of it. A head is 32 wide: 8 kB of matrix per memory layer.
Training is AdamW on fresh sequences of 1,024 tokens a step, with a warm-up and a cosine. It begins with few pairs: with
all of them at once, and with rotations of a quarter of the head, 800 steps teach nothing to attention either. What is
scored are sequences that were not trained on. Results are in `docs/associative_recall.json`.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, pythia_layers, senri_layers
from senri_hf.configuration.compressive import UPDATE_RULES
from senri_hf.files import write_json
from senri_hf.tasks import AssociativeRecall


OUTPUT = Path(__file__).parents[1] / "docs" / "associative_recall.json"
WIDTH, HEAD, VOCABULARY, TOKENS, WARM_UP = 64, 32, 128, 1024, 50
# Which share of the pairs is asked for, in five equal parts of the training.
CURRICULUM = (1 / 8, 1 / 4, 1 / 2, 1, 1)


def layers_of(model: str) -> list[dict[str, Any]]:
    """The layers of a model by its name, as `hybrid delta`, `memory only delta` or `attention`."""
    if model == "attention":
        return pythia_layers(2)
    kind, _, rule = model.rpartition(" ")
    memory = senri_layers(1, update_rule=rule, memory_head_dim=HEAD)
    return pythia_layers(1) + memory if kind == "hybrid" else memory * 2


def build(model: str, seed: int) -> SenriForCausalLM:
    torch.manual_seed(seed)
    return SenriForCausalLM(
        SenriConfig(
            layers=layers_of(model),
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        )
    )


@torch.no_grad()
def accuracy(model: SenriForCausalLM, task: AssociativeRecall, seed: int = 10**6, batches: int = 32) -> float:
    """The share of values that are predicted, on sequences of their own seed."""
    generator, right = torch.Generator().manual_seed(seed), []
    for _ in range(batches):
        ids, labels = task.batch(TOKENS // task.length, generator)
        asked = labels[:, 1:] >= 0
        right.append((model(ids, use_cache=False).logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean())
    return float(torch.stack(right).mean())


def train(name: str, task: AssociativeRecall, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Train one model; what it scored."""
    model = build(name, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for step in range(steps):
        pairs = max(1, round(task.pairs * CURRICULUM[len(CURRICULUM) * step // steps]))
        now = AssociativeRecall(pairs, task.vocab_size)
        ids, labels = now.batch(TOKENS // now.length, generator)
        loss = model(ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    cache = MemoryCache.for_model(model) if name != "attention" else None
    if cache is not None:
        model(ids[:1], past_key_values=cache)
    return {
        "accuracy": accuracy(model, task),
        "loss": loss.item(),
        "bytes of state": cache.nbytes if cache is not None else 2 * 2 * task.length * WIDTH * 4,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [f"{kind} {rule}" for kind in ("hybrid", "memory only") for rule in UPDATE_RULES]
    parser.add_argument("--models", nargs="+", default=["attention", *everything])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for pairs in args.pairs:
        task = AssociativeRecall(pairs, VOCABULARY)
        for seed in args.seeds:
            for model in args.models:
                for rate in args.rates:
                    key = f"{model} | {pairs} pairs | {args.steps} steps | rate {rate:g} | seed {seed}"
                    if key not in found:
                        found[key] = train(model, task, seed, args.steps, rate)
                        write_json(args.output, found)
                    print(key, found[key], flush=True)


if __name__ == "__main__":
    main()
