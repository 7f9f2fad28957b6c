"""Kernels of fla (flash-linear-attention) for the compressive mechanism, on a GPU where they are installed.

`pip install senri_hf[gpu]` brings them. Without them, on a CPU, and for what they do not compute, `compressive` has its
own form in PyTorch.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .compressive import UpdateRule


# The size of a head that the kernels take at most.
LARGEST_HEAD = 256


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """fla's gated delta rule, None where it is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


def serve(keys: Tensor, values: Tensor, rule: "UpdateRule") -> bool:
    """Whether the kernels compute this rule for tensors such as these: keys [*, T, d_k] and values [*, T, d_v]."""
    fits = max(keys.shape[-1], values.shape[-1]) <= LARGEST_HEAD and keys.shape[-2] > 1
    return keys.is_cuda and fits and rule.removes and rule.decay is None and kernel() is not None


def run(
    memory: Tensor, queries: Tensor, keys: Tensor, values: Tensor, strength: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """M = a M + b k^T (v - a k M), read after each write.

    Args:
        memory: [*, d_k, d_v]. queries, keys: [*, T, d_k]. values: [*, T, d_v].
        strength, log_decay: [*, T] b and log a.

    Returns:
        Reads [*, T, d_v] and the memory after the last token, in float32.
    """
    function = kernel()
    assert function is not None
    heads = keys.shape[:-2]

    def by_token(tensor: Tensor) -> Tensor:
        """[*, T, ...] to [heads, T, 1, ...], as fla has it."""
        return tensor.flatten(0, len(heads) - 1).unsqueeze(2).contiguous()

    reads, after = function(
        *(by_token(tensor) for tensor in (queries, keys, values)),
        g=by_token(log_decay.float()),
        beta=by_token(strength.float()),
        scale=1.0,
        initial_state=memory.reshape(-1, 1, *memory.shape[-2:]).contiguous(),
        output_final_state=True,
    )
    return reads[:, :, 0].unflatten(0, heads).to(torch.float32), after[:, 0].unflatten(0, heads)
