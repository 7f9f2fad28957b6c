"""Senri models: what every transformers model keeps, and what is their own. The six laws are in `test_laws`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILT_IN, EOS, HIDDEN, PAD, VOCABULARY, BuiltIn, assert_close, padded, tokens
from transformers import (
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from senri_hf import (
    MemoryCache,
    SenriConfig,
    SenriForCausalLM,
    SenriForSequenceClassification,
    SenriModel,
    load_open_calm_tokenizer,
    pythia_layers,
    senri_layers,
)


SUBJECTS = {variant: BuiltIn("senri", "built_in", variant) for variant in BUILT_IN["senri"]}
every_variant = pytest.mark.parametrize("variant", SUBJECTS)


def tiny(**settings: Any) -> SenriConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 4}
    return SenriConfig(**{**sizes, "pad_token_id": PAD, "eos_token_id": EOS, **settings})


# The config.


def test_a_config_reads_as_the_layers_are_said() -> None:
    config = SenriConfig(layers=senri_layers(1, num_memories=4) + pythia_layers(5), vocab_size=52000)
    assert config.layer_types == ["senri_memory"] + ["full_attention"] * 5 and config.num_hidden_layers == 6
    assert config.memory_settings(0).num_memories == 4 and config.memory_settings(0).update_rule == "delta"
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (512, 8, 2048)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert SenriConfig().layers == SenriConfig(layers=senri_layers(1) + pythia_layers(5)).layers
    assert SenriConfig(num_hidden_layers=3).layer_types == ["senri_memory", "full_attention", "full_attention"]
    assert senri_layers(1, use_delta_rule=False)[0]["update_rule"] == "additive"


def test_a_saved_config_is_the_same(tmp_path: Path) -> None:
    config = tiny(layers=senri_layers(2, update_rule="gated_delta", memory_head_dim=8) + pythia_layers(1))
    config.save_pretrained(tmp_path)
    assert SenriConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: senri_layers(1, update_rule="hebb"), "update_rule='hebb'"),
        (lambda: senri_layers(1, use_delta_rule=False, update_rule="delta"), "use_delta_rule=False and update_rule"),
        (lambda: senri_layers(1, num_memory=4), "num_memory=4.*num_memories"),
        (lambda: senri_layers(1, num_memories=0), "num_memories=0"),
        (lambda: senri_layers(1, update_rule="gated_delta", memory_segment_length=4), "memory_segment_length=4"),
        (lambda: senri_layers(-1), "-1 layers"),
        (lambda: SenriConfig(layers=["attention"]), "layers.*'attention'"),
        (lambda: SenriConfig(layers=[{"memories": 2}]), "is no layer"),
        (lambda: SenriConfig(layers=[{"type": "conv"}]), "'conv'"),
        (lambda: SenriConfig(layers=pythia_layers(2), num_hidden_layers=3), "num_hidden_layers=3.*2"),
        (lambda: SenriConfig(layers=[{"type": "full_attention", "heads": 2}]), "no settings of its own"),
        (lambda: SenriForCausalLM(tiny(layers=senri_layers(1, memory_head_dim=5))), "memory_head_dim=5.*32"),
    ],
)
def test_a_wrong_setting_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_default_layers_memory_has_the_size_that_the_documents_say() -> None:
    """One head of 512: 1,050,624 bytes a row; eight heads of 64: 133,120; times the slots."""
    for settings, size in (
        ({}, 1_050_624),
        ({"memory_head_dim": 64}, 133_120),
        ({"memory_head_dim": 64, "num_memories": 4}, 4 * 133_120),
    ):
        model = SenriModel(SenriConfig(layers=senri_layers(1, **settings), vocab_size=9, intermediate_size=8))
        memory = MemoryCache.for_model(model)
        with torch.no_grad():
            model(torch.ones(2, 3, dtype=torch.long), past_key_values=memory)
        assert memory.nbytes == 2 * size


def test_a_classifier_reads_the_last_real_token() -> None:
    config = tiny(num_hidden_layers=2, num_labels=3)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(config).eval()
    assert type(model) is SenriForSequenceClassification
    rows = [tokens(1, length, seed=length) for length in (9, 4)]
    for side in ("left", "right"):
        together = model(**padded(rows, side), labels=torch.tensor([0, 2]))
        assert together.loss.isfinite()
        for index, row in enumerate(rows):
            assert_close(together.logits[index], model(row).logits[0])


# From GPT-NeoX.


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=3, initializer_range=0.3)).eval()


@pytest.mark.parametrize("settings", [{}, {"update_rule": "gated_delta", "memory_head_dim": 8}])
@pytest.mark.parametrize("places", [[0], [1, 3], []])
def test_memory_layers_in_a_gpt_neox_change_nothing_at_first(
    places: list[int], settings: dict[str, Any], tmp_path: Path
) -> None:
    base, ids = neox(), tokens(2, 11, seed=3)
    model = SenriForCausalLM.from_gpt_neox(base, places, **settings)
    assert torch.equal(model(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
    assert model.config.layer_types.count("senri_memory") == len(places)
    base.save_pretrained(tmp_path)
    assert torch.equal(SenriForCausalLM.from_gpt_neox(tmp_path, places, **settings)(ids).logits, model(ids).logits)
    for parameter in model.train().parameters():
        parameter.requires_grad_()
    model(ids, labels=ids).loss.backward()
    assert all(layer.memory.o_proj.weight.grad.any() for i, layer in enumerate(model.model.layers) if i in places[:1])


def test_what_is_set_on_a_senri_is_not_set_on_the_gpt_neox_that_it_came_from() -> None:
    base = neox()
    model = SenriForCausalLM.from_gpt_neox(base, [0])
    model.generation_config.max_new_tokens = 7
    assert base.generation_config.max_new_tokens != 7


def test_places_that_a_model_has_not_are_refused() -> None:
    for places in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"memory_layers=.*from 0 to 3"):
            SenriForCausalLM.from_gpt_neox(neox(), places)


def test_a_model_of_attention_only_is_a_gpt_neox() -> None:
    base, ids = neox(), tokens(2, 11, seed=3)
    model = SenriForCausalLM.from_gpt_neox(base, [])
    assert model.config.layer_types == ["full_attention"] * 3
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_tokenizer_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"load_open_calm_tokenizer\(folder\)"):
        load_open_calm_tokenizer(tmp_path)
