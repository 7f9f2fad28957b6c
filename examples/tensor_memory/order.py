"""Does memory know which of two words came first? Asked of pairs of words that training never saw together.

    python examples/tensor_memory/order.py

A text is `noise … A … noise … B … noise`; it is trained with `ASK A B` after it, the words in their order. Then, on
pairs that are held out:

- *asked*: a text is read, its context is cleared, and `ASK` is put to what memory holds: is A more likely than B?
- *probe*: a linear probe (ridge regression) on the matrices and normalisers alone scores all words by whether they came
  first; it is fitted on texts with the pairs that were trained on. The model before training is probed in the same way,
  and so is one layer of heads that do not fade: a sum does not tell in which order it was added up.

Settings are in `settings.py`, models in `models.py`; results go into `docs/tensor_memory.json`.
"""

import copy
from typing import Any

import torch
from models import ORDER, ORDER_LASTING
from settings import (
    ORDER_ASK,
    ORDER_GAPS,
    ORDER_HELD_OUT,
    ORDER_NOISE,
    ORDER_RATE,
    ORDER_ROWS,
    ORDER_STEPS,
    ORDER_WORDS,
    PROBE_PENALTY,
    PROBE_TEXTS,
    SEED,
)
from torch import Tensor
from training import keep, learn, optimizer_and_schedule, size

from senri_hf import MemoryCache


def split_pairs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of words [N, 2], the smaller id first: those that are trained on, and those that are held out."""
    pairs = torch.combinations(torch.arange(ORDER_WORDS))
    shuffled = pairs[torch.randperm(len(pairs), generator=generator)]
    held_out = round(ORDER_HELD_OUT * len(pairs))
    return shuffled[held_out:], shuffled[:held_out]


def texts(words: Tensor, generator: torch.Generator) -> Tensor:
    """[N, T] with the words [N, 2] in their order, and noise before, between and after them."""
    before, between, after = (
        ORDER_WORDS + torch.randint(ORDER_NOISE, (len(words), gap), generator=generator) for gap in ORDER_GAPS
    )
    return torch.cat([before, words[:, :1], between, words[:, 1:], after], dim=1)


def train(model: Any, pairs: Tensor, generator: torch.Generator) -> None:
    """On texts of these pairs in both orders, each followed by the question and its answer."""
    optimizer, schedule = optimizer_and_schedule(model, ORDER_RATE, ORDER_STEPS)
    for step in range(ORDER_STEPS):
        chosen = pairs[torch.randint(len(pairs), (ORDER_ROWS,), generator=generator)]
        swapped = torch.rand(ORDER_ROWS, generator=generator) < 0.5
        words = torch.where(swapped[:, None], chosen.flip(1), chosen)
        ids = torch.cat([texts(words, generator), torch.full((ORDER_ROWS, 1), ORDER_ASK), words[:, :1]], dim=1)
        logits = model(ids, use_cache=False, logits_to_keep=2).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten())
        learn(model, loss, optimizer, schedule)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


def both_orders(pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of every pair in both orders, several times; the pairs, and whether the smaller id comes first."""
    many = pairs.repeat(2 * PROBE_TEXTS, 1)
    first = torch.arange(len(many)) < len(many) // 2
    return texts(torch.where(first[:, None], many, many.flip(1)), generator), many, first


@torch.no_grad()
def read(model: Any, ids: Tensor) -> MemoryCache:
    """The memory of texts, with their context cleared."""
    memory = MemoryCache.for_model(model)
    model(ids, past_key_values=memory)
    memory.clear_context()
    return memory


@torch.no_grad()
def asked(model: Any, pairs: Tensor, generator: torch.Generator) -> float:
    """The share of questions that are answered rightly from memory alone."""
    ids, many, first = both_orders(pairs, generator)
    question = torch.full((len(many), 1), ORDER_ASK)
    logits = model(question, past_key_values=read(model, ids)).logits[:, -1].gather(1, many)
    return ((logits[:, 0] > logits[:, 1]) == first).float().mean().item()


def features(model: Any, ids: Tensor) -> Tensor:
    """All numbers that memory holds of texts [N, T], [N, F]."""
    held = read(model, ids).state_dict()
    return torch.cat([tensor.flatten(1) for tensor in held.values() if tensor.is_floating_point()], dim=1)


def probed(model: Any, fitted: Tensor, tested: Tensor, generator: torch.Generator) -> float:
    """The share of texts of the pairs `tested` of which a probe that was fitted on others tells the order.

    It gives every word a score, linear in memory: 1 for the word that came first, -1 for the one that came second.
    """
    ids, many, first = both_orders(fitted, generator)
    x, sign = features(model, ids), first.float() * 2 - 1
    y = torch.zeros(len(many), ORDER_WORDS, dtype=x.dtype).scatter(1, many, torch.stack([sign, -sign], dim=1))
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / scale
    weights = torch.linalg.solve(x.T @ x + PROBE_PENALTY * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    ids, many, first = both_orders(tested, generator)
    scores = ((features(model, ids) - mean) / scale @ weights).gather(1, many)
    return ((scores[:, 0] > scores[:, 1]) == first).float().mean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    chance = torch.Generator().manual_seed(SEED)
    trained_pairs, held_out_pairs = split_pairs(chance)
    untrained = copy.deepcopy(ORDER)
    train(ORDER, trained_pairs, chance)
    ORDER.eval()
    keep(
        "order",
        {
            "parameters": size(ORDER),
            "pairs": {"trained": len(trained_pairs), "held out": len(held_out_pairs)},
            "asked, held-out pairs": asked(ORDER, held_out_pairs, chance),
            "asked, trained pairs": asked(ORDER, trained_pairs, chance),
            "probe, held-out pairs": probed(ORDER, trained_pairs, held_out_pairs, chance),
            "probe before training, held-out pairs": probed(untrained, trained_pairs, held_out_pairs, chance),
            "probe of one layer of heads that do not fade": probed(
                ORDER_LASTING, trained_pairs, held_out_pairs, chance
            ),
        },
    )
