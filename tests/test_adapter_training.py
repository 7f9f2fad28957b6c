"""What training, compilation and lower precision ask of a memory adapter."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, MEMORY_LAYERS, SMALL, assert_close, perturb, remembering, tiny_model, tokens
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from senri_hf import MemoryAdapterConfig, MemoryCache
from senri_hf.adapters.decoder import find_decoder_layers


every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
TOLD, ASKED = tokens(2, 13, seed=1), tokens(2, 8, seed=2)


def adapted(arch: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """A model with an adapter as some training could leave it."""
    config = MemoryAdapterConfig(**{"layers_to_transform": MEMORY_LAYERS, **SMALL["episodic"], **changes})
    return perturb(get_peft_model(tiny_model(arch).to(dtype), config).eval())


def two_conversations(model: nn.Module, memory: MemoryCache) -> Tensor:
    """The loss of a conversation that follows another one."""
    model(input_ids=TOLD, past_key_values=memory)
    memory.clear_context()
    return model(input_ids=ASKED, past_key_values=memory, labels=ASKED).loss


# Precision.


@every_architecture
def test_an_adapter_of_a_bf16_model_stays_in_float32(arch: str, tmp_path: Path) -> None:
    model = adapted(arch, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    memory = remembering(model, rows=2)
    with torch.no_grad():
        logits = model(input_ids=ASKED, past_key_values=memory.snapshot()).logits
        assert logits.dtype == torch.bfloat16
        assert not torch.equal(logits, model(input_ids=ASKED).logits)
    assert {t.dtype for t in memory.state_dict().values() if t.is_floating_point()} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(arch).to(torch.bfloat16), tmp_path)
    again = MemoryCache.for_model(loaded)
    again.load_state_dict(memory.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ASKED, past_key_values=again).logits, logits)


@every_architecture
def test_a_whole_model_can_be_cast(arch: str) -> None:
    model = adapted(arch)
    with torch.no_grad():
        expected = model(input_ids=ASKED, past_key_values=remembering(model, rows=2)).logits
        model.to(torch.bfloat16)
        logits = model(input_ids=ASKED, past_key_values=remembering(model, rows=2)).logits
        model.float()
        model(input_ids=ASKED, past_key_values=remembering(model, rows=2))
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_autocast_gives_about_the_same_loss() -> None:
    model = adapted()
    loss = two_conversations(model, MemoryCache.for_model(model)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        lower = two_conversations(model, MemoryCache.for_model(model))
    lower.backward()
    assert_close(lower.detach(), loss, tolerance=0.1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Weights that change while a memory is held.


@pytest.mark.parametrize("rank", [None, 2], ids=["copies", "low rank"])
@pytest.mark.parametrize("assign", [False, True], ids=["into the parameters", "as new parameters"])
@torch.no_grad()
def test_weights_that_are_loaded_are_read_with_at_once(assign: bool, rank: int | None) -> None:
    model, other = adapted(rank=rank), perturb(adapted(rank=rank))
    memory = remembering(model, rows=2)
    model(input_ids=ASKED, past_key_values=memory.snapshot())
    model(input_ids=ASKED, past_key_values=memory)  # what readers made of it is kept
    model.load_state_dict(other.state_dict(), assign=assign)
    fresh = copy.deepcopy(memory)  # a copy keeps nothing of a reader
    expected = model(input_ids=ASKED, past_key_values=fresh).logits
    assert_close(model(input_ids=ASKED, past_key_values=memory).logits, expected)


def test_a_model_made_in_inference_mode_reads_memory() -> None:
    with torch.inference_mode():
        model = adapted(rank=2)
        logits = model(input_ids=ASKED, past_key_values=remembering(model, rows=2)).logits
    assert logits.isfinite().all()


# Compilation.


@every_architecture
@torch.no_grad()
def test_the_forward_pass_compiles_as_one_graph(arch: str) -> None:
    model = adapted(arch)
    expected = model(input_ids=ASKED, use_cache=False).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(input_ids=ASKED, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_compiled_model_reads_and_writes_memory() -> None:
    model = adapted(layers_to_transform=[1])
    before = remembering(model, rows=2, lengths=[7])
    eager, ours = before.snapshot(), before.snapshot()
    expected = model(input_ids=ASKED, past_key_values=eager).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(input_ids=ASKED, past_key_values=ours).logits, expected)
    for name, tensor in ours.state_dict().items():
        assert_close(tensor, eager.state_dict()[name], name)


# Gradient checkpointing.


@every_architecture
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing_and_writes_once(arch: str, use_reentrant: bool) -> None:
    calls: list[bool] = []  # of a module inside a layer, whether while checkpointing

    def run(prepare: Callable[[PeftModel], None]) -> tuple[Tensor, dict[str, Tensor], MemoryCache]:
        model = adapted(arch).train()
        layer = find_decoder_layers(model.base_model.model)[1]
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(layer.gradient_checkpointing))
        prepare(model)
        memory = MemoryCache.for_model(model)
        loss = two_conversations(model, memory)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, memory

    def checkpoint(model: PeftModel) -> None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})

    loss, gradients, memory = run(lambda model: None)
    same_loss, same_gradients, same_memory = run(checkpoint)
    assert (calls.count(False), calls.count(True)) == (2, 4)
    assert torch.equal(same_loss, loss)
    assert same_gradients.keys() == gradients.keys()
    assert any(".gate" in name for name in gradients) and any(".o_proj" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_close(same_gradients[name], gradient, name, 1e-5)
    assert same_memory.tokens_seen.tolist() == memory.tokens_seen.tolist() == [21, 21]


# Trainer.


class Conversations(Trainer):
    """A plain Trainer whose model reads a text, forgets the context and then learns another."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        memory = MemoryCache.for_model(self.accelerator.unwrap_model(model))
        with torch.no_grad():
            model(input_ids=inputs["told"], past_key_values=memory)
        memory.clear_context()
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"], past_key_values=memory).loss


def train(folder: Path, resume: Path | None = None) -> PeftModel:
    """Four steps, with a checkpoint after the second; or the last two of them."""
    told, ids = tokens(8, 9, seed=3), tokens(8, 6, seed=4)
    data = [{"told": a, "input_ids": b, "labels": b} for a, b in zip(told, ids, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        seed=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    model = adapted()
    Conversations(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume and str(resume))
    return model


def trained_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "memory_adapter" in name}


def test_a_resumed_training_run_is_the_same_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not [
        file.name for file in checkpoint.iterdir() if re.match(r"(pytorch_)?model.*\.(safetensors|bin)", file.name)
    ]
    base = tiny_model("llama").state_dict()
    after = whole.base_model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items())
    start, end = trained_weights(adapted()), trained_weights(whole)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    resumed = trained_weights(train(tmp_path / "resumed", resume=checkpoint))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in end.items())
