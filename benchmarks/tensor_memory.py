"""What tensor memory costs: beside the Senri mechanism at equal shapes, and many heads beside one of their width.

    python benchmarks/tensor_memory.py

One memory layer, without norms and feed-forward networks, forward and forward with backward: processor time of one
thread, the median of `TIMES` rounds in which all are run in turn, so that what else the machine does meets all of them.
`8 heads of 64 that differ` are three groups: the delta rule, the delta rule with decay, and the additive rule.
Results are in `docs/tensor_memory_speed.json`.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senri_hf import (
    CompressiveConfig,
    LinearMemoryAttention,
    MultiHeadMemory,
    TensorMemory,
    TensorMemoryHeadConfig,
)
from senri_hf.files import write_json
from senri_hf.memory import CompressiveMemory
from senri_hf.memory.layout import Layout


OUTPUT = Path(__file__).parent.parent / "docs" / "tensor_memory_speed.json"
ROWS, TOKENS, HIDDEN, TIMES = 4, 512, 512, 7

torch.manual_seed(0)
HEAD_64 = TensorMemoryHeadConfig(dim=64, eps=0.0, use_delta_rule=True)
HEAD_512 = TensorMemoryHeadConfig(dim=512, eps=0.0, use_delta_rule=True)
FADING_64 = TensorMemoryHeadConfig(dim=64, eps=0.0, use_delta_rule=True, decay=0.9)
ADDITIVE_64 = TensorMemoryHeadConfig(dim=64, eps=0.0, use_delta_rule=False)

EIGHT_HEADS = LinearMemoryAttention(
    memory=MultiHeadMemory(
        [
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
        ]
    ),
    hidden_size=HIDDEN,
    bias=False,
    normalize_qkv=False,
)
ONE_HEAD = LinearMemoryAttention(
    memory=MultiHeadMemory([TensorMemory(HEAD_512)]), hidden_size=HIDDEN, bias=False, normalize_qkv=False
)
HEADS_THAT_DIFFER = LinearMemoryAttention(
    memory=MultiHeadMemory(
        [
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(HEAD_64),
            TensorMemory(FADING_64),
            TensorMemory(FADING_64),
            TensorMemory(FADING_64),
            TensorMemory(ADDITIVE_64),
            TensorMemory(ADDITIVE_64),
        ]
    ),
    hidden_size=HIDDEN,
    bias=False,
    normalize_qkv=False,
)
SENRI = CompressiveMemory(HIDDEN, CompressiveConfig(update_rule="delta", memory_head_dim=64))
SENRI_ONE_HEAD = CompressiveMemory(HIDDEN, CompressiveConfig(update_rule="delta", memory_head_dim=512))

LAYERS: dict[str, nn.Module] = {
    "Senri, 8 heads of 64": SENRI,
    "8 heads of 64": EIGHT_HEADS,
    "Senri, one head of 512": SENRI_ONE_HEAD,
    "one head of 512": ONE_HEAD,
    "8 heads of 64 that differ": HEADS_THAT_DIFFER,
}


def forward(layer: Any, hidden: Tensor, layout: Layout) -> Tensor:
    """What a layer reads in a pass without a cache."""
    return layer(hidden, None, layout, writes=True)[0]


def step(layer: Any, hidden: Tensor, layout: Layout) -> None:
    """A pass and its gradients."""
    layer.zero_grad(set_to_none=True)
    forward(layer, hidden.requires_grad_(), layout).sum().backward()


def timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def seconds(layers: dict[str, Any], hidden: Tensor, layout: Layout) -> dict[str, dict[str, float]]:
    """Processor seconds of every layer."""
    taken: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward and backward": []} for name in layers}
    for turn in range(TIMES + 1):
        for name, layer in layers.items():
            with torch.no_grad():
                one = timed(partial(forward, layer, hidden, layout))
            both = timed(partial(step, layer, hidden, layout))
            if turn:  # the first one warms up
                taken[name]["forward"].append(one)
                taken[name]["forward and backward"].append(both)
    return {name: {way: statistics.median(times) for way, times in ways.items()} for name, ways in taken.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = torch.randn(ROWS, TOKENS, HIDDEN)
    everything = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    found = seconds(LAYERS, inputs, Layout(None, everything, everything))
    results = {
        "setting": {"rows": ROWS, "tokens": TOKENS, "hidden size": HIDDEN, "torch": torch.__version__},
        "seconds": found,
        "times Senri, 8 heads of 64": {
            way: found["8 heads of 64"][way] / found["Senri, 8 heads of 64"][way] for way in found["8 heads of 64"]
        },
        "times Senri, one head of 512": {
            way: found["one head of 512"][way] / found["Senri, one head of 512"][way]
            for way in found["one head of 512"]
        },
        "8 heads of 64 times one head of 512": {
            way: found["8 heads of 64"][way] / found["one head of 512"][way] for way in found["one head of 512"]
        },
    }
    write_json(OUTPUT, results)
    print(json.dumps(results, indent=1))
