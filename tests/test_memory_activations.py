"""Autoencoders of memory: what is read from it, what is written to it, and what it holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import BuiltIn, Subject, remembering, tokens
from sparse import autoencoder
from torch import Tensor, nn

from senri_hf import MemoryCache, SparseAutoencoder, SparseAutoencoderConfig
from senri_hf.interpretability import (
    ActivationStream,
    Edit,
    SparseAutoencoderTrainer,
    SparseAutoencoderTrainingArguments,
    captured,
    edit_slots,
    intervene,
    memory_slots,
    module_activations,
    prediction_metrics,
    reconstruction_metrics,
)
from senri_hf.memory import CompressiveMemory, EpisodicLayer


READER = "model.layers.2.memory_adapter.senri_block.default"
IDS = tokens(2, 7)
LOUD = Edit([3, 11, 20], "add", 40.0)


@pytest.fixture(scope="module")
def adapted() -> Any:
    return Subject("llama", "episodic", "default").model()


@pytest.fixture(scope="module")
def senri() -> Any:
    return BuiltIn("senri", "built_in", "default").model()


def mixer(model: nn.Module) -> str:
    """The first module of a model that reads and writes a compressive memory."""
    return next(name for name, module in model.named_modules() if isinstance(module, CompressiveMemory))


@torch.no_grad()
def logits(model: Any, memory: MemoryCache, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, past_key_values=memory.snapshot()).logits


def test_what_an_adapter_reads_is_streamed_measured_and_edited(adapted: Any) -> None:
    memory, batches = remembering(adapted, rows=2), [{"input_ids": IDS}]
    assert isinstance(memory.memory_layers[-1], EpisodicLayer)

    def run(batch: dict[str, Tensor]) -> Any:
        return adapted(**batch, past_key_values=memory.snapshot())

    (reads,) = module_activations(adapted, READER, batches, run=run)
    with torch.no_grad(), captured(adapted, READER) as seen:
        run(batches[0])
    assert torch.equal(reads, seen[0].flatten(0, 1)) and reads.shape == (14, 32)
    with pytest.raises(ValueError, match="reached 0 times"):
        list(module_activations(adapted, READER, batches, run=lambda batch: adapted(**batch)))
    sae, plain = autoencoder(), logits(adapted, memory)
    found = prediction_metrics(adapted, READER, sae, batches, run=run)
    assert found["kl_zero"] > 0 and found["kl_sae"] > 0
    with intervene(adapted, READER, sae, LOUD, positions=[2]):
        edited = logits(adapted, memory)
    assert torch.equal(edited[:, :2], plain[:, :2]) and not torch.equal(edited[:, 2], plain[:, 2])
    # Nothing is read from an empty memory: there is nothing to edit, and nothing that zeros would change.
    blank = MemoryCache.for_model(adapted)
    with intervene(adapted, READER, sae, LOUD):
        assert torch.equal(logits(adapted, blank), adapted(IDS).logits)
    unread = prediction_metrics(adapted, READER, sae, batches)
    assert unread["kl_zero"] == 0 and unread["kl_recovered"] != unread["kl_recovered"]  # NaN


def test_what_an_adapter_writes_is_what_the_module_before_its_layer_returns(adapted: Any) -> None:
    memory, ids = MemoryCache.for_model(adapted), tokens(1, 11)
    (before,) = module_activations(
        adapted, "model.layers.1", [{"input_ids": ids}], run=lambda batch: adapted(**batch, past_key_values=memory)
    )
    memory.clear_context()
    written = torch.cat([memory_slots(memory, 2, field) for field in ("buffer", "store")])
    nearest = torch.cdist(written, nn.functional.rms_norm(before, before.shape[-1:])).amin(1)
    assert len(written) > 0 and float(nearest.max()) < 1e-4


@pytest.mark.parametrize("part", ["", ".v_proj"], ids=["read", "write"])
def test_what_a_built_in_memory_reads_and_writes_is_streamed_and_edited(senri: Any, part: str) -> None:
    place, memory = mixer(senri) + part, remembering(senri, rows=2)
    (x,) = module_activations(senri, place, [{"input_ids": IDS}], run=lambda batch: logits(senri, memory))
    assert x.shape == (14, 32) and bool(x.any(-1).all())
    before = logits(senri, memory)
    with intervene(senri, place, autoencoder(), LOUD):
        assert not torch.equal(logits(senri, memory), before)
    assert torch.equal(logits(senri, memory), before)


@pytest.mark.parametrize(("kind", "layer", "field"), [("adapted", 2, "store"), ("senri", 0, "memory")])
def test_an_autoencoder_is_trained_on_what_a_memory_holds_and_changes_it(
    kind: str, layer: int, field: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(kind)
    memories = [remembering(model, rows=4, seed=seed) for seed in range(6)]
    stream = ActivationStream(lambda start: [memory_slots(m, layer, field) for m in memories[start:]], 16, 64)
    width = stream.peek().shape[-1]
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=width, expansion_factor=2, variant="topk", k=6))
    arguments = SparseAutoencoderTrainingArguments(
        output_dir=str(tmp_path), max_steps=60, learning_rate=1e-2, report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    SparseAutoencoderTrainer(sae, arguments, stream).train()
    sae.eval()
    held = memory_slots(memories[0], layer, field)
    assert reconstruction_metrics(sae, [held])["explained_variance"] > 0.5

    memory, latent = memories[0], int(sae.encode(held).amax(0).argmax())
    before, text = memory.snapshot(), tokens(4, 7)
    edit_slots(memory, layer, field, sae, Edit(latent, "scale", 1.0))
    assert torch.equal(memory_slots(memory, layer, field), held)
    edit_slots(memory, layer, field, sae, Edit(latent, "ablate"))
    f = sae.encode(held)
    expected = held - f[:, [latent]] @ sae.W_dec[[latent]] / sae.activation_scale
    torch.testing.assert_close(memory_slots(memory, layer, field), expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model, memory, text), logits(model, before, text))
    for edit, message in ((Edit(9999, "ablate"), "Latent 9999"), (Edit(0, "patch", torch.rand(2, 1)), "no columns")):
        with pytest.raises(ValueError, match=message):
            edit_slots(memory, layer, field, sae, edit)


def test_what_a_memory_does_not_hold_is_refused_by_name(adapted: Any) -> None:
    memory = remembering(adapted, rows=2)
    with pytest.raises(ValueError, match=r"no field 'attic' of vectors, but \['buffer', 'store'\]"):
        memory_slots(memory, 2, "attic")
    with pytest.raises(ValueError, match="Layer 7 has no such memory; there are those of layers"):
        memory_slots(memory, 7, "store")
