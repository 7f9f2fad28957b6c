"""Sparse autoencoders: activations as sums of few directions out of many, in five variants.

With x the activation times a fixed scale, and rows of W_dec of unit norm:

    z = (x - b_dec) W_enc + b_enc        pre-activations
    f = activation(z)                    latents, few of which are not zero
    x̂ = f W_dec + b_dec

    relu       f = max(z, 0)                    loss + c |f|_1                    Bricken et al. 2023
    topk       f = max(z, 0) of the k largest   loss + a |e - ê|²                 Gao et al. 2024, 2406.04093
    batchtopk  the k B largest of a batch of B  the same                          Bussmann et al. 2024, 2412.06410
    jumprelu   f = max(z, 0) where z > θ        loss + c |f|_0                    Rajamanoharan et al. 2024, 2407.14435
    gated      f = 1[π > 0] max(m, 0)           loss + c |max(π, 0)|_1 + frozen   Rajamanoharan et al. 2024, 2404.16014

where the loss is |x - x̂|², e = x - x̂ and ê its reconstruction by dead latents, π = (x - b_dec) W_enc + b_gate and
m = (x - b_dec) W_enc exp(r_mag) + b_mag. `sparse_autoencoder_reference` says the same one activation at a time.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..configuration.sparse_autoencoder import SparseAutoencoderConfig
from ..memory.fingerprint import public_name
from ..modeling.card import About, ModelWithCard


SMALLEST_NORM = 1e-8
# Activations of which float64 copies are held at once.
ROWS_AT_ONCE = 8192


@dataclass
class SparseAutoencoderOutput(ModelOutput):
    """What a sparse autoencoder makes of activations.

    Attributes:
        loss: The variant's loss, a mean over activations, in the scaled space; there like the following three.
        reconstruction_loss: Squared error, summed over dimensions.
        sparsity_loss: The penalty, before its coefficient; 0 where the variant has none.
        auxiliary_loss: Of dead latents, or of the frozen decoder (`"gated"`), before its coefficient.
        latents: [..., d_sae]
        reconstruction: [..., d_in], in the space of the activations.
    """

    loss: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    sparsity_loss: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    latents: Tensor | None = None
    reconstruction: Tensor | None = None


class SparseAutoencoder(ModelWithCard):
    """A sparse autoencoder of the activations of a module.

    Parameters are named as SAELens names them. `activation_scale` multiplies activations before they are encoded and
    divides reconstructions, so that those it was fitted to have a mean squared norm of `d_in`.
    """

    config: SparseAutoencoderConfig
    config_class = SparseAutoencoderConfig
    base_model_prefix = "sae"
    main_input_name = "activations"

    activation_scale: Tensor
    silent_for: Tensor

    def __init__(self, config: SparseAutoencoderConfig) -> None:
        super().__init__(config)
        assert config.d_sae is not None
        self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.empty(config.d_in))
        if config.variant == "gated":
            self.b_gate = nn.Parameter(torch.empty(config.d_sae))
            self.b_mag = nn.Parameter(torch.empty(config.d_sae))
            self.r_mag = nn.Parameter(torch.empty(config.d_sae))
        else:
            self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        if config.variant == "jumprelu":
            self.threshold = nn.Parameter(torch.empty(config.d_sae))
        elif config.variant == "batchtopk":
            # What lets the same number of latents through as the batches of training did, for single activations.
            self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("activation_scale", torch.ones(()))
        # Activations seen since each latent was last active. An integer: what is not would be cast with the weights.
        self.register_buffer("silent_for", torch.zeros(config.d_sae, dtype=torch.long))
        self._dead: Tensor | None = None  # indices
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            return
        init.normal_(self.W_dec)
        with torch.no_grad():
            directions = nn.functional.normalize(self.W_dec, dim=-1, eps=SMALLEST_NORM)
        init.copy_(self.W_dec, directions)
        init.copy_(self.W_enc, directions.T)
        for name in ("b_dec", "b_enc", "b_gate", "b_mag", "r_mag"):
            if hasattr(self, name):
                init.zeros_(getattr(self, name))
        if self.config.variant == "jumprelu":
            init.constant_(self.threshold, self.config.initial_threshold)
        elif self.config.variant == "batchtopk":
            init.zeros_(self.threshold)
        init.ones_(self.activation_scale)
        init.zeros_(self.silent_for)

    def about(self) -> About:
        config = self.config
        model = None if config.model_name is None else public_name(config.model_name)
        return About(
            text="A sparse autoencoder: activations of a module of another model as sums of few directions.",
            facts={
                "of the model": None if model is None else f"`{model}`",
                "of the module": None if config.hook_name is None else f"`{config.hook_name}`",
                "variant": config.variant,
                "active latents (k)": config.k if config.variant in ("topk", "batchtopk") else None,
                "width of the activations": config.d_in,
                "latents": f"{config.d_sae:,}",
                "tokens at the start of a text that it is not for": config.skip_positions,
            },
            usage=f"""from senri_hf.interpretability import module_activations

