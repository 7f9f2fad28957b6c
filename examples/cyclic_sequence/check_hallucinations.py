"""What the transformer says after contexts that are wrong, random, or cut short.

    python examples/cyclic_sequence/check_hallucinations.py

For every kind of context: how often the model is back in the exact cycle, after how many symbols, and how many of the
symbols that it says can never follow the one before.

Writes `results.json` into `--output`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from train_cyclic import contexts, write_results
from train_sae import task_of
from transformers import AutoModelForCausalLM


def judged(model: Any, task: Any, given: torch.Tensor, length: int) -> dict[str, float]:
    """What becomes of contexts [n, T]."""
    start = given.shape[1]
    rollouts = model.rollout(given, length).tolist()
    settled = [task.settled(rollout) for rollout in rollouts]
    returned = [max(0, at - start) for at in settled if at is not None]
    return {
        "contexts": len(rollouts),
        "returned": len(returned) / len(rollouts),
        "symbols_to_return": sum(returned) / max(1, len(returned)),
        "slowest": max(returned, default=0),
        "forbidden_per_symbol": sum(task.forbidden(r[start:]) for r in rollouts) / (len(rollouts) * (length - 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("checkpoints/cyclic"), help="folder that train_cyclic.py wrote")
    add("--count", type=int, default=500, help="contexts of each kind, at most")
    add("--length", type=int, default=72, help="symbols to generate")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("checkpoints/cyclic-hallucinations"))
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    task, settings = task_of(args.model)
    block = settings["block"]
    kinds = {
        f"{wrong} wrong, unseen": torch.tensor(unseen[: args.count])
        for wrong, unseen in contexts(task, block, settings["held_out"])[1].items()
    }
    generator = torch.Generator().manual_seed(args.seed)
    kinds["random symbols"] = torch.randint(task.symbols, (args.count, block), generator=generator)
    kinds["one symbol for the whole window"] = torch.arange(task.symbols)[:, None].expand(-1, block)
    kinds["a single symbol"] = torch.arange(task.symbols)[:, None]
    kinds["true windows"] = torch.tensor(task.windows(block))
    found = {name: judged(model, task, given, args.length) for name, given in kinds.items()}
    write_results(args, {"kinds": found})
    for name, row in found.items():
        print(
            f"{name:34s} {row['contexts']:4.0f} contexts, back in the cycle {row['returned']:6.1%} after "
            f"{row['symbols_to_return']:.2f} symbols, forbidden {row['forbidden_per_symbol']:.4f} a symbol"
        )
    print(f"{args.output}")


if __name__ == "__main__":
    main()
