"""Memory carried from window to window in training, across documents, and to another process.

    python examples/tensor_memory/windows.py

Pairs are told in one window and asked for in the next. *Carried*: the loss of the second reaches the weights through
what the first one wrote. *Reset*: the same training, of the same model on the same batches, with an empty memory at
the start of every window. Both are tested with memory carried.

The model that was trained with carried memory then reads documents of other pairs between being told and being asked,
each with its context cleared after it; and leaves model, memory and questions in a folder, of which `ask.py` answers
them in a process of its own.

Settings are in `settings.py`, models in `models.py`; results go into `docs/tensor_memory.json`.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from models import RECALL
from safetensors.torch import save_file
from settings import (
    DOCUMENTS_BETWEEN,
    FOLDER,
    RECALL_PAIRS,
    RECALL_ROWS,
    RECALL_TESTED,
    RECALL_VOCABULARY,
    SEED,
    WINDOW_RATE,
    WINDOW_STEPS,
)
from torch import Tensor
from training import keep, learn, optimizer_and_schedule

from senri_hf import MemoryCache
from senri_hf.tasks import AssociativeRecall


def windows(pairs: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is told, what is asked, and the labels of the latter."""
    ids, labels = AssociativeRecall(pairs, RECALL_VOCABULARY).batch(rows, generator)
    return ids[:, : 2 * pairs], ids[:, 2 * pairs :], labels[:, 2 * pairs :]


def train(model: Any, carries: bool) -> None:
    """On windows that are told and asked, with memory carried between them or not."""
    optimizer, schedule = optimizer_and_schedule(model, WINDOW_RATE, WINDOW_STEPS)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(WINDOW_STEPS):
        told, asked, labels = windows(RECALL_PAIRS[step % len(RECALL_PAIRS)], RECALL_ROWS, generator)
        memory = MemoryCache.for_model(model)
        model(told, past_key_values=memory)
        memory.clear_context()
        if not carries:
            memory.reset_memory()
        learn(model, model(asked, past_key_values=memory, labels=labels).loss, optimizer, schedule)


def share(model: Any, asked: Tensor, labels: Tensor, memory: MemoryCache) -> float:
    """The share of values that are predicted from memory."""
    wanted = labels[:, 1:] >= 0
    answers = model(asked, past_key_values=memory).logits[:, :-1].argmax(-1)
    return (answers == labels[:, 1:])[wanted].float().mean().item()


@torch.no_grad()
def recalled(model: Any, pairs: int, documents: int) -> float:
    """What is recalled of pairs after so many documents of pairs with other keys; context is cleared after each."""
    generator = torch.Generator().manual_seed(10**6 + SEED)
    half = RECALL_VOCABULARY // 2
    rows = RECALL_TESTED // 4
    told, asked, labels = windows(pairs, rows, generator)
    memory = MemoryCache.for_model(model)
    model(told, past_key_values=memory)
    memory.clear_context()
    spare = [[key for key in range(half) if key not in row] for row in told[:, ::2].tolist()]
    for _ in range(documents):
        order = torch.rand(rows, len(spare[0]), generator=generator).argsort(1)[:, :pairs]
        keys = torch.tensor(spare).gather(1, order)
        values = torch.randint(half, RECALL_VOCABULARY, keys.shape, generator=generator)
        model(torch.stack([keys, values], dim=-1).flatten(1), past_key_values=memory)
        memory.clear_context()
    return share(model, asked, labels, memory)


@torch.no_grad()
def elsewhere(model: Any, pairs: int) -> dict[str, Any]:
    """What this process and another one recall of the same memory."""
    told, asked, labels = windows(pairs, RECALL_ROWS, torch.Generator().manual_seed(10**6 + SEED))
    memory = MemoryCache.for_model(model)
    model(told, past_key_values=memory)
    memory.clear_context()
    model.save_pretrained(FOLDER / "model")
    memory.save_pretrained(FOLDER / "memory")
    save_file({"asked": asked.contiguous(), "labels": labels.contiguous()}, FOLDER / "questions.safetensors")
    subprocess.run([sys.executable, str(Path(__file__).with_name("ask.py"))], check=True)
    answers = json.loads((FOLDER / "answers.json").read_text())
    return {
        "in this process": share(model, asked, labels, memory),
        **answers,
        "bytes of memory a row": memory.nbytes // RECALL_ROWS,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    carried, reset = copy.deepcopy(RECALL), copy.deepcopy(RECALL)
    train(carried, carries=True)
    train(reset, carries=False)
    keep(
        "windows",
        {
            "trained with carried memory": {f"{pairs} pairs": recalled(carried, pairs, 0) for pairs in RECALL_PAIRS},
            "trained with reset memory": {f"{pairs} pairs": recalled(reset, pairs, 0) for pairs in RECALL_PAIRS},
            "documents between, 4 pairs each": {str(count): recalled(carried, 4, count) for count in DOCUMENTS_BETWEEN},
            "another process, 8 pairs": elsewhere(carried, 8),
        },
    )
