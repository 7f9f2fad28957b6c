"""Activations: where they come from, and the stream that shuffles them."""

from collections.abc import Iterator

import pytest
import torch
from models import BuiltIn, Subject, remembering, tiny_model, tokens
from sparse import autoencoder
from torch import Tensor

from senri_hf import MemoryCache
from senri_hf.interpretability import ActivationStream, Edit, captured, intervene, memory_slots, module_activations
from senri_hf.memory import CompressiveMemory


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


@pytest.mark.parametrize("part", ["", ".v_proj"], ids=["read", "write"])
def test_what_a_built_in_memory_reads_and_writes_is_streamed_and_edited(part: str) -> None:
    model = BuiltIn("senri", "built_in", "default").model()
    place = next(name for name, module in model.named_modules() if isinstance(module, CompressiveMemory))
    memory, ids = MemoryCache.for_model(model), tokens(2, 6)

    @torch.no_grad()
    def logits() -> Tensor:
        return model(input_ids=ids, past_key_values=memory.snapshot()).logits

    with torch.no_grad():
        model(input_ids=tokens(2, 20, seed=1), past_key_values=memory)
    memory.clear_context()
    (x,) = module_activations(model, place + part, [{"input_ids": ids}], run=lambda batch: logits())
    assert x.shape == (12, 32) and bool(x.any(-1).all())
    before = logits()
    with intervene(model, place + part, autoencoder(), Edit([3, 11], "add", 40.0)):
        assert not torch.equal(logits(), before)
    assert torch.equal(logits(), before)
    state = next(iter(memory.memory_layers)).state_dict()
    field = max(state, key=lambda name: state[name].dim())
    held = memory_slots(memory, 0, field)
    assert held.shape[1] == state[field].shape[-1] and len(held) > 0
