"""What latents of a language model make it say next, at rising doses."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Batch, module_activations, real_positions
from .doses import dose_response
from .metrics import log_probabilities
from .sparse_autoencoder import SparseAutoencoder, check_latents


@torch.no_grad()
def promotion_doses(
    model: nn.Module,
    module: str | nn.Module,
    sae: SparseAutoencoder,
    promoted: Mapping[int, Sequence[int]],
    batches: Sequence[Batch],
    doses: Sequence[float],
    *,
    unit: Tensor,
    density: Tensor,
    controls: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """What rising doses of single latents do to the tokens that they are thought to promote, beside two controls.

    A latent is clamped to multiples of its unit at all positions of the text. Measured is how likely its tokens are
    together as the next one, log Σ p in nats, in the mean over the positions where the latent is not active by itself.
    The controls are those of `dose_response`; every latent has other ones.

    Args:
        promoted: Ids of tokens by latent, as `Peaks.followers` finds them in other text; ids that come twice count
            once.
        batches: Arguments of the model, with `input_ids` [B, T]; read anew for every dose, of the latent and of every
            control.
        unit: What a dose of 1 is for each latent, [d_sae]: its largest activation.
        density: Share of activations at which each latent is active, [d_sae].
        controls: Random latents, and random directions, beside each latent.

    Returns:
        As `dose_response`, with a group `"latent …"` for every latent, which has also its `base`, in nats; the ids of
        its `tokens`; how many `positions` it is measured at; its `unit` and its `density`.

    Raises:
        ValueError: when there is no such latent, no token for one, or no position where it is not active.
    """
    check_latents(promoted, sae)
    latents = list(promoted)
    neutral = inactive_positions(model, module, sae, batches, latents)
    positions = [sum(int(of_batch[..., index].sum()) for of_batch in neutral) for index in range(len(latents))]
    for latent, count in zip(latents, positions, strict=True):
        if not promoted[latent]:
            raise ValueError(f"Latent {latent} was named without a token that it is thought to promote")
        if not count:
            raise ValueError(
                f"Latent {latent} is active at every token: there is none where nothing promotes its tokens"
            )
    merged: dict[str, Any] = {"doses": list(doses), "mode": "clamp", "groups": {}}
    for index, latent in enumerate(latents):
        tokens = list(dict.fromkeys(promoted[latent]))

        def measure(index: int = index, tokens: list[int] = tokens) -> float:
            found = [
                log_probabilities(lambda given: model(**given), batch)[of_batch[..., index]][:, tokens].logsumexp(-1)
                for batch, of_batch in zip(batches, neutral, strict=True)
            ]
            return float(torch.cat(found).double().mean())

        name = f"latent {latent}"
        response = dose_response(
            model,
            module,
            sae,
            {name: [latent]},
            measure,
            doses,
            mode="clamp",
            unit=unit,
            controls=controls,
            density=density,
            seed=seed + index * controls,
        )
        merged["groups"][name] = {
            **response["groups"][name],
            "base": response["base"],
            "tokens": tokens,
            "positions": positions[index],
            "unit": float(unit[latent]),
            "density": float(density[latent]),
        }
    return merged


@torch.no_grad()
def inactive_positions(
    model: nn.Module, module: str | nn.Module, sae: SparseAutoencoder, batches: Sequence[Batch], latents: Sequence[int]
) -> list[Tensor]:
    """For every batch, bool [B, T, latents]: the real tokens at which each of these latents is not active.

    Those that the autoencoder is not for (`config.skip_positions`) are none of them.
    """
    found = []
    skip = sae.config.skip_positions
    for batch in batches:
        (activations,) = module_activations(model, module, [batch], skip_positions=skip)
        looked_at = real_positions(batch, skip)
        inactive = looked_at[..., None].repeat(1, 1, len(latents))
        values = sae.encode(activations.to(sae.W_dec.device))[:, list(latents)]
        inactive[looked_at] = (values == 0).to(inactive.device)
        found.append(inactive)
    return found
