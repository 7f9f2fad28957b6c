"""How well an autoencoder explains activations, and what is left of predictions."""

import pytest
import torch
from models import tiny_model, tokens
from sparse import sparse_data

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.interpretability import prediction_metrics, reconstruction_metrics


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


@torch.no_grad()
def test_predictions_count_at_the_positions_asked_for_the_last_one_included() -> None:
    model, ids = tiny_model("llama"), tokens(3, 9)
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=16, variant="topk", k=2)).eval()
    chosen = torch.zeros(3, 9, dtype=torch.bool)
    chosen[:, -1] = True
    batch = {"input_ids": ids}
    last = prediction_metrics(model, "model.layers.1", sae, [batch], positions=lambda _: chosen)

    def reconstructed(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen[..., None], sae(output).reconstruction, output)

    own = model(**batch).logits[:, -1].log_softmax(-1)
    handle = model.model.layers[1].register_forward_hook(reconstructed)
    changed = model(**batch).logits[:, -1].log_softmax(-1)
    handle.remove()
    expected = (own.exp() * (own - changed)).sum(-1).mean()
    assert last["kl_sae"] == pytest.approx(float(expected), rel=1e-4) and last["cross_entropy"] == 0
    chosen[:, 4] = True
    found = prediction_metrics(model, "model.layers.1", sae, [batch], positions=lambda _: chosen)
    loss = torch.nn.functional.cross_entropy(model(**batch).logits[:, 4], ids[:, 5])
    assert found["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)


def test_predictions_are_measured_as_the_autoencoder_is_used_and_do_not_train_it() -> None:
    model = tiny_model("llama")
    batches = [{"input_ids": tokens(2, 9)}, {"input_ids": tokens(3, 9, seed=4)}]
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, variant="batchtopk", k=3))
    sae.threshold.fill_(0.7)
    found = prediction_metrics(model, "model.layers.1", sae.train(), batches)
    assert float(sae.threshold) == pytest.approx(0.7) and not sae.silent_for.any()
    assert found == prediction_metrics(model, "model.layers.1", sae.eval(), batches)


class Elsewhere(torch.nn.Module):
    """Encodes and decodes what is on its device only."""

    device = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.config = SparseAutoencoderConfig(d_in=32)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        assert x.device == self.device
        return x

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(latents, device="cpu", dtype=torch.float64)


def test_activations_are_taken_to_the_autoencoders_device() -> None:
    batches = [{"input_ids": tokens(2, 9)}]
    found = prediction_metrics(tiny_model("llama"), "model.layers.1", Elsewhere(), batches)  # type: ignore[arg-type]
    assert found["cross_entropy_sae"] == found["cross_entropy_zero"]
