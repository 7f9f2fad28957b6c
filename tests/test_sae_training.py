"""Training sparse autoencoders on streams: what they learn, and how training resumes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse import DIRECTIONS, sparse_data
from torch import Tensor

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability import (
    ActivationStream,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    export_saelens,
    import_saelens,
    reconstruction_metrics,
)


def source(start: int) -> Iterator[Tensor]:
    for index in range(start, 40):
        yield sparse_data(100, index)


def trainer(
    folder: Path, variant: str = "topk", steps: int = 300, config: dict[str, Any] | None = None, **settings: Any
) -> SparseAutoencoderTrainer:
    coefficient = {"relu": 0.4, "gated": 0.4, "jumprelu": 0.3}.get(variant, 1.0)
    torch.manual_seed(0)
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=16, d_sae=32, variant=variant, k=3, sparsity_coefficient=coefficient, bandwidth=0.5,
            **{"dead_after": 2000, **(config or {})},
        )
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": 5e-3, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_steps": 50, "use_cpu": True,
    } | settings  # fmt: skip
    return SparseAutoencoderTrainer(
        sae, SparseAutoencoderTrainingArguments(**arguments), ActivationStream(source, 64, 1000)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_to_explain_sparse_data(variant: str, tmp_path: Path) -> None:
    training = trainer(tmp_path, variant, sparsity_warmup_steps=50)
    training.train()
    sae = training.model.eval()
    found = reconstruction_metrics(sae, [sparse_data(2000, 1000)])
    assert found["explained_variance"] > 0.85
    assert found["l0"] < 14
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    logged = [entry for entry in training.state.log_history if "l0" in entry]
    assert len(logged) == 6 and logged[-1]["explained_variance"] > logged[0]["explained_variance"]
    assert all(0 <= entry["dead"] <= 1 for entry in logged)


def test_the_true_directions_are_found(tmp_path: Path) -> None:
    training = trainer(tmp_path, "batchtopk", steps=500)
    training.train()
    cosine = (training.model.W_dec.detach() @ DIRECTIONS.T).amax(0)
    assert float((cosine > 0.75).float().mean()) > 0.8


def test_a_resumed_training_goes_on_in_the_stream_and_learns_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 40, "save_strategy": "steps", "save_steps": 20}
    first = trainer(tmp_path, **settings)
    first.train()
    place = tmp_path / "checkpoint-20" / "activation_stream.json"
    saved = json.loads(place.read_text())
    assert saved["consumed"] > 10 and saved["elapsed"]["seconds"] > 0
    place.write_text(json.dumps(saved | {"elapsed": {"seconds": 1000.0, "cpu_seconds": 500.0}}))
    second, starts = trainer(tmp_path, **settings), []

    def recorded(start: int) -> Iterator[Tensor]:
        starts.append(start)
        return source(start)

    second.stream.source = recorded
    second.train(resume_from_checkpoint=str(place.parent))
    assert starts[0] == saved["consumed"] and second.stream.fills > saved["fills"]
    assert second.state.global_step == 40
    assert 1000 < second.elapsed()["seconds"] < 1000 + 60 and second.elapsed()["cpu_seconds"] > 500
    assert torch.equal(first.model.activation_scale, second.model.activation_scale)  # not fitted again
    explained = [
        reconstruction_metrics(sae.eval(), [sparse_data(2000, 7)])["explained_variance"]
        for sae in (SparseAutoencoder.from_pretrained(place.parent), second.model, first.model)
    ]
    assert explained[1] > explained[0] + 0.02 and explained[1] == pytest.approx(explained[2], abs=0.05)
    place.unlink()
    with pytest.raises(ValueError, match="no checkpoint of this trainer"):
        trainer(tmp_path, steps=40).train(resume_from_checkpoint=str(place.parent))


@pytest.mark.parametrize("imported", [False, True])
def test_training_goes_on_from_a_finished_or_imported_autoencoder(imported: bool, tmp_path: Path) -> None:
    first = trainer(tmp_path, "jumprelu", steps=200)
    first.train()
    sae = first.model.eval()
    if imported:  # with rows of different norms, as others have them
        with torch.no_grad():
            factors = torch.linspace(0.5, 2, 32)
            sae.W_dec.mul_(factors[:, None])
            for parameter in (sae.W_enc, sae.b_enc, sae.threshold):
                parameter.div_(factors)
        sae = import_saelens(export_saelens(sae, tmp_path / "lens"))
    data, norms, scale = [sparse_data(2000, 7)], sae.W_dec.detach().norm(dim=-1), sae.activation_scale.clone()
    before = reconstruction_metrics(sae, data)["explained_variance"]
    again = SparseAutoencoderTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=1e-5, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    SparseAutoencoderTrainer(sae.train(), again, ActivationStream(source, 64, 1000)).train()
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), norms)
    assert torch.equal(sae.activation_scale, scale)
    assert reconstruction_metrics(sae.eval(), data)["explained_variance"] == pytest.approx(before, abs=0.005)


def test_dead_latents_are_resampled_to_where_the_error_is(tmp_path: Path) -> None:
    def dead_share(**settings: Any) -> float:
        training = trainer(tmp_path, steps=120, config={"dead_after": 500}, **settings)
        with torch.no_grad():
            training.model.b_enc[:16] = -100.0
        training.train()
        return float(reconstruction_metrics(training.model.eval(), [sparse_data(2000, 7)])["dead"])

    assert dead_share() >= 0.5 > dead_share(resample_every=20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resampling_does_no_harm_to_what_is_learned(variant: str, tmp_path: Path) -> None:
    training = trainer(tmp_path, variant, config={"dead_after": 500}, resample_every=20, sparsity_warmup_steps=50)
    training.train()
    found = reconstruction_metrics(training.model.eval(), [sparse_data(2000, 7)])
    assert found["explained_variance"] > 0.85 and found["l0"] < 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps=-1"),
        ({"find_dead_every": 0}, "find_dead_every=0"),
        ({"directions": "up"}, "directions='up'"),
        ({"resample_every": -1}, "resample_every=-1"),
    ],
)
def test_arguments_of_no_use_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_pointing_at_activations_gives_latents_that_fire(tmp_path: Path) -> None:
    training = trainer(tmp_path, steps=1, directions="activations", learning_rate=1e-9)
    training.train()
    x = sparse_data(500, 3)
    sae = training.model.requires_grad_(False)
    offsets = torch.nn.functional.normalize(x * sae.activation_scale - sae.b_dec, dim=-1)
    assert float((sae.W_dec @ offsets.T).amax(1).min()) > 0.7


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_taken_to_errors_explain_them(variant: str) -> None:
    torch.manual_seed(0)
    config = SparseAutoencoderConfig(d_in=16, d_sae=32, variant=variant, k=32)
    sae, x = SparseAutoencoder(config).eval().requires_grad_(False), sparse_data(1, 3)
    sae.fit_scale(sparse_data(500, 1))

    def error() -> Tensor:
        return (x - sae(x).reconstruction).norm()

    before, others = error(), sae.W_dec[:31].clone()
    sae.silent_for.fill_(9)
    sae.explain_errors(x, torch.tensor([31]))
    assert error() < 0.25 * before
    assert torch.equal(sae.W_dec[:31], others) and sae.silent_for.tolist() == [9] * 31 + [0]
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(32))
    sae.explain_errors(x, torch.tensor([], dtype=torch.long))  # nothing is dead
