"""Tensor memory beside a standard Transformer of the same size, trained on the same tokens.

    python examples/tensor_memory/compare.py

*Text*: three books are read in windows, `TEXT_ROWS` streams at a time; tensor memory carries its memory from window to
window, the Transformer sees its window. Both are tested on a book that neither has read: tensor memory reads it as one
stream, the Transformer with a window that moves on by half, so that it sees at least half a window before each token
(but the first ones). Perplexity is by the distance of the context that a token needs: tokens that complete a pair of
tokens which is not in the training books more than `TEXT_RARE` times, and was last seen so many tokens before in the
tested one. Context tells these, and what was learned hardly does.

*Recall*: pairs of a key and a value, then the keys again; the share of values that are predicted, on new sequences.

Settings are in `settings.py`, models in `models.py`; results go into `docs/tensor_memory.json`.
"""

import copy
import math
import time
from collections import Counter
from typing import Any

import torch
from models import RECALL, RECALL_TRANSFORMER, TEXT, TEXT_TRANSFORMER
from settings import (
    DISTANCES,
    HELD_OUT_BOOK,
    RECALL_PAIRS,
    RECALL_RATES,
    RECALL_ROWS,
    RECALL_STEPS,
    RECALL_TESTED,
    RECALL_VOCABULARY,
    SEED,
    TEXT_RARE,
    TEXT_RATE,
    TEXT_ROWS,
    TEXT_STEPS,
    TEXT_TESTED,
    TEXT_VOCABULARY,
    TEXT_WINDOW,
    TRAINING_BOOKS,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training import keep, learn, optimizer_and_schedule, size

from senri_hf import MemoryCache
from senri_hf.tasks import AssociativeRecall
from senri_hf.tasks.text import ordinary_text


def books() -> tuple[Tensor, Tensor]:
    """Ids of the training books, one after another, and of the one that is held out."""
    training = ["\n".join(ordinary_text(book)) for book in TRAINING_BOOKS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        training,
        trainers.BpeTrainer(
            vocab_size=TEXT_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    trained = [tokenizer.encode(text).ids for text in training]
    tested = tokenizer.encode("\n".join(ordinary_text(HELD_OUT_BOOK))).ids[:TEXT_TESTED]
    return torch.tensor([token for ids in trained for token in ids]), torch.tensor(tested)


def train_text(model: Any, ids: Tensor, carries: bool) -> float:
    """Train on windows of the books, stream by stream, again from the start at their end; the seconds that it took."""
    streams = ids[: len(ids) // TEXT_ROWS * TEXT_ROWS].view(TEXT_ROWS, -1)
    optimizer, schedule = optimizer_and_schedule(model, TEXT_RATE, TEXT_STEPS)
    start, place, memory = time.process_time(), 0, None
    for step in range(TEXT_STEPS):
        if place + TEXT_WINDOW + 1 > streams.shape[1]:
            place, memory = 0, None
        if carries and memory is None:
            memory = MemoryCache.for_model(model)
        window = streams[:, place : place + TEXT_WINDOW + 1]
        logits = model(window[:, :-1], past_key_values=memory, use_cache=carries).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        learn(model, loss, optimizer, schedule)
        if memory is not None:
            memory.detach()
        place += TEXT_WINDOW
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return time.process_time() - start


@torch.no_grad()
def losses_of(model: Any, ids: Tensor, carries: bool) -> Tensor:
    """The loss of every token but the first, [T - 1]; without memory carried, of windows that move on by half."""
    model.eval()
    found: list[Tensor] = []
    memory = MemoryCache.for_model(model) if carries else None
    reach = 0 if carries else TEXT_WINDOW // 2
    for start in range(0, len(ids) - 1, TEXT_WINDOW // 2):
        stop = min(start + TEXT_WINDOW // 2, len(ids) - 1)
        begin = max(0, start - reach)
        logits = model(ids[None, begin:stop], past_key_values=memory, use_cache=carries).logits[0, start - begin :]
        found.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none"))
    return torch.cat(found)


def needed_distances(trained: Tensor, tested: Tensor) -> Tensor:
    """How far back the context lies that tells a token of `tested` [T], for all but the first; 0 where none does."""
    known = Counter(zip(trained[:-1].tolist(), trained[1:].tolist(), strict=True))
    seen: dict[tuple[int, int], int] = {}
    distances = []
    for place, pair in enumerate(zip(tested[:-1].tolist(), tested[1:].tolist(), strict=True)):
        distances.append(place - seen[pair] if pair in seen and known[pair] <= TEXT_RARE else 0)
        seen[pair] = place
    return torch.tensor(distances)


def perplexities(losses: Tensor, distances: Tensor) -> dict[str, float]:
    """By distance, and of all tokens."""
    found = {"all tokens": losses.mean().exp().item()}
    for least, most in DISTANCES:
        within = (distances >= least) & (distances <= (math.inf if most is None else most))
        found[f"{least} or more" if most is None else f"{least} to {most}"] = losses[within].mean().exp().item()
    beyond = distances > TEXT_WINDOW
    found[f"of these more than {TEXT_WINDOW}"] = losses[beyond].mean().exp().item()
    return found


def compare_text() -> dict[str, Any]:
    trained, tested = books()
    distances = needed_distances(trained, tested)
    counts = {
        f"{least} or more" if most is None else f"{least} to {most}": int(
            ((distances >= least) & (distances <= (math.inf if most is None else most))).sum()
        )
        for least, most in DISTANCES
    }
    counts[f"of these more than {TEXT_WINDOW}"] = int((distances > TEXT_WINDOW).sum())
    found: dict[str, Any] = {
        "tokens of the training books": len(trained),
        "tokens trained on": TEXT_STEPS * TEXT_ROWS * TEXT_WINDOW,
        "tokens tested": {"all tokens": len(tested) - 1, **counts},
    }
    print(found, flush=True)
    for name, model, carries in (("tensor memory", TEXT, True), ("Transformer", TEXT_TRANSFORMER, False)):
        seconds = train_text(model, trained, carries)
        found[name] = {
            "parameters": size(model),
            "perplexity": perplexities(losses_of(model, tested, carries), distances),
            "processor seconds": round(seconds, 1),
        }
        if carries:
            found["tensor memory, reset every window"] = {
                "parameters": size(model),
                "perplexity": perplexities(losses_of(model, tested, False), distances),
            }
    return found


@torch.no_grad()
def recalled(model: Any, pairs: int) -> float:
    """The share of values that are predicted, on sequences of their own seed."""
    task = AssociativeRecall(pairs, RECALL_VOCABULARY)
    ids, labels = task.batch(RECALL_TESTED, torch.Generator().manual_seed(10**6 + SEED))
    asked = labels[:, 1:] >= 0
    return (model(ids, use_cache=False).logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].float().mean().item()


def compare_recall() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, declared in (("tensor memory", RECALL), ("Transformer", RECALL_TRANSFORMER)):
        for rate in RECALL_RATES:
            model, generator = copy.deepcopy(declared), torch.Generator().manual_seed(SEED)
            optimizer, schedule = optimizer_and_schedule(model, rate, RECALL_STEPS)
            start, tokens = time.process_time(), 0
            for step in range(RECALL_STEPS):
                task = AssociativeRecall(RECALL_PAIRS[step % len(RECALL_PAIRS)], RECALL_VOCABULARY)
                ids, labels = task.batch(RECALL_ROWS, generator)
                tokens += ids.numel()
                learn(model, model(ids, labels=labels, use_cache=False).loss, optimizer, schedule)
            found[f"{name}, rate {rate:g}"] = {
                "parameters": size(model),
                "tokens trained on": tokens,
                "accuracy": {f"{pairs} pairs": recalled(model, pairs) for pairs in RECALL_PAIRS},
                "processor seconds": round(time.process_time() - start, 1),
            }
            print(name, rate, found[f"{name}, rate {rate:g}"], flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep("text", compare_text())
    keep("recall", compare_recall())
