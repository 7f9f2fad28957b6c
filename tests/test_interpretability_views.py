"""Figures, top contexts and `senri-hf sae`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, tokens

import senri_hf
from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.commands.main import main
from senri_hf.interpretability import module_activations, plots, top_contexts


class Letters:
    """A tokenizer whose every id is a letter of its own."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids: Any) -> str:
        return "".join(chr(0x4E00 + int(index)) for index in ids)


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
    sample = top_contexts(model, Letters(), "model.layers.1", sae, batches, count=5)
    assert len(sample) <= 5 and all(0 < entry["density"] < 0.1 for entry in sample)


def test_every_figure_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    response = {
        "doses": [0.0, 1.0],
        "mode": "scale",
        "base": 0.1,
        "groups": {"a": {"values": [0.0, 1.0], "controls": [[0.0, 0.1]]}},
    }
    written = [
        plots.training_curves({"loss": [(1, 2.0), (2, 1.0)]}, tmp_path / "a.png", lines={"floor": 0.5}, log=True),
        plots.attention_maps([torch.rand(2, 4, 4)], list("0011"), tmp_path / "b.png"),
        plots.latent_density({"x": [0.0, 0.1, 0.01]}, tmp_path / "c.png"),
        plots.latents_over_cycle(torch.rand(6, 5), list("001122"), tmp_path / "d.png"),
        plots.sparsity_frontier({"topk": [(4.0, 0.9), (2.0, 0.8)]}, tmp_path / "e.png"),
        plots.dose_responses(response, tmp_path / "f.png", y_label="flips"),
    ]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
    with pytest.raises(ValueError, match="figures are written as"):
        plots.training_curves({"loss": [(1, 2.0)]}, tmp_path / "a.pdf")


def test_the_command_trains_resumes_measures_shows_and_exchanges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("senri_hf.commands.sae.load", lambda arguments: (tiny_model("llama"), Letters()))
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    of_text = ["--text", str(text), "--piece", "16", "--rows", "4"]
    train = ["sae", "train", "--module", "model.layers.1", "--output", str(tmp_path / "sae"), "--expansion-factor", "2",
             "--k", "4", "--batch-size", "64", "--buffer-size", "400", "--save-every", "4", *of_text]  # fmt: skip
    assert main([*train, "--steps", "4"]) == 0
    assert main([*train, "--steps", "8", "--resume"]) == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert sae.config.hook_name == "model.layers.1" and sae.W_dec.shape == (64, 32)
    history = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert history[-1]["step"] == 8
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--output", str(tmp_path / "found.json"), *of_text]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["l0"] > 0 and len(found["density"]) == 64 and "kl_recovered" in found
    assert main(["sae", "contexts", str(tmp_path / "sae"), "--latents", "3", "--top", "2", *of_text]) == 0
    assert "latent 3, active at" in capsys.readouterr().out
    assert main(["sae", "export", str(tmp_path / "sae"), str(tmp_path / "lens")]) == 0
    assert main(["sae", "import", str(tmp_path / "lens"), str(tmp_path / "back")]) == 0
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        SparseAutoencoder.from_pretrained(tmp_path / "back").eval().encode(x),
        sae.eval().encode(x),
        rtol=1e-4,
        atol=1e-4,
    )
    capsys.readouterr()
    assert main(["sae", "evaluate", str(tmp_path / "sae"), "--text", "no-such-book"]) == 2
    assert "no-such-book" in capsys.readouterr().err


def test_names_of_interpretability_are_lazy_and_explained() -> None:
    from senri_hf import interpretability

    assert set(interpretability.__all__) == set(interpretability._MODULES)
    for name in interpretability.__all__:
        assert getattr(interpretability, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'telepathy'"):
        interpretability.telepathy  # noqa: B018
    assert senri_hf.SparseAutoencoder is interpretability.SparseAutoencoder
