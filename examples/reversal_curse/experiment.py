"""The reversal curse: a model that learned "A is B" and is asked for A by B; in weights, in the context, in a memory.

    python examples/reversal_curse/experiment.py            # writes docs/reversal_curse.json

A text is a person and a thing, `A B` for "A is B"; every word is a token. A question is one of the two, and the other
is to be predicted: what is scored is the perplexity of that word, and how often it is the likeliest. Forward is the
direction in which the pair was told. All models have two layers and are trained alike.

- `weights`: fixed pairs are trained on as text, all of them forward, and one half also backward, so that the model has
  seen what a backward question looks like. The other half is asked backward.
- `context`: context-separated training. Every example tells four pairs, drawn anew, and asks for them in one direction
  or the other; only the answers are learned. Nothing can be learned by heart, and told and asked stand in one context.
- `memory`: the same, with a memory layer; the context is cleared between telling and asking.
- `memory, asked forward`: the same, but no backward question is ever trained on.
- `memory, asked forward, read backward`: that model, of which the memory matrix itself is read backward: the value that
  B would be written with is looked up (`memory.read_reverse`), and the pair whose key comes nearest is the answer.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from senri_hf import MemoryCache, SenriConfig, SenriForCausalLM, pythia_layers, senri_layers
from senri_hf.files import write_json
from senri_hf.memory.compressive_layer import Progress
from senri_hf.memory.layout import Layout


OUTPUT = Path(__file__).parents[2] / "docs" / "reversal_curse.json"
PEOPLE, THINGS = 64, 64  # words of each kind; every one is a token
VOCABULARY, WIDTH, TOLD, ROWS, WARM_UP = PEOPLE + THINGS, 64, 4, 64, 30
# Pairs that are told, in four equal parts of the training.
CURRICULUM = (1, 2, TOLD, TOLD)


def build(seed: int, *, memory: bool) -> SenriForCausalLM:
    torch.manual_seed(seed)
    second = senri_layers(1, update_rule="gated_delta", memory_head_dim=32) if memory else pythia_layers(1)
    rotation = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return SenriForCausalLM(
        SenriConfig(
            layers=pythia_layers(1) + second, vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_attention_heads=2, rope_parameters=rotation,
        )
    )  # fmt: skip


def statements(people: Tensor, things: Tensor, backward: Tensor) -> Tensor:
    """Pairs [...] as two tokens each, [..., 2]: `A B`, or `B A`."""
    text = torch.stack([people, things + PEOPLE], -1)
    return torch.where(backward[..., None], text.flip(-1), text)


def draw(rows: int, told_pairs: int, generator: torch.Generator, backward: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs told, [rows, 2 * N], and asked for in another order, [rows, N, 2], each in the direction of its row."""
    people = torch.rand(rows, PEOPLE, generator=generator).argsort(1)[:, :told_pairs]
    things = torch.rand(rows, THINGS, generator=generator).argsort(1)[:, :told_pairs]
    told = statements(people, things, torch.zeros_like(people, dtype=torch.bool)).flatten(1)
    order = torch.rand(rows, told_pairs, generator=generator).argsort(1)
    directions = backward[:, None].expand(-1, told_pairs)
    return told, statements(people.gather(1, order), things.gather(1, order), directions)


def answers(model: Any, told: Tensor | None, asked: Tensor, *, apart: bool) -> Tensor:
    """Logits of the answers to asked [rows, N, 2], [rows * N, vocabulary]; `apart`: see `memory` above."""
    questions = asked.flatten(1)
    if told is None:
        logits = model(questions, use_cache=False).logits
    elif not apart:
        logits = model(torch.cat([told, questions], 1), use_cache=False).logits[:, told.shape[1] :]
    else:
        memory = MemoryCache.for_model(model)
        model(told, past_key_values=memory)
        memory.clear_context()
        logits = model(questions, past_key_values=memory).logits
    return logits[:, ::2].flatten(0, 1)