sae = senri_hf.SparseAutoencoder.from_pretrained("this folder or repository").eval()
model, tokenizer = senri_hf.load_base({json.dumps(model or "the model")})
batch = tokenizer("What is read here?", return_tensors="pt")
module, skip = {json.dumps(config.hook_name or "the module")}, sae.config.skip_positions
(activations,) = module_activations(model, module, [batch], skip_positions=skip)
latents = sae.encode(activations)  # [tokens, latents]: how strongly each is active, most are 0
directions = sae.W_dec  # [latents, width]: what each adds; top_contexts() shows where each is active""",
            tags=("sparse-autoencoder",),
        )

    # What it computes.

    def encode(self, activations: Tensor) -> Tensor:
        """Latents [..., d_sae] of activations [..., d_in], each by itself: `batchtopk` uses its threshold."""
        self._check_width(activations)
        centred = self._scaled(activations) - self.b_dec
        if self.config.variant == "gated":
            return self._gated(centred)[0]
        return self._activate(centred @ self.W_enc + self.b_enc)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstructions [..., d_in] of latents [..., d_sae]."""
        return (latents @ self.W_dec + self.b_dec) / self.activation_scale

    def forward(
        self,
        activations: Tensor,
        sparsity_weight: float | Tensor = 1.0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SparseAutoencoderOutput | tuple[Any, ...]:
        """Latents, reconstructions and the variant's loss.

        In training mode `batchtopk` chooses latents over the whole batch and moves its threshold, and latents that were
        active are noted.

        Args:
            activations: [..., d_in]
            sparsity_weight: Factor on the sparsity coefficient, for a warm-up.
        """
        self._check_width(activations)
        target = self._scaled(activations)
        centred = target - self.b_dec
        config, zero = self.config, centred.new_zeros(())
        sparsity = auxiliary = zero
        if config.variant == "gated":
            latents, gate = self._gated(centred)
            # The gate alone has to reconstruct, through a decoder that does not learn from it.
            open_gate = gate.relu()
            frozen = open_gate @ self.W_dec.detach() + self.b_dec.detach()
            sparsity = open_gate.sum(-1).mean()
            auxiliary = squared_error(frozen, target)
        else:
            z = centred @ self.W_enc + self.b_enc
            over_the_batch = config.variant == "batchtopk" and self.training
            latents = self._activate_batch(z) if over_the_batch else self._activate(z)
            if config.variant == "relu":
                sparsity = latents.sum(-1).mean()
            elif config.variant == "jumprelu":
                sparsity = Step.apply(z, self.threshold, config.bandwidth).sum(-1).mean()
        reconstruction = latents @ self.W_dec + self.b_dec
        error = squared_error(reconstruction, target)
        if config.variant in ("topk", "batchtopk") and self._dead is not None and len(self._dead):
            auxiliary = self._dead_latents_error(z, (target - reconstruction).detach())
        auxiliary_weight = 1.0 if config.variant == "gated" else config.auxiliary_coefficient
        loss = error + sparsity_weight * config.sparsity_coefficient * sparsity + auxiliary_weight * auxiliary
        if self.training:
            self._note_active(latents.detach())
        output = SparseAutoencoderOutput(
            loss=loss,
            reconstruction_loss=error,
            sparsity_loss=sparsity,
            auxiliary_loss=auxiliary,
            latents=latents,
            reconstruction=reconstruction / self.activation_scale,
        )
        return output.to_tuple() if return_dict is False else output

    def _scaled(self, activations: Tensor) -> Tensor:
        return activations.to(self.W_enc.dtype) * self.activation_scale

    def _gated(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, and the gate's pre-activations."""
        shared = centred @ self.W_enc
        gate = shared + self.b_gate
        magnitude = (shared * self.r_mag.exp() + self.b_mag).relu()
        return magnitude * (gate > 0), gate

    def _activate(self, z: Tensor) -> Tensor:
        """Latents of pre-activations, those of each activation by themselves; never negative."""
        if self.config.variant == "topk":
            return keep_largest(z.relu(), self.config.k)
        if self.config.variant == "jumprelu":
            return JumpReLU.apply(z, self.threshold, self.config.bandwidth)
        if self.config.variant == "batchtopk":
            return z.relu() * (z > self.threshold)
        return z.relu()

    def _activate_batch(self, z: Tensor) -> Tensor:
        """The largest of a whole batch, whose least one moves the threshold."""
        latents = keep_largest_of_all(z.relu(), self.config.k)
        with torch.no_grad():
            # Without a positive value there is no least one, and the threshold stays.
            least = latents.masked_fill(latents <= 0, torch.inf).min()
            moved = self.threshold + self.config.threshold_rate * (least - self.threshold)
            self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))
        return latents

    def _dead_latents_error(self, z: Tensor, error: Tensor) -> Tensor:
        """Squared error of the residual's reconstruction by the largest dead latents."""
        assert self._dead is not None and self.config.auxiliary_k is not None
        dead = z[..., self._dead]
        kept = keep_largest(dead, min(self.config.auxiliary_k, dead.shape[-1]))
        return squared_error(kept @ self.W_dec[self._dead], error)

    def _check_width(self, activations: Tensor) -> None:
        if activations.shape[-1] != self.config.d_in:
            raise ValueError(
                f"Activations {list(activations.shape)} were given, but this autoencoder is for a width of "
                f"d_in={self.config.d_in}"
            )

    # What training needs beside gradients.

    @property
    def has_scale(self) -> bool:
        """Whether scale or decoder bias are other than those of a new autoencoder."""
        return bool(self.activation_scale != 1) or bool(self.b_dec.any())

    @torch.no_grad()
    def fit_scale(self, activations: Tensor) -> None:
        """Take the scale and the decoder bias from activations [n, d_in]: mean squared norm `d_in`, bias their mean.

        Raises:
            ValueError: when all of them are zero, or any is not finite.
        """
        self._check_width(activations)
        activations = activations.flatten(0, -2)
        total = torch.zeros(self.config.d_in, dtype=torch.float64, device=activations.device)
        square = total.new_zeros(())
        for piece in activations.split(ROWS_AT_ONCE):
            total += piece.double().sum(0)
            square += piece.double().square().sum()
        square, mean = square / len(activations), total / len(activations)
        if not bool(square > 0) or not bool(square.isfinite()):
            raise ValueError(f"The activations have a mean squared norm of {square.item()}: nothing can be fitted")
        scale = (self.config.d_in / square).sqrt()
        self.activation_scale.copy_(scale)
        self.b_dec.copy_(mean * scale)

    @torch.no_grad()
    def point_at(self, activations: Tensor) -> None:
        """Point latents at activations [n, d_in] drawn at random, as seen from the decoder bias.

        A random direction is far from all activations where these fill few of their dimensions: its latent is dead from
        the start.
        """
        offsets = self._scaled(activations.flatten(0, -2)) - self.b_dec
        weights = (offsets.norm(dim=-1) > SMALLEST_NORM).double()
        if not bool(weights.any()):
            return
        every = torch.arange(self.W_dec.shape[0], device=self.W_dec.device)
        self._turn(every, offsets[torch.multinomial(weights, len(every), replacement=True)])
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def explain_errors(self, activations: Tensor, latents: Tensor) -> None:
        """Take latents, by index, to what the others leave of activations [n, d_in]: each to an error, drawn by square.

        Such a latent decodes to the direction of the error, and is active where activations lie on that side. Its
        strength is what leaves the least error over all of them, at most that error's length, first by itself and then
        for all together: an error that few activations have must not be added to the others. (Bricken et al. 2023 point
        dead latents at the activation itself. Where few directions hold most of the variance, that is near to living
        latents, which it disturbs.)
        """
        flat = activations.flatten(0, -2)
        target = self._scaled(flat)
        centred = target - self.b_dec
        if self.config.variant == "batchtopk":  # its threshold is behind what training does
            found = keep_largest_of_all((centred @ self.W_enc + self.b_enc).relu(), self.config.k)
        else:
            found = self.encode(flat)
        errors = target - (found @ self.W_dec + self.b_dec)
        weights = errors.double().square().sum(-1)
        if not len(latents) or not bool(weights.sum() > 0):
            return
        chosen = torch.multinomial(weights, len(latents), replacement=True)
        self._turn(latents, errors[chosen])
        directions, wanted = self.W_dec[latents], errors[chosen].norm(dim=-1)
        encoder = 0.5 * self.W_enc.norm(dim=0).mean() * directions
        bias = wanted - (centred[chosen] * encoder).sum(-1)
        active = (centred @ encoder.T + bias).relu()
        strength = best_strength((active * (errors @ directions.T)).sum(0), active.square().sum(0))
        added = (active * strength) @ directions
        strength = strength * best_strength((added * errors).sum(), added.square().sum())
        self.W_enc[:, latents] = (encoder * strength[:, None]).T
        for name in ("b_enc", "b_gate", "b_mag"):
            if hasattr(self, name):
                getattr(self, name)[latents] = bias * strength
        if self.config.variant == "jumprelu":
            self.threshold[latents] = self.threshold[latents].minimum(wanted * strength / 2)

    def _turn(self, latents: Tensor, towards: Tensor) -> None:
        """Give latents the decoder directions of vectors [latents, d_in], and forget what else they knew."""
        # A little of the old direction stays, so that latents that drew the same vector differ.
        directions = nn.functional.normalize(towards, dim=-1) + 0.1 * self.W_dec[latents]
        self.W_dec[latents] = nn.functional.normalize(directions, dim=-1)
        for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if hasattr(self, name):
                getattr(self, name)[latents] = 0.0
        self.silent_for[latents] = 0

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take out of the decoder's gradient what would only change the norm of its rows."""
        if self.W_dec.grad is not None:
            directions = nn.functional.normalize(self.W_dec, dim=-1, eps=SMALLEST_NORM)
            self.W_dec.grad -= (self.W_dec.grad * directions).sum(-1, keepdim=True) * directions

    @torch.no_grad()
    def project(self, norms: Tensor | float = 1.0) -> None:
        """Bring the rows of the decoder back to their norms [d_sae, 1], and thresholds above 0."""
        self.W_dec.mul_(norms / self.W_dec.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM))
        if self.config.variant == "jumprelu":
            self.threshold.clamp_min_(0)

    @torch.no_grad()
    def find_dead(self) -> Tensor:
        """Indices of the latents that are dead now: those that the auxiliary loss helps until the next call."""
        self._dead = (self.silent_for >= self.config.dead_after).nonzero()[:, 0]
        return self._dead

    @torch.no_grad()
    def _note_active(self, latents: Tensor) -> None:
        flat = latents.flatten(0, -2)
        self.silent_for.add_(flat.shape[0])
        self.silent_for.masked_fill_((flat > 0).any(0), 0)


