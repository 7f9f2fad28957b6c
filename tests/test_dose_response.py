"""What rising doses of an edit do, beside their controls."""

import pytest
import torch
from models import tiny_model, tokens
from sparse import autoencoder
from torch import Tensor
from transformers import PreTrainedModel

from senri_hf.interpretability import Edit, captured, control_latents, dose_response, intervene


LAYER = "model.layers.1"
IDS = tokens(2, 7)


def outputs(model: PreTrainedModel, module: str, ids: Tensor) -> Tensor:
    with torch.no_grad(), captured(model, module) as seen:
        model(ids)
    return seen[0]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def test_controls_are_living_latents_that_are_active_about_as_often() -> None:
    density = torch.cat([torch.zeros(20), torch.linspace(0.001, 0.01, 50), torch.linspace(0.3, 0.9, 30)])
    groups = control_latents(density, [25, 80], 8, seed=1, exclude=[81])
    assert len(groups) == 8 and len({tuple(group) for group in groups}) > 1
    for rare, common in groups:
        assert 20 <= rare < 70 and 70 <= common < 100
        assert not {rare, common} & {25, 80, 81}
    with pytest.raises(ValueError, match="0 other latents are alive"):
        control_latents(torch.tensor([1.0, 0.0]), [0], 1)


def test_a_dose_response_says_what_doses_do_beside_random_latents(llama: PreTrainedModel) -> None:
    sae = autoencoder()

    @torch.no_grad()
    def shift() -> float:
        return float((outputs(llama, LAYER, IDS) - base).norm())

    base = outputs(llama, LAYER, IDS)
    density = (sae.encode(base) > 0).float().mean((0, 1))
    latents = {"strong": density.topk(2).indices.tolist()}
    found = dose_response(llama, LAYER, sae, latents, shift, [1.0, 3.0, 9.0], controls=4, density=density)
    values = found["groups"]["strong"]["values"]
    assert found["base"] == 0 and values[0] == 0 and 0 < values[1] < values[2]
    assert values[2] == pytest.approx(4 * values[1], rel=1e-3)
    assert len(found["groups"]["strong"]["controls"]) == 4
    for line in found["groups"]["strong"]["directions"]:  # as long, whatever the direction
        assert line == pytest.approx(values, rel=1e-3)
    with pytest.raises(ValueError, match="controls=0"):
        dose_response(llama, LAYER, sae, latents, shift, [1.0], controls=0, density=density)
    with pytest.raises(ValueError, match=r"unit \[3\].*48 latents"):
        dose_response(llama, LAYER, sae, latents, shift, [1.0], density=density, unit=torch.ones(3))


def test_doses_are_multiples_of_each_latents_unit(llama: PreTrainedModel) -> None:
    sae, seen = autoencoder(), []

    @torch.no_grad()
    def measure() -> float:
        seen.append(sae.encode(outputs(llama, LAYER, IDS)))
        return 0.0

    unit, density = torch.linspace(1, 2, 48), torch.ones(48)
    settings = {"mode": "add", "unit": unit, "density": density, "controls": 1}
    dose_response(llama, LAYER, sae, {"two": [3, 40]}, measure, [0.5], **settings)
    with intervene(llama, LAYER, sae, Edit([3, 40], "add", 0.5 * unit[[3, 40]])), torch.no_grad():
        torch.testing.assert_close(seen[1], sae.encode(outputs(llama, LAYER, IDS)))
