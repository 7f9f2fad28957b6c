"""What latents promote: the tokens that followed where they are most active, and their probability at rising doses."""

import pytest
import torch
from models import tiny_model, tokens
from sparse import autoencoder
from transformers import PreTrainedModel

from senri_hf import SparseAutoencoder
from senri_hf.interpretability import Edit, intervene, module_activations, peak_activations, promotion_doses
from senri_hf.interpretability.activations import Batch


LAYER = "model.layers.2"


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    return [{"input_ids": tokens(3, 9), "attention_mask": mask}, {"input_ids": tokens(2, 7, seed=1)}]


@pytest.fixture
def sae(llama: PreTrainedModel, batches: list[Batch]) -> SparseAutoencoder:
    """Its latents are active at a tenth of the tokens or so."""
    found = autoencoder(skip_positions=1)
    with torch.no_grad():
        found.b_enc -= found.encode(torch.cat(list(module_activations(llama, LAYER, batches)))).quantile(0.85, dim=0)
    return found


def every_latent(llama: PreTrainedModel, sae: SparseAutoencoder, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B, T, d_sae], and which tokens count, [B, T]."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    (x,) = module_activations(llama, LAYER, [batch])
    latents = torch.zeros(*ids.shape, sae.W_dec.shape[0])
    latents[mask] = sae.encode(x).detach()
    return latents, mask & (mask.cumsum(-1) > 1)


def test_what_follows_is_the_token_after_the_largest_activation_of_every_row(
    llama: PreTrainedModel, sae: SparseAutoencoder, batches: list[Batch]
) -> None:
    peaks = peak_activations(llama, LAYER, sae, batches, top=5)
    expected: list[list[tuple[float, int, int | None]]] = [[] for _ in range(48)]
    active, seen = torch.zeros(48), 0
    row = 0
    for batch in batches:
        latents, counted = every_latent(llama, sae, batch)
        latents = torch.where(counted[..., None], latents, 0.0)
        active += (latents > 0).sum((0, 1))
        seen += int(counted.sum())
        for ids, of_row in zip(batch["input_ids"], latents, strict=True):
            for latent, (value, at) in enumerate(zip(*(of.tolist() for of in of_row.max(0)), strict=True)):
                if value > 0:
                    expected[latent].append((value, row, int(ids[at + 1]) if at + 1 < len(ids) else None))
            row += 1
    torch.testing.assert_close(peaks.density, active / seen)
    for latent, places in enumerate(expected):
        ranked = sorted(places, reverse=True)
        assert [value for value, _, _ in peaks.places(latent)] == pytest.approx([value for value, _, _ in ranked])
        for without in ((), (0, 3)):
            tokens_after = [token for _, of, token in ranked if token is not None and of not in without]
            assert peaks.followers(latent, without) == tokens_after
    assert any(len(peaks.followers(latent)) < len(places) for latent, places in enumerate(expected))


def test_the_measure_is_the_log_of_the_summed_probability_where_the_latent_is_not_active(
    llama: PreTrainedModel, sae: SparseAutoencoder, batches: list[Batch]
) -> None:
    peaks = peak_activations(llama, LAYER, sae, batches)
    first, second = peaks.density.topk(2).indices.tolist()
    unit = peaks.values[:, 0]
    found = promotion_doses(
        llama,
        LAYER,
        sae,
        {first: [5, 9, 5], second: [7]},
        batches,
        [0.0, 1.5],
        unit=unit,
        density=peaks.density,
        controls=2,
    )

    @torch.no_grad()
    def by_hand(latent: int, promoted: list[int], dose: float | None, edited: int, seed: int | None = None) -> float:
        said = []
        for batch in batches:
            latents, counted = every_latent(llama, sae, batch)
            if dose is None:
                logits = llama(**batch).logits
            else:
                edit = Edit(edited, "clamp", dose * float(unit[edited]))
                with intervene(llama, LAYER, sae, edit, direction_seed=seed):
                    logits = llama(**batch).logits
            share = logits.double().softmax(-1)[..., promoted].sum(-1).log()
            said.append(share[counted & (latents[..., latent] == 0)])
        return float(torch.cat(said).mean())

    for index, (latent, promoted) in enumerate(((first, [5, 9]), (second, [7]))):
        group = found["groups"][f"latent {latent}"]
        assert group["tokens"] == promoted and group["latents"] == [latent]
        assert group["unit"] == pytest.approx(float(unit[latent]))
        assert group["base"] == pytest.approx(by_hand(latent, promoted, None, latent), abs=1e-4)
        for at, dose in enumerate((0.0, 1.5)):
            assert group["values"][at] == pytest.approx(by_hand(latent, promoted, dose, latent), abs=1e-4)
            for control in range(2):  # no direction is the control of two latents
                line = by_hand(latent, promoted, dose, latent, seed=2 * index + control)
                assert group["directions"][control][at] == pytest.approx(line, abs=1e-4)
    counted = sum(int((every_latent(llama, sae, batch)[1]).sum()) for batch in batches)
    assert found["groups"][f"latent {first}"]["positions"] == counted - round(float(peaks.density[first]) * counted)


def test_a_latent_that_writes_a_tokens_own_direction_promotes_it_and_random_ones_do_not(
    llama: PreTrainedModel, sae: SparseAutoencoder, batches: list[Batch]
) -> None:
    peaks = peak_activations(llama, LAYER, sae, batches)
    latent, token = int(peaks.density.argmax()), 11
    unembedding = llama.get_output_embeddings().weight.detach()
    with torch.no_grad():
        sae.W_dec[latent] = torch.nn.functional.normalize(unembedding[token], dim=0)
    unit = torch.full((48,), 500.0)
    group = promotion_doses(llama, LAYER, sae, {latent: [token]}, batches, [0.5, 1.0], unit=unit,
                            density=peaks.density, controls=4)["groups"][f"latent {latent}"]  # fmt: skip
    assert group["base"] < group["values"][0] < group["values"][1]
    for line in (*group["controls"], *group["directions"]):
        assert group["values"][1] > line[1] + 1


def test_latents_without_tokens_or_without_a_place_to_measure_are_refused(
    llama: PreTrainedModel, sae: SparseAutoencoder, batches: list[Batch]
) -> None:
    given = {"unit": torch.ones(48), "density": torch.ones(48)}
    with pytest.raises(ValueError, match="latents 0 to 47"):
        promotion_doses(llama, LAYER, sae, {48: [3]}, batches, [1.0], **given)
    with pytest.raises(ValueError, match="Latent 3 was named without a token"):
        promotion_doses(llama, LAYER, sae, {3: []}, batches, [1.0], **given)
    with torch.no_grad():
        sae.b_enc[3] = 1e6
    with pytest.raises(ValueError, match="Latent 3 is active at every token"):
        promotion_doses(llama, LAYER, sae, {3: [5]}, batches, [1.0], **given)
