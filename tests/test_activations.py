"""Activations: where they come from, and the stream that shuffles them."""

from collections.abc import Iterator

import pytest
import torch
from models import tiny_model, tokens
from torch import Tensor

from senri_hf.interpretability import ActivationStream, module_activations


def source(start: int) -> Iterator[Tensor]:
    for index in range(start, 40):
        yield torch.full((100, 1), float(index))


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
        ActivationStream(source, **{"batch_size": 64, "buffer_size": 1000, **settings})


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ActivationStream(lambda start: [], 2, 10).peek()
    with pytest.raises(ValueError, match="empty"):  # texts that are shorter than what is skipped
        ActivationStream(lambda start: [torch.zeros(0, 3)] * 4, 2, 10).peek()


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
