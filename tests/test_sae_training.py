"""Training sparse autoencoders on streams: what they learn, how training resumes, and how it is measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Subject, remembering, tiny_model, tokens
from torch import Tensor

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.configuration.sparse_autoencoder import VARIANTS
from senri_hf.interpretability import (
    ActivationStream,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    captured,
    memory_slots,
    module_activations,
    prediction_metrics,
    reconstruction_metrics,
)


DIRECTIONS = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(5)), dim=-1)


def sparse_data(rows: int, seed: int) -> Tensor:
    """Sums of three of twelve directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, 12, generator=generator).topk(3).indices
    size = 1 + torch.rand(rows, 3, generator=generator)
    return (torch.zeros(rows, 12).scatter(1, chosen, size) @ DIRECTIONS) * 7 + 3


def source(start: int) -> Iterator[Tensor]:
    for index in range(start, 40):
        yield sparse_data(100, index)


def stream(**settings: Any) -> ActivationStream:
    return ActivationStream(source, **{"batch_size": 64, "buffer_size": 1000, **settings})


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
    return SparseAutoencoderTrainer(sae, SparseAutoencoderTrainingArguments(**arguments), stream())


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
    first = trainer(tmp_path, steps=40, save_strategy="steps", save_steps=20)
    first.train()
    second = trainer(tmp_path, steps=40, save_strategy="steps", save_steps=20)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert second.state.global_step == 40
    assert torch.equal(first.model.activation_scale, second.model.activation_scale)  # not fitted again
    assert second.stream.fills > 1
    ends = [t.state.log_history[-1]["train_loss"] for t in (first, second)]
    assert all(end == end for end in ends)
    (tmp_path / "checkpoint-20" / "activation_stream.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint of this trainer"):
        trainer(tmp_path, steps=40).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_dead_latents_are_resampled_to_where_the_error_is(tmp_path: Path) -> None:
    def dead_share(**settings: Any) -> float:
        training = trainer(tmp_path, steps=120, config={"dead_after": 500}, **settings)
        with torch.no_grad():
            training.model.b_enc[:16] = -100.0
        training.train()
        return float(reconstruction_metrics(training.model.eval(), [sparse_data(2000, 7)])["dead"])

    assert dead_share() >= 0.5 > dead_share(resample_every=20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1}, "max_steps=-1"),
        ({"find_dead_every": 0}, "find_dead_every=0"),
        ({"directions": "up"}, "directions='up'"),
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


# The stream.


def test_a_stream_deals_every_activation_out_as_often_as_it_is_told() -> None:
    numbered = [torch.arange(i * 10, i * 10 + 10).float()[:, None] for i in range(12)]
    for reuse in (1, 3):
        dealt = ActivationStream(lambda start: numbered[start:], 8, 1000, reuse=reuse)
        batches = [batch["activations"] for batch, _ in zip(dealt, range(15 * reuse), strict=False)]
        counts = torch.cat(batches).flatten().long().bincount(minlength=120)
        assert counts.sum() == 120 * reuse and counts.tolist() == [reuse] * 120
        assert batches[0].flatten().tolist() != sorted(batches[0].flatten().tolist())


def test_a_stream_mixes_what_its_source_gives_apart_and_begins_anew() -> None:
    items = [torch.full((10, 1), float(i)) for i in range(30)]
    dealt = ActivationStream(lambda start: items[start:], 20, 100, seed=1)
    batches = [batch["activations"] for batch, _ in zip(dealt, range(40), strict=False)]
    assert all(len(batch.unique()) > 2 for batch in batches)
    assert set(torch.cat(batches).flatten().long().tolist()) == set(range(30))
    again = ActivationStream(lambda start: items[start:], 20, 100, seed=1)
    assert all(torch.equal(a, b["activations"]) for a, b in zip(batches, again, strict=False))


def test_a_stream_goes_on_where_its_source_was() -> None:
    starts = []

    def counting(start: int) -> Iterator[Tensor]:
        starts.append(start)
        return iter([torch.full((10, 1), float(i)) for i in range(start, 30)])

    one = ActivationStream(counting, 20, 100)
    next(iter(one))
    other = ActivationStream(counting, 20, 100)
    other.resume(one.state())
    assert other.peek().min() == 10 and starts == [0, 10]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"buffer_size": 100}, {"reuse": 0}])
