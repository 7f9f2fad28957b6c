"""What the examples share: one step of training with AdamW, a warm-up and a cosine; and where results go."""

import json
import math
from typing import Any

import torch
from settings import RESULTS, WARM_UP, WEIGHT_DECAY
from torch import Tensor

from senri_hf.files import write_json


def optimizer_and_schedule(model: torch.nn.Module, rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW, and its learning rate over so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    return optimizer, schedule


def learn(model: torch.nn.Module, loss: Tensor, optimizer: Any, schedule: Any) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def size(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def keep(part: str, found: dict[str, Any]) -> None:
    """Put one part of the results beside the others, and print it."""
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    everything[part] = found
    write_json(RESULTS, everything)
    print(json.dumps({part: found}, indent=1), flush=True)
