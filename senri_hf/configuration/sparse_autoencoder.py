"""Settings of a sparse autoencoder."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .errors import value_errors


VARIANTS = ("relu", "topk", "batchtopk", "jumprelu", "gated")


@value_errors
@strict
class SparseAutoencoderConfig(PreTrainedConfig):
    """What a `SparseAutoencoder` is made of, and which activations it is for.

    Args:
        d_in: Width of the activations.
        expansion_factor: Latents per dimension of the activations. Where `d_sae` is given, that says it.
        d_sae: Number of latents; `expansion_factor * d_in` when None.
        variant: `"relu"` (L1 penalty), `"topk"`, `"batchtopk"`, `"jumprelu"` (L0 penalty) or `"gated"`.
        k: Latents active per activation: exactly for `"topk"`, on average over a batch for `"batchtopk"`. Not read by
            the others.
        sparsity_coefficient: Weight of the penalty: the L1 norm for `"relu"` and `"gated"`, the number of active
            latents for `"jumprelu"`. Not read by the others. Activations are scaled to a mean squared norm of `d_in`
            before, so that it means the same for every layer.
        auxiliary_coefficient: Weight of the loss that lets dead latents explain what the living ones leave (`"topk"`
            and `"batchtopk"`); 0 turns it off.
        auxiliary_k: Dead latents that take part per activation; half of `d_in` when None.
        dead_after: A latent is dead that was not active for so many activations.
        threshold_rate: Weight in (0, 1] of a new batch in the running threshold of `"batchtopk"`.
        initial_threshold: Threshold of `"jumprelu"` before training, above 0.
        bandwidth: Width of the window in which `"jumprelu"` learns its thresholds, above 0.
        model_name: The model that the activations are of.
        hook_name: The module of it whose output they are.
        skip_positions: Tokens at the start of a text whose activations it is not for: in many models the first is an
            attention sink, hundreds of times as long as all others.
    """

    model_type = "sparse_autoencoder"

    d_in: int = 64
    expansion_factor: int | float = 8
    d_sae: int | None = None
    variant: str = "batchtopk"
    k: int = 32
    sparsity_coefficient: float | int = 1.0
    auxiliary_coefficient: float | int = 1 / 32
    auxiliary_k: int | None = None
    dead_after: int = 100_000
    threshold_rate: float = 0.01
    initial_threshold: float = 0.1
    bandwidth: float = 0.1
    model_name: str | None = None
    hook_name: str | None = None
    skip_positions: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.d_sae is None:
            self.d_sae = round(self.expansion_factor * self.d_in)
        elif self.d_in > 0:
            self.expansion_factor = self.d_sae / self.d_in
        if self.auxiliary_k is None:
            self.auxiliary_k = max(1, self.d_in // 2)
        super().__post_init__(**kwargs)

    def validate_settings(self) -> None:
        """ValueError naming the first setting that is out of its range."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} was given, but variant must be one of {VARIANTS}")
        for name in ("d_in", "d_sae", "k", "auxiliary_k", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must be at least 1")
        assert self.d_sae is not None
        if self.variant in ("topk", "batchtopk") and self.k > self.d_sae:
            raise ValueError(f"k={self.k} was given, but there are only d_sae={self.d_sae} latents")
        for name in ("sparsity_coefficient", "auxiliary_coefficient", "skip_positions"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must not be negative")
        for name in ("initial_threshold", "bandwidth", "threshold_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} was given, but {name} must be more than 0")
        if self.threshold_rate > 1:
            raise ValueError(f"threshold_rate={self.threshold_rate} was given, but it must be at most 1")
