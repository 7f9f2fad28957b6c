"""How well a sparse autoencoder explains activations, and how much of a model's predictions survive in it."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Batch, real_positions
from .hooks import replaced_output
from .sparse_autoencoder import SparseAutoencoder


@torch.no_grad()
def reconstruction_metrics(sae: SparseAutoencoder, activations: Iterable[Tensor]) -> dict[str, Any]:
    """How well activations [n, d_in] are explained, and by how many latents.

    Sums are streamed in float64. The explained variance is global: 1 - Σ|x - x̂|² / Σ|x - mean of all x|², not a mean of
    ratios.

    Returns:
        `activations` counted; `l0`, latents active at each; `explained_variance`; `dead`, the share of latents never
        active; `density` [d_sae], the share of activations at which each latent was.
    """
    device = sae.W_dec.device
    total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
    square, error = total.new_zeros(()), total.new_zeros(())
    active = torch.zeros(sae.W_dec.shape[0], dtype=torch.float64, device=device)
    count = 0
    for x in activations:
        x = x.to(device).flatten(0, -2)
        latents = sae.encode(x)
        exact = x.double()
        error += (exact - sae.decode(latents).double()).square().sum()
        total += exact.sum(0)
        square += exact.square().sum()
        active += (latents > 0).sum(0)
        count += len(x)
    if not count:
        raise ValueError("There were no activations to measure")
    variance = square - total.square().sum() / count
    return {
        "activations": count,
        "l0": float(active.sum() / count),
        "explained_variance": float(1 - error / variance),
        "dead": float((active == 0).double().mean()),
        "density": (active / count).cpu(),
    }


@torch.no_grad()
def prediction_metrics(
    model: nn.Module,
    module: str | nn.Module | None,
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    *,
    run: Callable[[Batch], Any] | None = None,
    positions: Callable[[Batch], Tensor] | None = None,
) -> dict[str, float]:
    """What is left of a model's predictions when a module's output is replaced by its reconstruction.

    Compared with replacing it by zeros: recovered are (CE_zero - CE_sae) / (CE_zero - CE) of the cross-entropy, and
    1 - KL_sae / KL_zero of the divergence from the model's own distribution. Positions that the autoencoder is not for
    (`config.skip_positions`) and padding stay as they are.

    Args:
        positions: Gives the positions [B, T] of a batch that are replaced and whose predictions count, for all that are
            real. The cross-entropy of the last one is not known.
        run: What to do with a batch instead of `model(**batch)`; gives an output with logits [B, T, V].

    Returns:
        Cross-entropies and divergences in nats per token, and the two shares recovered, NaN where zeros change nothing.
    """
    place = module if module is not None else sae.config.hook_name
    if place is None:
        raise ValueError("Name the module: the autoencoder does not know its own (config.hook_name is None)")
    sums = dict.fromkeys(("cross_entropy", "cross_entropy_sae", "cross_entropy_zero", "kl_sae", "kl_zero"), 0.0)
    count, targeted = 0, 0
    run = run or (lambda batch: model(**batch))
    for batch in batches:
        counted = real = real_positions(batch)
        if positions is not None:
            counted = real & positions(batch).to(real.device)
        mask = (real_positions(batch, sae.config.skip_positions) & counted)[..., None]
        own = log_probabilities(run, batch)

        def reconstructed(x: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(
                mask.to(x.device).view(*x.shape[:-1], 1), sae.decode(sae.encode(x.to(sae.device))).to(x), x
            )

        def zeroed(x: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask.to(x.device).view(*x.shape[:-1], 1), torch.zeros_like(x), x)

        targets = batch["input_ids"][:, 1:].to(own.device)
        predicted, counted = (real[:, 1:] & counted[:, :-1]).to(own.device), counted.to(own.device)
        targeted += int(predicted.sum())
        count += int(counted.sum())
        sums["cross_entropy"] += cross_entropy(own, targets, predicted)
        for name, function in (("sae", reconstructed), ("zero", zeroed)):
            with replaced_output(model, place, function):
                changed = log_probabilities(run, batch)
            sums[f"cross_entropy_{name}"] += cross_entropy(changed, targets, predicted)
            divergence = (own.exp() * (own - changed)).sum(-1)
            sums[f"kl_{name}"] += float(divergence[counted].double().sum())
    if not count:
        raise ValueError("There were no tokens to predict")
    found = {name: value / (count if name.startswith("kl") else max(1, targeted)) for name, value in sums.items()}
    lost = found["cross_entropy_zero"] - found["cross_entropy"]
    left = found["cross_entropy_zero"] - found["cross_entropy_sae"]
    found["cross_entropy_recovered"] = left / lost if lost else math.nan
    found["kl_recovered"] = 1 - found["kl_sae"] / found["kl_zero"] if found["kl_zero"] else math.nan
    return found


def log_probabilities(run: Callable[[Batch], Any], batch: Batch) -> Tensor:
    """[B, T, V] of the next token."""
    return run(batch).logits.float().log_softmax(-1)


def cross_entropy(log_probability: Tensor, targets: Tensor, predicted: Tensor) -> float:
    """Summed over the predicted tokens."""
    chosen = log_probability[:, :-1].gather(-1, targets[..., None])[..., 0]
    return float(-chosen[predicted].double().sum())
