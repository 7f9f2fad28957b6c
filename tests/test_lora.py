"""LoRA beside memory: each is trained, saved and loaded, together and alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY_LAYERS, SMALL, perturb, remembering, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import senri_hf
from senri_hf import MemoryAdapterConfig, MemoryCache
from senri_hf.adapters import load_lora, save_lora


IDS = tokens(1, 7, seed=9)


def memory_config() -> MemoryAdapterConfig:
    return MemoryAdapterConfig(layers_to_transform=MEMORY_LAYERS, **SMALL["episodic"])


def lora_config(**changes: Any) -> LoraConfig:
    """A LoRA that changes the model from the start."""
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})


def both() -> PeftModel:
    """A model with a trained memory adapter and a LoRA."""
    model = perturb(get_peft_model(tiny_model("llama"), memory_config()).eval())
    return senri_hf.add_lora(model, lora_config()).eval()


@torch.no_grad()
def logits(model: nn.Module, memory: MemoryCache | None = None) -> Tensor:
    return model(input_ids=IDS, past_key_values=None if memory is None else memory.snapshot()).logits


def names(model: nn.Module, part: str) -> set[str]:
    """Names of the parameters that belong to one of the two adapters."""
    return {name for name, _ in model.named_parameters() if part in name}


def test_both_act_and_both_are_trained() -> None:
    model = both()
    base = logits(tiny_model("llama"))
    memory = remembering(model)
    assert not torch.allclose(logits(model), base)
    assert not torch.allclose(logits(model, memory), logits(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == names(model, ".senri_block.") | names(model, ".lora_")
    assert names(model, ".lora_") and not any("memory_adapter" in name for name in names(model, ".lora_"))
    model(input_ids=IDS, labels=IDS, past_key_values=memory).loss.backward()
    for part in (".o_proj.up", ".lora_A.", ".lora_B."):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if part in n)


def test_both_are_disabled_together() -> None:
    model = both()
    memory, changed = remembering(model), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, memory), logits(tiny_model("llama")))
    assert torch.equal(logits(model), changed)


def test_both_are_saved_and_loaded_together(tmp_path: Path) -> None:
    model = both()
    memory = remembering(model)
    model.save_pretrained(tmp_path)
    saved = [set(load_file(tmp_path / place / "adapter_model.safetensors")) for place in ("", "lora")]
    assert all("senri_block" in name for name in saved[0]) and all("lora_" in name for name in saved[1])
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    load_lora(loaded, tmp_path / "lora")
    assert torch.equal(logits(loaded), logits(model))
    again = MemoryCache.for_model(loaded)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(logits(loaded, again), logits(model, memory))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_lora_is_loaded_to_train_on(tmp_path: Path) -> None:
    save_lora(both(), tmp_path)
    model = get_peft_model(tiny_model("llama"), memory_config())
    load_lora(model, tmp_path / "lora", "mine", is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == names(model, ".senri_block.") | names(model, ".lora_")


def test_the_lora_alone_loads_in_peft(tmp_path: Path) -> None:
    model = both()
    save_lora(model, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    alone = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    assert torch.equal(logits(alone), logits(model))
    assert torch.equal(logits(alone.merge_and_unload()), logits(alone))


def test_memory_starts_from_the_base_layers_own_weights() -> None:
    alone = get_peft_model(tiny_model("llama"), memory_config()).base_model.model
    model = tiny_model("llama")
    model.add_adapter(lora_config(), "lora")
    changed = logits(model)
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        inject_adapter_in_model(memory_config(), model, "memory")
    for index in MEMORY_LAYERS:
        ours = model.model.layers[index].memory_adapter.senri_block["memory"]
        theirs = alone.model.layers[index].memory_adapter.senri_block["default"]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert torch.equal(getattr(ours, name).base_weight, getattr(theirs, name).base_weight)
    memory = remembering(model)
    assert torch.equal(logits(model, memory), changed)  # gates are still closed
    perturb(model)
    assert not torch.allclose(logits(model, remembering(model)), changed)


def test_memory_adapters_are_switched_without_the_lora() -> None:
    model = both()
    with_lora = logits(model)
    model.add_adapter("other", memory_config())
    model.set_adapter("other")
    assert torch.equal(logits(model), with_lora)
    model.set_adapter("default")
    assert torch.equal(logits(model), with_lora)


def test_a_deleted_lora_leaves_the_memory() -> None:
    model = both()
    model.delete_adapter("lora")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not names(model, ".lora_")
    alone = perturb(get_peft_model(tiny_model("llama"), memory_config()).eval())
    assert torch.equal(logits(model, remembering(model)), logits(alone, remembering(alone)))


def test_a_deleted_memory_leaves_the_lora() -> None:
    model = both()
    with_lora = logits(model)
    model.delete_adapter("default")
    assert list(model.peft_config) == model.active_adapters == ["lora"]
    assert torch.equal(logits(model), with_lora)


def test_unload_removes_both() -> None:
    base = tiny_model("llama")
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = senri_hf.add_lora(get_peft_model(base, memory_config()), lora_config())
    state = model.unload().state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    model = both()
    with pytest.raises(ValueError, match=r"adapter_name='lora'.*\['default', 'lora'\]"):
        senri_hf.add_lora(model, lora_config())
    with pytest.raises(TypeError, match="AdapterConfig was given"):
        senri_hf.add_lora(model, memory_config(), "other")
    with pytest.raises(ValueError, match="no memory adapters"):
        senri_hf.add_lora(get_peft_model(tiny_model("llama"), lora_config()), lora_config(), "more")
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora(get_peft_model(tiny_model("llama"), memory_config()), tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AdapterConfig, but a LoRA"):
        load_lora(model, tmp_path, "third")


def test_a_lora_that_does_not_fit_is_refused_and_taken_out(tmp_path: Path) -> None:
    save_lora(both(), tmp_path)
    model = get_peft_model(tiny_model("llama", num_hidden_layers=2), memory_config_of(0))
    with pytest.raises(ValueError, match=r"does not fit this model: unknown weights .*layers\.2"):
        load_lora(model, tmp_path / "lora")
    assert list(model.peft_config) == ["default"] and not names(model, ".lora_")


def memory_config_of(layer: int) -> MemoryAdapterConfig:
    return MemoryAdapterConfig(layers_to_transform=layer, **SMALL["episodic"])


class OneText(Trainer):
    """A plain Trainer whose model reads an empty memory."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        memory = MemoryCache.for_model(self.accelerator.unwrap_model(model))
        with torch.no_grad():
            model(input_ids=inputs["input_ids"], past_key_values=memory)
        memory.clear_context()
        return model(**inputs, past_key_values=memory).loss


def test_a_resumed_run_of_both_is_the_same_run(tmp_path: Path) -> None:
    def train(folder: str, resume: str | None = None) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=1, report_to=[],
            learning_rate=1e-2, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        model = both()
        data = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 8)]
        OneText(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name or "senri" in name}

    whole = train("whole")
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
