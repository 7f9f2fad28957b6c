"""The compressive mechanism by itself: what each rule holds, and what it costs. No model, no training.

    python benchmarks/compressive.py

*Recall*: random Gaussian keys and values, each pair written once into one head of 64; a pair counts as recalled when
what its key reads has a higher cosine with its value than with any other; `backward` asks by values for keys, which are
compared without their mean. *Speed*: one row of 4,096 tokens, heads of several numbers and sizes, processor time of one
thread, the chunk form beside the reference, which takes one head after another and token by token (one is timed, and
counted as often as there are heads), and beside transformers' own `torch_chunk_gated_delta_rule`.
Results are in `docs/compressive.json`; what is there is not measured again. All forms of a rule and a shape are timed
in the same run.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from senri_hf.configuration.compressive import UPDATE_RULES
from senri_hf.files import write_json
from senri_hf.memory import compressive_reference
from senri_hf.memory.compressive import UpdateRule, elu_features, read, read_and_write, read_backwards, unit_features


OUTPUT = Path(__file__).parents[1] / "docs" / "compressive.json"
SIZE, TOKENS, SEEDS = 64, 4096, 32
# Heads and their sizes: those of a model of width 256, one of them, the default of Senri, and many small ones.
SHAPES = {"4 x 64": (4, 64), "1 x 64": (1, 64), "1 x 512": (1, 512), "32 x 16": (32, 16)}
# Of larger heads the reference keeps too much for a gradient: a matrix or more for every token.
LARGEST_TRAINED = 64


def features_of(rule: str) -> Callable[[Tensor], Tensor]:
    return unit_features if rule == "gated_delta" else elu_features


def recall(rule: str, pairs: int, *, backward: bool = False) -> float:
    """The share of pairs that are recalled, a mean over `SEEDS` heads."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(SEEDS, pairs, SIZE, generator=generator)
    values = torch.randn(SEEDS, pairs, SIZE, generator=generator)
    k = features_of(rule)(keys)
    gates = (torch.ones(SEEDS, pairs), torch.zeros(SEEDS, pairs)) if rule == "gated_delta" else (None, None)
    empty = torch.zeros(SEEDS, SIZE, SIZE), torch.zeros(SEEDS, SIZE)
    _, memory, normaliser = read_and_write(*empty, k, k, values, UpdateRule(rule), *gates)
    if backward:
        found, wanted = read_backwards(memory, values), k - k.mean(1, keepdim=True)
    else:
        found, wanted = read(memory, normaliser, k, UpdateRule(rule)).values, values
    unit = torch.nn.functional.normalize
    nearest = (unit(found, dim=-1) @ unit(wanted, dim=-1).transpose(1, 2)).argmax(-1)
    return (nearest == torch.arange(pairs)).float().mean().item()


def seconds(function: Callable[[], Any], times: int) -> float:
    """Processor time, the least of `times` runs: on a machine that others use, wall time says little."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return min(taken)


def speed(rule: str, heads: int, size: int) -> dict[str, float]:
    """Seconds of every form, forward, and forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, TOKENS, size, generator=generator) for _ in range(3))
    q, k = features_of(rule)(q), features_of(rule)(k)
    gates: list[Tensor | None] = [None, None]
    if rule == "gated_delta":
        gates = [torch.rand(1, heads, TOKENS, generator=generator), -0.1 * torch.rand(1, heads, TOKENS)]
    empty = torch.zeros(1, heads, size, size), torch.zeros(1, heads, size)

    def trained(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], None]:
        def step() -> None:
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out, memory = run(*leaves)
            (out.sum() + memory.sum()).backward()

        return step

    def chunks(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        reads, memory, _ = read_and_write(*empty, q, k, v, UpdateRule(rule), *gates)
        return reads.values, memory

    def loop(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tensors = [t[0, 0] for t in (*empty, q, k, v)]
        given = (None if g is None else g[0, 0] for g in gates)
        reads, memory, _ = compressive_reference.read_and_write(*tensors, UpdateRule(rule), *given)
        return reads, memory

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        moved = [t.transpose(1, 2) for t in (q, k, v, gates[1], gates[0]) if t is not None]
        return torch_chunk_gated_delta_rule(*moved, output_final_state=True)

    forms = {"chunks": (chunks, 9), "reference": (loop, 1)}
    if rule == "gated_delta":
        forms["transformers"] = (theirs, 9)
    found = {}
    for name, (form, times) in forms.items():
        with torch.no_grad():
            found[f"{name}, forward"] = seconds(lambda form=form: form(q, k, v), times)  # type: ignore[misc]
        if form is not loop or size <= LARGEST_TRAINED:
            found[f"{name}, forward and backward"] = seconds(trained(form), times)
    return {name: value * (heads if name.startswith("reference") else 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=UPDATE_RULES, default=UPDATE_RULES)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="heads and their size")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for rule in args.rules:
        for name, backward in (("recall", False), ("recall backward", True)):
            of = found.setdefault(name, {})
            if rule not in of:
                of[rule] = {pairs: recall(rule, pairs, backward=backward) for pairs in (8, 16, 32, 64)}
                write_json(args.output, found)
        for shape in args.shapes:
            times = found.setdefault("seconds", {}).setdefault(shape, {})
            if rule not in times:
                times[rule] = speed(rule, *SHAPES[shape])
                write_json(args.output, found)
            print(rule, shape, times[rule], flush=True)


if __name__ == "__main__":
    main()