def check_latents(latents: Iterable[int], sae: SparseAutoencoder) -> None:
    """ValueError when an autoencoder does not have all of these latents."""
    count = sae.W_dec.shape[0]
    for latent in latents:
        if not 0 <= latent < count:
            raise ValueError(f"Latent {latent} was named, but the autoencoder has latents 0 to {count - 1}")


def keep_largest(values: Tensor, k: int) -> Tensor:
    """`values` [..., n] with all but the k largest of the last dimension set to zero."""
    chosen = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, chosen.indices, chosen.values)


def keep_largest_of_all(values: Tensor, k: int) -> Tensor:
    """`values` [..., n] with all but the largest of them set to zero: k for each of the vectors, wherever they are."""
    flat = values.flatten()
    chosen = flat.topk(k * (flat.numel() // values.shape[-1]), sorted=False)
    return torch.zeros_like(flat).scatter(0, chosen.indices, chosen.values).view_as(values)


def best_strength(agreement: Tensor, size: Tensor) -> Tensor:
    """The factor of vectors v that leaves least of e, <v, e> / <v, v>, between a hundredth and 1."""
    return (agreement / size.clamp_min(SMALLEST_NORM)).clamp(0.01, 1.0)


def squared_error(ours: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over the last dimension and averaged over the others."""
    return (ours - target).square().sum(-1).mean()


class JumpReLU(torch.autograd.Function):
    """max(z, 0) where z > θ, else 0. θ's gradient is -θ/ε K((z - θ)/ε), with K the box on [-1/2, 1/2] (eq. 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z.relu() * (z > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        window = box((z - threshold) / ctx.bandwidth)
        learned = -threshold / ctx.bandwidth * window * gradient
        return gradient * ((z > threshold) & (z > 0)), learned.flatten(0, -2).sum(0), None


class Step(torch.autograd.Function):
    """1 where z > θ, else 0. The threshold's gradient is -1/ε K((z - θ)/ε) (eq. 12); z has none."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        learned = -1 / ctx.bandwidth * box((z - threshold) / ctx.bandwidth) * gradient
        return None, learned.flatten(0, -2).sum(0), None


def box(distance: Tensor) -> Tensor:
    """1 within half a unit of 0."""
    return (distance.abs() < 0.5).to(distance.dtype)
