"""The main job on real weights: a pretrained chat model is told something and answers from a saved memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import senri_hf
from senri_hf.bases import BaseUnavailableError
from senri_hf.commands.chat import shipped_adapter
from senri_hf.memory.bank_reader import BankAttention
from senri_hf.tasks import recall_episodes, score_reply
from senri_hf.training import ask, tell


NAME = "smollm2-135m-instruct"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    adapter = shipped_adapter(NAME)
    assert adapter is not None, "the shipped adapter is missing from examples/name_recall/adapters"
    try:
        base, tokenizer = senri_hf.load_base(NAME, progress=False)
    except BaseUnavailableError as error:
        pytest.skip(str(error))
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


def test_a_name_told_in_one_conversation_is_known_in_another_from_a_file(real: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = real
    episodes = recall_episodes(8, split="validation", relations="name", seed=3)
    tell(model, tokenizer, [episode.told for episode in episodes]).save_pretrained(tmp_path / "memory")
    memory = senri_hf.MemoryCache.from_pretrained(tmp_path / "memory", model=model)
    questions = [episode.questions[0] for episode in episodes]
    with_memory = ask(model, tokenizer, [question.messages for question in questions], memory, max_new_tokens=16)
    without = ask(model, tokenizer, [question.messages for question in questions], max_new_tokens=16)
    assert sum(score_reply(r, q) for r, q in zip(with_memory, questions, strict=True)) >= 7, with_memory
    assert sum(score_reply(r, q) for r, q in zip(without, questions, strict=True)) == 0, without


def test_a_first_conversation_is_the_base_models_own(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    inputs = tokenizer("My name is Priya and I live in Lisbon.", return_tensors="pt")
    with torch.no_grad():
        remembered = model(**inputs, past_key_values=senri_hf.MemoryCache.for_model(model)).logits
        with model.disable_adapter():
            assert torch.equal(remembered, model(**inputs).logits)


def test_the_shipped_adapter_is_small_and_safe() -> None:
    adapter = shipped_adapter(NAME)
    assert adapter is not None
    files = {path.name: path.stat().st_size for path in adapter.iterdir()}
    assert files["adapter_model.safetensors"] <= 16e6
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json", "README.md", "training_cost.json"}


@pytest.mark.parametrize("name", [NAME, "gemma-3-270m"])
@torch.no_grad()
def test_a_new_bank_changes_nothing(name: str) -> None:
    """Bit for bit; moved, its output does, and switched off it does not."""
    try:
        base, tokenizer = senri_hf.load_base(name, progress=False)
    except BaseUnavailableError as error:
        pytest.skip(str(error))
    inputs = tokenizer("The river was low that summer.", return_tensors="pt")
    plain = base.eval()(**inputs).logits
    layers = [4, base.config.get_text_config(decoder=True).num_hidden_layers - 1]
    model: Any = get_peft_model(
        base,
        senri_hf.MemoryAdapterConfig(
            mechanism="bank",
            layers_to_transform=layers,
            num_memory_tokens=64,
            use_chapters=True,
            num_chapters=8,
            top_k_chapters=2,
        ),
    ).eval()
    assert torch.equal(model(**inputs).logits, plain)
    for module in model.modules():
        if isinstance(module, BankAttention):
            module.o_proj.weight.normal_(std=0.1)
    assert not torch.equal(model(**inputs).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
