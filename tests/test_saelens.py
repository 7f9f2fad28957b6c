"""SAELens' file format, both ways; with SAELens itself where it is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability import export_saelens, import_saelens


def trained(variant: str) -> SparseAutoencoder:
    """An autoencoder with nothing at its initial value."""
    config = SparseAutoencoderConfig(
        d_in=12, d_sae=40, variant=variant, k=5, model_name="some/model", hook_name="model.layers.3", skip_positions=1
    )
    sae = SparseAutoencoder(config).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        sae.activation_scale.fill_(0.37)
        if variant in ("batchtopk", "jumprelu"):
            sae.threshold.abs_().add_(0.4)
    return sae


X = 5 * torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_what_is_exported_is_imported_with_the_same_numbers(variant: str, tmp_path: Path) -> None:
    sae = trained(variant)
    loaded = import_saelens(export_saelens(sae, tmp_path))
    assert loaded.config.variant == ("jumprelu" if variant == "batchtopk" else variant)
    assert (loaded.config.hook_name, loaded.config.model_name) == ("model.layers.3", "some/model")
    assert loaded.config.skip_positions == 1
    torch.testing.assert_close(loaded.encode(X), sae.encode(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.decode(loaded.encode(X)), sae.decode(sae.encode(X)), rtol=1e-4, atol=1e-4)
    assert 0 < int((sae.encode(X) > 0).sum()) < 50 * 40
    assert float(loaded.W_dec.detach().norm(dim=-1).mean()) == pytest.approx(1)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


@every_variant
def test_an_exported_decoder_has_its_scale_and_its_unit_rows_again(variant: str, tmp_path: Path) -> None:
    sae = trained(variant)
    sae.project()
    loaded = import_saelens(export_saelens(sae, tmp_path))
    torch.testing.assert_close(loaded.activation_scale, sae.activation_scale)
    for name in ("W_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(loaded, name), getattr(sae, name))


@every_variant
def test_the_files_say_what_saelens_asks_for(variant: str, tmp_path: Path) -> None:
    export_saelens(trained(variant), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] in ("standard", "topk", "jumprelu", "gated")
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6  # or hook_name is dropped
    assert config["metadata"]["hook_name"] == "model.layers.3"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (12, 40) and tensors["W_dec"].shape == (40, 12)
    assert ("threshold" in tensors) == (variant in ("batchtopk", "jumprelu"))
    assert ("b_enc" in tensors) == (variant != "gated")


def test_conventions_of_others_are_brought_to_ours(tmp_path: Path) -> None:
    sae = trained("topk")
    export_saelens(sae, tmp_path)
    config, tensors = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae_weights.safetensors")
    latents, unit = sae.encode(X), tensors["W_dec"] / tensors["W_dec"].norm(dim=-1, keepdim=True)

    # Decoder norms that count for the choice of the largest.
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    loaded = import_saelens(tmp_path)
    z = (X - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    ranked = (z * tensors["W_dec"].norm(dim=-1)).relu()
    chosen = torch.zeros_like(z).scatter(-1, ranked.topk(5).indices, ranked.topk(5).values)
    torch.testing.assert_close(loaded.encode(X), chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.decode(chosen), chosen @ unit + tensors["b_dec"], rtol=1e-4, atol=1e-4)

    # No decoder bias taken from the input.
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    shifted = dict(tensors) | {"b_enc": tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]}
    save_file(shifted, tmp_path / "sae_weights.safetensors")
    torch.testing.assert_close(import_saelens(tmp_path).encode(X), latents, rtol=1e-4, atol=1e-4)


def test_topk_without_k_is_refused(tmp_path: Path) -> None:
    export_saelens(trained("topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert import_saelens(tmp_path).config.k == 5  # our own files say it twice
    del config["metadata"]["senri_hf"]
    for given in ({}, {"k": None}, {"k": 0}):
        (tmp_path / "cfg.json").write_text(json.dumps(config | given))
        with pytest.raises(ValueError, match=r"k(=0| is None)"):
            import_saelens(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "temporal"}, "architecture='temporal'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"d_sae": 41}, r"holds .* but its config wants"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_saelens(trained("relu"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        import_saelens(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    export_saelens(trained("relu"), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] * torch.nan}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="b_enc holds NaN"):
        import_saelens(tmp_path)
    whole = (tmp_path / "sae_weights.safetensors").read_bytes()
    (tmp_path / "sae_weights.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is damaged"):
        import_saelens(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"d_in": None}))
    with pytest.raises(ValueError, match="damaged: d_in is None"):
        import_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        import_saelens(tmp_path)
    with pytest.raises(OSError):
        import_saelens(tmp_path / "nowhere")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@every_variant
def test_saelens_reads_the_export_and_we_read_what_it_writes(variant: str, tmp_path: Path) -> None:
    saelens = pytest.importorskip("sae_lens")
    sae = trained(variant)
    theirs = saelens.SAE.load_from_disk(export_saelens(sae, tmp_path / "ours"))
    torch.testing.assert_close(theirs.encode(X), sae.encode(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(X), sae(X).reconstruction, rtol=1e-4, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "model.layers.3"
    theirs.save_model(tmp_path / "theirs")
    back = import_saelens(tmp_path / "theirs")
    torch.testing.assert_close(back(X).reconstruction, sae(X).reconstruction, rtol=1e-4, atol=1e-4)
    assert back.config.hook_name == "model.layers.3"