def train(model: Any, steps: int, rate: float, batch: Any) -> None:
    """`batch(step)` gives the loss of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        loss = batch(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def score(logits: Tensor, right: Tensor) -> dict[str, float]:
    loss = torch.nn.functional.cross_entropy(logits, right).item()
    return {"perplexity": math.exp(loss), "right": (logits.argmax(-1) == right).float().mean().item()}


def both(forward: dict[str, float], backward: dict[str, float]) -> dict[str, Any]:
    gap = backward["perplexity"] - forward["perplexity"]
    return {"forward": forward, "backward": backward, "reversal gap": gap}


def in_weights(seed: int, steps: int, rate: float) -> dict[str, Any]:
    model, generator = build(seed, memory=False), torch.Generator().manual_seed(seed)
    people, things = torch.randperm(PEOPLE, generator=generator), torch.randperm(THINGS, generator=generator)
    half = PEOPLE // 2
    no, yes = torch.zeros(PEOPLE, dtype=torch.bool), torch.ones(half, dtype=torch.bool)
    texts = torch.cat([statements(people, things, no), statements(people[:half], things[:half], yes)])

    def batch(step: int) -> Tensor:
        rows = texts[torch.randint(len(texts), (ROWS,), generator=generator)][:, None]
        return torch.nn.functional.cross_entropy(answers(model, None, rows, apart=False), rows[:, 0, 1])

    train(model, steps, rate, batch)
    with torch.no_grad():
        asked = [statements(people[half:], things[half:], direction[half:])[:, None] for direction in (no, ~no)]
        return both(*(score(answers(model, None, rows, apart=False), rows[:, 0, 1]) for rows in asked))


def from_what_is_told(
    seed: int, steps: int, rate: float, *, memory: bool, backward_too: bool
) -> tuple[dict[str, Any], SenriForCausalLM]:
    model, generator = build(seed, memory=memory), torch.Generator().manual_seed(seed)

    def batch(step: int) -> Tensor:
        backward = (torch.rand(ROWS, generator=generator) < 0.5) & backward_too
        told, asked = draw(ROWS, CURRICULUM[len(CURRICULUM) * step // steps], generator, backward)
        return torch.nn.functional.cross_entropy(answers(model, told, asked, apart=memory), asked[..., 1].flatten())

    train(model, steps, rate, batch)
    held_out, scores = torch.Generator().manual_seed(10**6), []
    with torch.no_grad():
        for backward in (False, True):
            told, asked = draw(512, TOLD, held_out, torch.full((512,), backward))
            scores.append(score(answers(model, told, asked, apart=memory), asked[..., 1].flatten()))
    return both(*scores), model


@torch.no_grad()
def read_backward(model: Any) -> dict[str, float]:
    """How often the pair is found by reading the matrix backward; by guessing, one in `TOLD`."""
    told, asked = draw(512, TOLD, torch.Generator().manual_seed(10**6), torch.ones(512, dtype=torch.bool))
    asked = asked[:, 0]
    memory = MemoryCache.for_model(model)
    model(told, past_key_values=memory)
    memory.clear_context()
    layer = model.model.layers[1]
    _, value = features(model, layer, asked[:, :1])
    found = memory.read_reverse(value)  # [rows, 1, heads, d_k]
    candidates = told[:, ::2]
    ways = []
    for number in range(TOLD):  # with what each person told of would be asked for
        query, _ = features(model, layer, candidates[:, number : number + 1])
        ways.append(torch.nn.functional.cosine_similarity(query[:, -1:].flatten(1), found.flatten(1)))
    chosen = candidates.gather(1, torch.stack(ways, 1).argmax(1, keepdim=True))[:, 0]
    return {"right": (chosen == asked[:, 1]).float().mean().item(), "by guessing": 1 / TOLD}


def features(model: Any, layer: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The queries and the values that the memory layer makes of a text of its own, [rows, T, heads, d]."""
    hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[1]
    layout = Layout.of(torch.ones_like(ids, dtype=torch.bool))
    point = Progress.begin(ids.shape[0], layer.memory.shape, ids.device, commits=False)
    queries, tokens = layer.memory.associations(layer.input_layernorm(hidden), point, layout)
    return queries, tokens.values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in args.seeds:
        results: dict[str, Any] = {"weights": in_weights(seed, args.steps, args.rate)}
        print("weights", results["weights"], flush=True)
        for name, memory, backward in (
            ("context", False, True), ("memory", True, True), ("memory, asked forward", True, False),
        ):  # fmt: skip
            results[name], model = from_what_is_told(seed, args.steps, args.rate, memory=memory, backward_too=backward)
            print(name, results[name], flush=True)
        results["memory, asked forward, read backward"] = read_backward(model)
        print("read backward", results["memory, asked forward, read backward"], flush=True)
        found[f"seed {seed}, {args.steps} steps"] = results
        write_json(args.output, found)


if __name__ == "__main__":
    main()
