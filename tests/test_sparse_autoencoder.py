"""Sparse autoencoders: every variant against its formula, values and gradients; saving; what training keeps true."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability.sparse_autoencoder_reference import (
    reference_latents,
    reference_loss,
    reference_threshold_gradient,
    reference_training_latents,
)


every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, seed: int = 0, **settings: Any) -> SparseAutoencoder:
    """A random autoencoder, as some training could leave it, in float64."""
    torch.manual_seed(seed)
    small = {"d_in": 6, "d_sae": 20, "k": 4, "auxiliary_k": 3, "bandwidth": 0.5, "sparsity_coefficient": 0.3}
    sae = SparseAutoencoder(SparseAutoencoderConfig(variant=variant, **{**small, **settings})).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        sae.activation_scale.fill_(1.7)
        if variant in ("batchtopk", "jumprelu"):
            sae.threshold.abs_().add_(0.1)
    sae.project()
    return sae


def activations(rows: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_tensor(latents: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row) for row in latents])


@every_variant
def test_latents_and_reconstructions_are_those_of_the_formula(variant: str) -> None:
    sae, x = build(variant).eval(), activations()
    expected = as_tensor([reference_latents(sae, row) for row in x])
    latents = sae.encode(x)
    torch.testing.assert_close(latents, expected)
    assert 0 < (latents > 0).double().mean() < 1 and bool((latents >= 0).all())
    torch.testing.assert_close(sae.decode(latents), (expected @ sae.W_dec + sae.b_dec) / 1.7)
    output = sae(x)
    torch.testing.assert_close(output.latents, expected)
    torch.testing.assert_close(output.reconstruction, sae.decode(latents))
    torch.testing.assert_close(sae.encode(x.view(3, 3, 6)).view(9, 20), latents)


@every_variant
@pytest.mark.parametrize("dead", [[], [1, 5, 6, 11, 19]])
def test_loss_and_gradients_are_those_of_the_formula(variant: str, dead: list[int]) -> None:
    sae, x = build(variant).train(), activations()
    sae.silent_for[dead] = sae.config.dead_after
    assert sae.find_dead().tolist() == dead
    expected = reference_loss(sae, x, dead)
    names = [name for name, _ in sae.named_parameters() if name != "threshold"]
    parameters = [sae.get_parameter(name) for name in names]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    threshold = reference_threshold_gradient(sae, x) if variant == "jumprelu" else None
    before = sae.silent_for.clone()
    output = sae(x)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.latents, as_tensor(reference_training_latents(sae, x)))
    output.loss.backward()
    for name, parameter, gradient in zip(names, parameters, wanted, strict=True):
        assert gradient is not None and bool((gradient != 0).any()), name
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")
    if threshold is not None:
        assert bool((threshold != 0).any())
        torch.testing.assert_close(sae.threshold.grad, threshold)
    active = (output.latents > 0).any(0)
    assert torch.equal(sae.silent_for, torch.where(active, 0, before + 9))


def test_dead_latents_learn_only_where_the_auxiliary_loss_helps_them() -> None:
    for coefficient in (0.0, 1.0):
        sae = build("topk", k=1, auxiliary_coefficient=coefficient).train()
        with torch.no_grad():
            sae.b_enc[:10] = -5.0
        sae.silent_for[:10] = sae.config.dead_after
        sae.find_dead()
        sae(activations()).loss.backward()
        assert bool((sae.W_enc.grad[:, :10] != 0).any()) == bool(coefficient)


def test_batchtopk_shares_k_over_the_batch_and_its_threshold_lets_as_many_through() -> None:
    sae = build("batchtopk", threshold_rate=0.2).train()
    counts = torch.zeros(20)
    for seed in range(60):
        latents = sae(activations(64, seed)).latents
        assert int((latents > 0).sum()) == 4 * 64
        counts += torch.bincount((latents > 0).sum(-1), minlength=20)[:20]
    assert (counts > 0).sum() > 2  # more of them for some activations than for others
    alone = (sae.eval().encode(activations(2000, 99)) > 0).sum(-1).double().mean()
    assert alone == pytest.approx(4, rel=0.1)


def test_batchtopk_without_a_positive_pre_activation_keeps_its_threshold() -> None:
    sae = build("batchtopk").train()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    before = sae.threshold.clone()
    output = sae(activations())
    assert torch.equal(sae.threshold, before) and not bool(output.latents.any()) and bool(output.loss.isfinite())


@every_variant
def test_scale_and_bias_fit_the_activations_and_change_no_reconstruction_error_elsewhere(variant: str) -> None:
    sae = build(variant)
    x = 40 * activations(500) + 7
    sae.fit_scale(x)
    scaled = x * sae.activation_scale
    assert scaled.square().sum(-1).mean().item() == pytest.approx(6)
    torch.testing.assert_close(sae.b_dec, scaled.mean(0))
    torch.testing.assert_close(sae.decode(torch.zeros(20, dtype=torch.float64)), x.mean(0))
    for wrong in (torch.zeros(4, 6), torch.full((4, 6), torch.nan)):
        with pytest.raises(ValueError, match="nothing can be fitted"):
            sae.fit_scale(wrong)


@pytest.mark.parametrize("variant", ["jumprelu", "batchtopk"])
def test_no_latent_is_negative_though_a_threshold_may_be(variant: str) -> None:
    sae, x = build(variant).eval(), activations()
    with torch.no_grad():
        sae.threshold.fill_(-0.5)
    latents = sae.encode(x)
    assert bool((latents >= 0).all()) and bool((latents > 0).any())
    torch.testing.assert_close(latents, as_tensor([reference_latents(sae, row) for row in x]))
    torch.testing.assert_close(sae(x).latents, latents)


@pytest.mark.parametrize(
    ("sizes", "factor", "count"),
    [({"expansion_factor": 2.5}, 2.5, 20), ({"d_sae": 24}, 3, 24), ({"d_sae": 24, "expansion_factor": 8}, 3, 24)],
)
def test_the_number_of_latents_says_the_expansion(sizes: dict[str, Any], factor: float, count: int) -> None:
    config = SparseAutoencoderConfig(d_in=8, k=2, **sizes)
    assert (config.expansion_factor, config.d_sae) == (factor, count)
    assert SparseAutoencoderConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_the_decoder_keeps_unit_norm_and_its_gradient_is_across() -> None:
    sae = build("relu").train()
    sae(activations()).loss.backward()
    sae.remove_parallel_gradient()
    assert sae.W_dec.grad.abs().max() > 0.01
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(-1), torch.zeros(20, dtype=torch.float64))
    with torch.no_grad():
        sae.W_dec.mul_(3).add_(0.1)
    sae.project()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(20, dtype=torch.float64))
    jump = build("jumprelu")
    with torch.no_grad():
        jump.threshold.sub_(0.2)
    jump.project()
    assert bool((jump.threshold >= 0).all()) and bool((jump.threshold == 0).any())


@every_variant
def test_it_is_saved_and_auto_model_loads_it(variant: str, tmp_path: Path) -> None:
    sae = build(variant, hook_name="model.layers.3").float().eval()
    sae.silent_for[3] = 12
    sae.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is SparseAutoencoder and loaded.config.hook_name == "model.layers.3"
    x = activations().float()
    assert torch.equal(loaded(x).latents, sae(x).latents)
    assert torch.equal(loaded.silent_for, sae.silent_for)


@every_variant
def test_a_new_one_encodes_by_its_decoder_directions_and_is_ready(variant: str) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=16, expansion_factor=4, variant=variant, k=8))
    assert sae.W_dec.shape == (64, 16) and torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    output = sae(torch.randn(5, 16))
    assert bool(output.loss.isfinite()) and bool((output.latents > 0).any())


def test_it_takes_activations_in_another_dtype_and_refuses_another_width() -> None:
    sae = build("topk").float()
    assert sae(activations().bfloat16()).reconstruction.dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[9, 5\] were given.*d_in=6"):
        sae(activations()[:, :5])
    with pytest.raises(ValueError, match="d_in=6"):
        sae.encode(activations()[:, :5])
    assert build("topk").bfloat16()(activations()).latents.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "vanilla"}, "variant='vanilla'.*'relu'"),
        ({"k": 0}, "k=0"),
        ({"d_in": 4, "d_sae": 8, "k": 9}, "k=9.*d_sae=8"),
        ({"sparsity_coefficient": -1.0}, "sparsity_coefficient=-1.0"),
        ({"bandwidth": 0.0}, "bandwidth=0.0"),
        ({"threshold_rate": 1.5}, "threshold_rate=1.5"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderConfig(**settings)
