"""Figures, top contexts, and the names of what looks into models."""

from pathlib import Path

import pytest
import torch
from models import tiny_model, tokens
from sparse import Letters

import senri_hf
from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.interpretability import module_activations, plots, top_contexts


def test_top_contexts_are_those_where_a_latent_is_largest() -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=40, variant="topk", k=4, skip_positions=1)).eval()
    ids, mask = tokens(6, 9), torch.ones(6, 9, dtype=torch.long)
    mask[0, :4] = 0
    batches = [
        {"input_ids": ids[:3], "attention_mask": mask[:3]},
        {"input_ids": ids[3:], "attention_mask": mask[3:]},
    ]
    every = torch.zeros(6, 9, 40)
    chosen = mask.bool() & (mask.cumsum(-1) > 1)
    every[chosen] = sae.encode(torch.cat(list(module_activations(model, "model.layers.1", batches, skip_positions=1))))
    density = (every[chosen] > 0).float().mean(0)
    latent = int(density.argmax())
    (entry,) = top_contexts(model, Letters(), "model.layers.1", sae, batches, latents=[latent], top=3)
    rows = every[..., latent].amax(1).sort(descending=True)
    assert [c["value"] for c in entry["contexts"]] == [round(v, 4) for v in rows.values[:3].tolist() if v > 0]
    row = int(rows.indices[0])
    at = int(every[row, :, latent].argmax())
    assert entry["contexts"][0]["token"] == Letters().decode(ids[row, at : at + 1])
    assert entry["contexts"][0]["before"] == Letters().decode(ids[row, :at][mask[row, :at].bool()])
    assert entry["density"] == pytest.approx(float(density[latent]))
    with pytest.raises(ValueError, match="Latent 40 was named, but the autoencoder has latents 0 to 39"):
        top_contexts(model, Letters(), "model.layers.1", sae, batches, latents=[40])
    with pytest.raises(ValueError, match="no tokens"):
        top_contexts(model, Letters(), "model.layers.1", sae, [])
    sample = top_contexts(model, Letters(), "model.layers.1", sae, batches, count=5)
    assert len(sample) <= 5 and all(0 < entry["density"] < 0.1 for entry in sample)


def test_every_figure_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    response = {
        "doses": [0.0, 1.0],
        "mode": "scale",
        "base": 0.1,
        "groups": {"a": {"values": [0.0, 1.0], "controls": [[0.0, 0.1]], "directions": [[0.0, 0.2]]}},
    }
    written = [
        plots.training_curves({"loss": [(1, 2.0), (2, 1.0)]}, tmp_path / "a.png", lines={"floor": 0.5}, log=True),
        plots.attention_maps([torch.rand(2, 4, 4)], list("0011"), tmp_path / "b.png"),
        plots.latent_density({"x": [0.0, 0.1, 0.01]}, tmp_path / "c.png"),
        plots.latents_over_cycle(torch.rand(6, 5), list("001122"), tmp_path / "d.png"),
        plots.sparsity_frontier({"topk": [(4.0, 0.9), (2.0, 0.8)]}, tmp_path / "e.png"),
        plots.dose_responses(response, tmp_path / "f.png", y_label="flips"),
        plots.matrix([[0.1, 0.9], [0.8, 0.2]], ["one", "two"], ["a", "b"], tmp_path / "g.png", label="recalled"),
        plots.curves(
            {"true": [1.0, 0.5], "said": [1.0, 0.4]}, tmp_path / "h.png", x_label="lag", y_label="correlation"
        ),
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.png" for name in "abcdefgh"]
    with pytest.raises(ValueError, match="figures are written as"):
        plots.training_curves({"loss": [(1, 2.0)]}, tmp_path / "a.pdf")


def test_names_of_interpretability_are_lazy_and_explained() -> None:
    from senri_hf import interpretability

    assert set(interpretability.__all__) == set(interpretability._MODULES)
    for name in interpretability.__all__:
        assert getattr(interpretability, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'telepathy'"):
        interpretability.telepathy  # noqa: B018
    assert senri_hf.SparseAutoencoder is interpretability.SparseAutoencoder
