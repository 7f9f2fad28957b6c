"""The reversal curse: a model that learned "A is B" and is asked for A by B; in weights, in the context, in a memory.

    python examples/reversal_curse/experiment.py            # writes docs/reversal_curse.json

People like things, one to one; every word is a token. A question gives one side, `A likes` or `B is-liked-by`,
and the other side is to be predicted; what is scored is the perplexity of that one word, and how often it is the
likeliest. Forward is the direction in which the pair was told. All models have two layers and are trained alike.

- `weights`: fixed pairs are trained on as text, all of them forward, and one half also backward, so that the model has
  seen what a backward question looks like. The other half is asked backward.
- `context`: context-separated training. Every example tells four pairs, drawn anew, and asks for one of them in either
  direction; only the answer is learned. Nothing can be learned by heart, and told and asked stand in one context.
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
from senri_hf.memory.compressive_layer import Progress
from senri_hf.memory.layout import Layout


OUTPUT = Path(__file__).parents[2] / "docs" / "reversal_curse.json"
PEOPLE, THINGS = 64, 64  # words of each kind; every one is a token
LIKES, LIKED_BY = PEOPLE + THINGS, PEOPLE + THINGS + 1
VOCABULARY, WIDTH, TOLD, ROWS, WARM_UP = PEOPLE + THINGS + 2, 64, 4, 64, 30


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
    """Pairs [...] as three tokens each, [..., 3]: `A likes B`, or `B is-liked-by A`."""
    forward_text = torch.stack([people, torch.full_like(people, LIKES), things + PEOPLE], -1)
    backward_text = torch.stack([things + PEOPLE, torch.full_like(people, LIKED_BY), people], -1)
    return torch.where(backward[..., None], backward_text, forward_text)


def draw(rows: int, generator: torch.Generator, backward: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs told, [rows, 3 * TOLD], and a question about one of them with its answer, [rows, 3]."""
    people = torch.rand(rows, PEOPLE, generator=generator).argsort(1)[:, :TOLD]
    things = torch.rand(rows, THINGS, generator=generator).argsort(1)[:, :TOLD]
    told = statements(people, things, torch.zeros_like(people, dtype=torch.bool)).flatten(1)
    asked = torch.randint(TOLD, (rows, 1), generator=generator)
    return told, statements(people.gather(1, asked)[:, 0], things.gather(1, asked)[:, 0], backward)


def answers(model: Any, told: Tensor | None, asked: Tensor, *, apart: bool) -> Tensor:
    """Logits of the answer, [rows, vocabulary]; `apart`: the context is cleared between telling and asking."""
    question = asked[:, :2]
    if told is None:
        return model(question, use_cache=False).logits[:, -1]
    if not apart:
        return model(torch.cat([told, question], 1), use_cache=False).logits[:, -1]
    memory = MemoryCache.for_model(model)
    model(told, past_key_values=memory)
    memory.clear_context()
    return model(question, past_key_values=memory).logits[:, -1]


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
        rows = texts[torch.randint(len(texts), (ROWS,), generator=generator)]
        return torch.nn.functional.cross_entropy(answers(model, None, rows, apart=False), rows[:, 2])

    train(model, steps, rate, batch)
    with torch.no_grad():
        asked = [statements(people[half:], things[half:], direction[half:]) for direction in (no, ~no)]
        return both(*(score(answers(model, None, rows, apart=False), rows[:, 2]) for rows in asked))


def from_what_is_told(
    seed: int, steps: int, rate: float, *, memory: bool, backward_too: bool
) -> tuple[dict[str, Any], SenriForCausalLM]:
    model, generator = build(seed, memory=memory), torch.Generator().manual_seed(seed)

    def batch(step: int) -> Tensor:
        backward = (torch.rand(ROWS, generator=generator) < 0.5) & backward_too
        told, asked = draw(ROWS, generator, backward)
        return torch.nn.functional.cross_entropy(answers(model, told, asked, apart=memory), asked[:, 2])

    train(model, steps, rate, batch)
    held_out, scores = torch.Generator().manual_seed(10**6), []
    with torch.no_grad():
        for backward in (False, True):
            told, asked = draw(512, held_out, torch.full((512,), backward))
            scores.append(score(answers(model, told, asked, apart=memory), asked[:, 2]))
    return both(*scores), model


@torch.no_grad()
def read_backward(model: Any) -> dict[str, float]:
    """How often the pair is found by reading the matrix backward; by guessing, one in `TOLD`."""
    told, asked = draw(512, torch.Generator().manual_seed(10**6), torch.ones(512, dtype=torch.bool))
    memory = MemoryCache.for_model(model)
    model(told, past_key_values=memory)
    memory.clear_context()
    layer = model.model.layers[1]
    _, value = features(model, layer, asked[:, :1])
    found = memory.read_reverse(value)  # [rows, 1, heads, d_k]
    candidates = told[:, ::3]
    ways = []
    for number in range(TOLD):  # with what each person told of would be asked for
        question = torch.stack([candidates[:, number], torch.full((len(told),), LIKES)], 1)
        query, _ = features(model, layer, question)
        ways.append(torch.nn.functional.cosine_similarity(query[:, -1:].flatten(1), found.flatten(1)))
    chosen = candidates.gather(1, torch.stack(ways, 1).argmax(1, keepdim=True))[:, 0]
    return {"right": (chosen == asked[:, 2]).float().mean().item(), "by guessing": 1 / TOLD}


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
    parser.add_argument("--steps", type=int, default=600)
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
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
