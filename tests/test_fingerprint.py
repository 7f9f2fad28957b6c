"""What tells the model that made a memory from another one, however small the part that differs."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import Subject
from peft import PeftModel
from torch import nn

from senri_hf.memory.fingerprint import SAMPLED_TENSORS, difference, fingerprint


NORM = 20.0  # about what trained norms reach: 100 times what a matrix holds


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """Eight heads, with norms and scalars that are far larger than the matrices."""
    built = Subject("llama", "episodic", "default").build(model={"num_attention_heads": 8})
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() < 2:
                parameter.fill_(NORM)
    return built


def changed(model: PeftModel, part: str, change: Callable[[nn.Parameter], object]) -> PeftModel:
    """A copy in which every parameter with `part` in its name is another."""
    other = copy.deepcopy(model)
    chosen = [parameter for name, parameter in other.named_parameters() if part in name and parameter.dim() > 1]
    assert chosen
    with torch.no_grad():
        for parameter in chosen:
            change(parameter)
    return other


@pytest.mark.parametrize("change", [lambda p: p.zero_(), lambda p: p.mul_(0.9)], ids=["zero", "0.9"])
@pytest.mark.parametrize(
    ("part", "what"),
    [
        *((f"self_attn.{name}_proj", "base model") for name in "qkvo"),
        *((f"mlp.{name}_proj", "base model") for name in ("gate", "up", "down")),
        ("lm_head", "base model"),
        ("layers.2.mlp.up_proj", "base model"),
        *((f"senri_block.default.{name}_proj.", "memory adapter") for name in ("q", "k", "v", "o", "topic")),
        ("senri_block.default.predictor", "memory adapter"),
        ("layers.2.memory_adapter", "memory adapter"),
        ("", "base model"),
    ],
)
def test_matrices_tell_models_apart(
    model: PeftModel, part: str, what: str, change: Callable[[nn.Parameter], object]
) -> None:
    """Those of one kind alone, beside norms and scalars that are far larger."""
    found = difference(fingerprint(model), fingerprint(changed(model, part, change)))
    assert found is not None
    assert found.startswith(f"{what}: the memory was made with another one (sampled values of ")


@pytest.mark.parametrize("name", ["senri_block.default.norm", "input_layernorm", "senri_block.default.gate"])
def test_norms_and_scalars_tell_models_apart(model: PeftModel, name: str) -> None:
    """Also those with fewer values than a sample has."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if name in key:
                parameter.mul_(0.9)
    assert "differ by 10%" in (difference(fingerprint(model), fingerprint(other)) or "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 0.0])
def test_the_same_weights_in_another_dtype_fit(model: PeftModel, dtype: torch.dtype, size: float) -> None:
    """There, and back again with what was rounded away; also where they are nothing or next to it."""
    written = changed(model, "", lambda p: p.mul_(size))
    other = copy.deepcopy(written).to(dtype)
    for rounded in (other, copy.deepcopy(other).float()):
        assert difference(fingerprint(written), fingerprint(rounded)) is None
        assert difference(fingerprint(rounded), fingerprint(written)) is None


def test_what_is_nothing_differs_from_what_is_small(model: PeftModel) -> None:
    small = changed(model, "topic_proj", lambda p: p.fill_(1e-5))
    nothing = changed(model, "topic_proj", lambda p: p.zero_())
    assert "topic_proj" in (difference(fingerprint(small), fingerprint(nothing)) or "")


def test_what_is_not_a_number_differs(model: PeftModel) -> None:
    other = changed(model, "topic_proj", lambda p: p.fill_(float("nan")))
    assert "topic_proj" in (difference(fingerprint(model), fingerprint(other)) or "")


def test_fewer_samples_are_compared_as_well(model: PeftModel) -> None:
    """A memory file may hold those of other tensors than are sampled here."""
    written = fingerprint(model)
    for samples, part in ((written, "weights"), (written["memory_weights"], "default")):
        samples[part] = dict(list(samples[part].items())[: SAMPLED_TENSORS // 2])
    assert difference(written, fingerprint(model)) is None
    assert difference(written, fingerprint(changed(model, "", lambda p: p.mul_(0.9)))) is not None