def test_a_stream_of_no_use_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        stream(**settings)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ActivationStream(lambda start: [], 2, 10).peek()


# Where activations come from.


def test_activations_of_real_tokens_are_what_the_module_returns_and_nothing_after_it_runs() -> None:
    model, ids = tiny_model("llama"), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    ran = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: ran.append(1))
    batches = [{"input_ids": ids, "attention_mask": mask}]
    (x,) = module_activations(model, "model.layers.1", batches)
    torch.testing.assert_close(x, hidden[mask.bool()])
    assert not ran
    (x,) = module_activations(model, "model.layers.1", batches, skip_positions=2)
    torch.testing.assert_close(x, torch.cat([hidden[0, 4:], hidden[1, 2:]]))
    assert not list(module_activations(model, "model.layers.1", batches, start=1))
    handle.remove()


def test_what_a_memory_reads_and_holds_is_streamed() -> None:
    model = Subject("llama", "episodic", "default").model()
    memory = remembering(model, rows=2)
    ids = tokens(2, 6)
    name = "model.layers.2.memory_adapter.senri_block.default"

    def run(batch: dict[str, Tensor]) -> None:
        model(**batch, past_key_values=memory.snapshot())

    (reads,) = module_activations(model, name, [{"input_ids": ids}], run=run)
    with torch.no_grad(), captured(model, name) as seen:
        run({"input_ids": ids})
    assert torch.equal(reads, seen[0].flatten(0, 1)) and reads.shape == (12, 32)
    with pytest.raises(ValueError, match="reached 0 times"):
        list(module_activations(model, name, [{"input_ids": ids}], run=lambda batch: model(**batch)))
    held = memory_slots(memory, 2, "store")
    assert held.dim() == 2 and held.shape[1] == 32 and bool((held != 0).any(-1).all())
    with pytest.raises(ValueError, match=r"no field 'attic' of vectors, but \['buffer', 'store'\]"):
        memory_slots(memory, 2, "attic")


# Measures.


@torch.no_grad()
def test_explained_variance_is_global_and_exact_whatever_the_pieces() -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=16, d_sae=32, variant="topk", k=3)).eval()
    x = sparse_data(500, 1)
    x[:250] *= 0.01
    whole = reconstruction_metrics(sae, [x])
    pieces = reconstruction_metrics(sae, x.split(37))
    error, latents = x - sae(x).reconstruction, sae.encode(x)
    expected = 1 - error.double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    for found in (whole, pieces):
        assert found["explained_variance"] == pytest.approx(float(expected), abs=1e-6)
        assert found["activations"] == 500 and found["l0"] == pytest.approx(float((latents > 0).sum() / 500))
        torch.testing.assert_close(found["density"], (latents > 0).double().mean(0))
        assert found["dead"] == pytest.approx(float((latents == 0).all(0).double().mean()))
    with pytest.raises(ValueError, match="no activations"):
        reconstruction_metrics(sae, [])


def test_predictions_are_recovered_wholly_by_a_perfect_autoencoder_and_not_at_all_by_nothing() -> None:
    model, ids = tiny_model("llama"), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, variant="relu")).eval()
    with torch.no_grad():  # x = relu(x) - relu(-x)
        sae.W_enc.copy_(torch.cat([torch.eye(32), -torch.eye(32)], dim=1))
        sae.W_dec.copy_(sae.W_enc.T)
    batches = [{"input_ids": ids, "attention_mask": mask}]
    perfect = prediction_metrics(model, "model.layers.1", sae, batches)
    assert perfect["cross_entropy_recovered"] == pytest.approx(1, abs=1e-3)
    assert perfect["kl_recovered"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
        predicted = (mask[:, 1:] & mask[:, :-1]).bool()
        loss = torch.nn.functional.cross_entropy(logits[predicted], ids[:, 1:][predicted])
        sae.W_dec.zero_()
    assert perfect["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)
    nothing = prediction_metrics(model, "model.layers.1", sae, batches)
    assert nothing["cross_entropy_sae"] == nothing["cross_entropy_zero"]
    assert nothing["kl_recovered"] == pytest.approx(0, abs=1e-9) and nothing["kl_sae"] > 0
    with pytest.raises(ValueError, match="does not know its own"):
        prediction_metrics(model, None, sae, batches)
