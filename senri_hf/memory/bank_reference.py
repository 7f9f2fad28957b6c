"""The bank mechanism as its formulas say it, token by token: for readers and for tests."""

import torch
from torch import Tensor, nn

from ..configuration import BankConfig


def read_bank(
    x: Tensor,
    rows: Tensor,
    projections: dict[str, Tensor],
    num_heads: int,
    config: BankConfig,
    router: Tensor | None = None,
    strategy: str = "prefix",
    real: Tensor | None = None,
    starts: Tensor | None = None,
    prompt_length: int | None = None,
) -> Tensor:
    """What the tokens of one row read of a bank.

    Args:
        x: [T, D] the tokens, normalised. rows: [N, width] the bank.
        projections: `q` [a, D], `k` and `v` [a, width], `o` [D, a], heads one after another in a.
        router: [C, D] weights of the router over routed chapters; None reads the whole bank.
        strategy: What tokens are routed by, one of `ROUTING_STRATEGIES`.
        real: [T] the tokens that are no padding; all when None.
        starts: [T] where another document begins.
        prompt_length: Real tokens that are the prompt, for `"hybrid"`; all when None.

    Returns:
        [T, D]
    """
    outputs = []
    for t in range(x.shape[0]):
        if router is None:
            read = attend(x[t], rows, projections, num_heads)
        else:
            length = config.tokens_per_chapter
            chapters = [rows[c * length : (c + 1) * length] for c in range(config.num_chapters)]
            shared, routed = chapters[: config.num_shared_chapters], chapters[config.num_shared_chapters :]
            by = routed_by(x, t, strategy, config, real, starts, prompt_length)
            probability = (router @ by).softmax(-1)
            weight, chosen = probability.topk(config.top_k_chapters)
            if config.router_weights_are_normalized:
                weight = weight / weight.sum()
            read = sum(
                w * config.routed_scaling_factor * attend(x[t], routed[c], projections, num_heads)
                for w, c in zip(weight, chosen.tolist(), strict=True)
            ) + sum(attend(x[t], chapter, projections, num_heads) for chapter in shared)
        outputs.append(projections["o"] @ read)
    return torch.stack(outputs)


def attend(token: Tensor, rows: Tensor, projections: dict[str, Tensor], num_heads: int) -> Tensor:
    """softmax(W_q x (W_k M)^T / sqrt(d)) W_v M of every head, for token [D] and rows [T, width]: [a]."""
    query = (projections["q"] @ token).unflatten(0, (num_heads, -1))
    keys = (rows @ projections["k"].T).unflatten(1, (num_heads, -1))
    values = (rows @ projections["v"].T).unflatten(1, (num_heads, -1))
    heads = []
    for h in range(num_heads):
        score = keys[:, h] @ query[h] / query.shape[1] ** 0.5
        heads.append(score.softmax(0) @ values[:, h])
    return torch.cat(heads)


def routed_by(
    x: Tensor,
    t: int,
    strategy: str,
    config: BankConfig,
    real: Tensor | None = None,
    starts: Tensor | None = None,
    prompt_length: int | None = None,
) -> Tensor:
    """What token t of x [T, D] is routed by, [D]."""
    if strategy == "token":
        return x[t]
    columns = list(range(x.shape[0]))
    begins = [i for i in columns if starts is not None and starts[i]]
    first = max((i for i in begins if i <= t), default=0)
    end = min((i for i in begins if i > t), default=x.shape[0])
    of_document = [i for i in range(first, end) if real is None or real[i]]
    so_far = [i for i in of_document if i <= t]
    in_prompt = prompt_length is None or len(so_far) <= prompt_length
    tokens = {
        "sequence": of_document,
        "prefix": so_far,
        "rolling": so_far[-config.routing_window_size :],
        "hybrid": so_far if in_prompt else so_far[-config.routing_window_size :],
    }[strategy]
    return x[tokens].mean(0) if tokens else torch.zeros_like(x[0])


def router_losses(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """The losses of a router with logits [n, C] of which each token's best `top_k` are read."""
    probability = logits.softmax(-1)
    tokens, count = logits.shape
    chosen = probability.topk(top_k).indices
    share = torch.stack([(chosen == c).sum() / (tokens * top_k) for c in range(count)])
    mean = probability.mean(0)
    uniform = torch.full_like(mean, 1 / count)
    return {
        "load_balance": count * torch.stack([share[c] * mean[c] for c in range(count)]).sum(),
        "auxiliary": nn.functional.kl_div(uniform.log(), mean, reduction="sum"),
        "z": torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean(),
    }
