"""The sparse autoencoder's formulas, one activation and one latent at a time: what `SparseAutoencoder` is held against.

Gradients of everything but thresholds are those of these formulas; thresholds have pseudo-gradients, given apart.
"""

import torch
from torch import Tensor

from .sparse_autoencoder import SparseAutoencoder


def reference_loss(sae: SparseAutoencoder, activations: Tensor, dead: list[int] | None = None) -> Tensor:
    """The training loss of activations [n, d_in], with the given latents counted as dead."""
    config, total = sae.config, activations.new_zeros(())
    latents = reference_training_latents(sae, activations)
    for x, f in zip(activations * sae.activation_scale, latents, strict=True):
        error = x - (sae.b_dec + sum(f[i] * sae.W_dec[i] for i in range(len(f))))
        total = total + (error**2).sum()
        if config.variant == "relu":
            total = total + config.sparsity_coefficient * sum(f)
        if config.variant == "jumprelu":
            total = total + config.sparsity_coefficient * sum(float(value > 0) for value in f)
        if config.variant == "gated":
            gate = [max(value, 0 * value) for value in (x - sae.b_dec) @ sae.W_enc + sae.b_gate]
            frozen = sae.b_dec.detach() + sum(g * sae.W_dec[i].detach() for i, g in enumerate(gate))
            total = total + config.sparsity_coefficient * sum(gate) + ((x - frozen) ** 2).sum()
        if dead and config.variant in ("topk", "batchtopk"):
            z = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            largest = sorted(dead, key=lambda i: -z[i].item())[: config.auxiliary_k]
            explained = sum(z[i] * sae.W_dec[i] for i in largest)
            total = total + config.auxiliary_coefficient * ((error.detach() - explained) ** 2).sum()
    return total / len(activations)


def reference_training_latents(sae: SparseAutoencoder, activations: Tensor) -> list[list[Tensor]]:
    """Latents of a batch in training: what `encode` gives, but for `batchtopk`, which shares k over the batch."""
    if sae.config.variant != "batchtopk":
        return [reference_latents(sae, x) for x in activations]
    positive = [[max(z, 0 * z) for z in pre_activations(sae, x)] for x in activations]
    ranked = sorted(((row, i) for row in range(len(positive)) for i in range(len(positive[row]))),
                    key=lambda place: -positive[place[0]][place[1]].item())  # fmt: skip
    chosen = set(ranked[: sae.config.k * len(positive)])
    return [
        [value if (row, i) in chosen else 0 * value for i, value in enumerate(values)]
        for row, values in enumerate(positive)
    ]


def reference_latents(sae: SparseAutoencoder, x: Tensor) -> list[Tensor]:
    """Latents of one activation [d_in]."""
    config = sae.config
    if config.variant == "gated":
        centred = x * sae.activation_scale - sae.b_dec
        latents = []
        for i in range(sae.W_enc.shape[1]):
            shared = (centred * sae.W_enc[:, i]).sum()
            magnitude = shared * torch.exp(sae.r_mag[i]) + sae.b_mag[i]
            is_open = shared + sae.b_gate[i] > 0 and magnitude > 0
            latents.append(magnitude if is_open else 0 * magnitude)
        return latents
    z = pre_activations(sae, x)
    if config.variant == "topk":
        largest = sorted(range(len(z)), key=lambda i: -z[i].item())[: config.k]
        return [max(value, 0 * value) if i in largest else 0 * value for i, value in enumerate(z)]
    if config.variant == "relu":
        return [max(value, 0 * value) for value in z]
    threshold = sae.threshold.expand(len(z))
    return [value if value > threshold[i] and value > 0 else 0 * value for i, value in enumerate(z)]


def pre_activations(sae: SparseAutoencoder, x: Tensor) -> list[Tensor]:
    """z of one activation [d_in]."""
    centred = x * sae.activation_scale - sae.b_dec
    return [(centred * sae.W_enc[:, i]).sum() + sae.b_enc[i] for i in range(sae.W_enc.shape[1])]


def reference_threshold_gradient(sae: SparseAutoencoder, activations: Tensor) -> Tensor:
    """The pseudo-gradient of `jumprelu`'s loss by its thresholds, [d_sae] (2407.14435, eq. 11 to 13).

    For every pre-activation within half a bandwidth ε of θ: -(θ dL/df + c) / ε, averaged over activations.
    """
    config, gradient = sae.config, torch.zeros_like(sae.threshold)
    for x in activations:
        z = pre_activations(sae, x)
        f = torch.stack(reference_latents(sae, x))
        error = f @ sae.W_dec + sae.b_dec - x * sae.activation_scale
        for i, value in enumerate(z):
            if abs(value - sae.threshold[i]) < config.bandwidth / 2:
                slope = 2 * (error * sae.W_dec[i]).sum()
                gradient[i] -= (sae.threshold[i] * slope + config.sparsity_coefficient) / config.bandwidth
    return gradient / len(activations)
