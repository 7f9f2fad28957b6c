"""The compressive mechanism as its formulas say it: one head, token by token.

For reading, and for tests and benchmarks to hold `compressive` against; nothing else imports it.
"""

import torch
from torch import Tensor

from .compressive import UpdateRule


def read_and_write(
    memory: Tensor,
    normaliser: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: UpdateRule,
    strength: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read with every token's query, then write its key and value, for one head of one row.

    Args:
        memory: [d_k, d_v]. normaliser: [d_k].
        queries, keys: [T, d_k] features. values: [T, d_v].
        strength, log_decay: [T] of `"gated_delta"`.

    Returns:
        Reads [T, d_v], and memory and normaliser after the last token.
    """
    reads = []
    for t in range(len(keys)):
        q, k, v = queries[t], keys[t], values[t]
        if rule.name == "gated_delta":
            assert strength is not None and log_decay is not None
            memory = log_decay[t].exp() * memory
            memory = memory + strength[t] * torch.outer(k, v - k @ memory)
            normaliser = normaliser + k
            reads.append(q @ memory)
            continue
        reads.append(lookup(memory, normaliser, q, rule))
        if not k.any():  # a token that is not written
            continue
        held = torch.zeros_like(v) if rule.name == "additive" else lookup(memory, normaliser, k, rule)
        weight: Tensor | float = 1.0
        if rule.name == "corrected_delta":
            weight = (1 - k @ normaliser / (k @ k)).clamp(0, 1)
        added = torch.outer(k, v - held)
        if rule.decay is not None:
            added, weight = (1 - rule.decay) * added, 1 - rule.decay
        if rule.max_delta is not None:
            added = added.clamp(-rule.max_delta, rule.max_delta)
        kept = 1.0 if rule.decay is None else rule.decay
        memory, normaliser = kept * memory + added, kept * normaliser + weight * k
        if rule.max_memory is not None:
            memory = memory.clamp(-rule.max_memory, rule.max_memory)
        if rule.max_norm is not None and memory.norm() > rule.max_norm:
            memory = memory * (rule.max_norm / memory.norm())
    return torch.stack(reads), memory, normaliser


def lookup(memory: Tensor, normaliser: Tensor, feature: Tensor, rule: UpdateRule) -> Tensor:
    """What memory holds at a feature [d_k]: feature M / (feature z), 0 while the memory is empty."""
    match = feature @ normaliser
    return feature @ memory / match if match > rule.eps else torch.zeros_like(memory[0])
