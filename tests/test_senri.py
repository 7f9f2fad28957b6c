"""Senri models: what every transformers model keeps, and what is their own. The six laws are in `test_laws`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILT_IN, EOS, HIDDEN, PAD, VOCABULARY, BuiltIn, assert_close, greedy, padded, tokens
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
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


def new_tokens(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The new tokens of greedy decoding, without a memory of its own unless given."""
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "eos_token_id": None} | kwargs
    return model.generate(input_ids=ids, do_sample=False, **kwargs)[:, ids.shape[1] :]


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
    with pytest.raises(Exception, match=message):
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


# Generation.


@every_variant
@torch.no_grad()
def test_every_way_to_generate_gives_one_text(variant: str) -> None:
    """Without a cache, with one made from the config, with a memory; looking up the prompt; with an assistant."""
    model, ids = SUBJECTS[variant].model(), tokens(1, 9, seed=5)
    expected = new_tokens(model, ids, use_cache=False)
    assert expected.unique().numel() > 2
    assistant = SUBJECTS[variant].build(seed=3)
    static = StaticCache(config=model.config, max_cache_len=64)
    for way in (
        {},
        {"past_key_values": MemoryCache.for_model(model)},
        {"past_key_values": static},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "past_key_values": MemoryCache.for_model(model)},
        {"assistant_model": assistant},
        {"assistant_model": assistant, "past_key_values": MemoryCache.for_model(model)},
    ):
        assert torch.equal(new_tokens(model, ids, **way), expected), way
    beams = new_tokens(model, ids, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams, new_tokens(model, ids, num_beams=3, num_return_sequences=2, use_cache=False))


@every_variant
@torch.no_grad()
def test_what_was_taken_back_is_there_again_bit_for_bit(variant: str) -> None:
    """Between two passes, as assisted decoding goes back."""
    model, memory = SUBJECTS[variant].model(), MemoryCache.for_model(SUBJECTS[variant].model())
    model(tokens(2, 90, seed=1), past_key_values=memory)
    for turn in range(12):
        model(tokens(2, 3, seed=2), past_key_values=memory)
        before = memory.state_dict()
        model(tokens(2, 5 + turn, seed=3), past_key_values=memory)
        memory.crop(-(5 + turn))
        after = memory.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="taken back"):
        memory.crop(-100)


def test_a_cache_without_memory_is_refused() -> None:
    model = SUBJECTS["default"].model()
    with pytest.raises(ValueError, match="no memory for layer 0"):
        model(tokens(1, 3), past_key_values=DynamicCache())


@torch.no_grad()
def test_memory_is_not_written_where_it_shall_not_be() -> None:
    model, memory = SUBJECTS["gated"].model(), MemoryCache.for_model(SUBJECTS["gated"].model())
    model(tokens(1, 9), past_key_values=memory)
    before = memory.state_dict()
    model(tokens(1, 5, seed=2), past_key_values=memory, update_memory=False)
    assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())
    model(tokens(1, 5, seed=2), past_key_values=memory)
    assert not torch.equal(memory.state_dict()["model.0.memory"], before["model.0.memory"])


@every_variant
@torch.no_grad()
def test_rows_that_were_packed_are_as_alone(variant: str) -> None:
    """By positions that begin again, by cu_seq_lens and by seq_idx, with no mask and no cache."""
    model, ids = SUBJECTS[variant].model(), tokens(1, 24, seed=7)
    parts = ids.split([7, 1, 16], dim=1)
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    assert_close(model(ids, position_ids=positions, use_cache=False).logits, alone)
    assert_close(model(ids, position_ids=positions).logits, alone)
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=positions, past_key_values=MemoryCache.for_model(model))
    if "full_attention" not in model.config.layer_types:
        ends = torch.tensor([0, 7, 8, 24], dtype=torch.int32)
        assert_close(model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False).logits, alone)
        number = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 1, 16]))[None]
        assert_close(model(ids, seq_idx=number, use_cache=False).logits, alone)


# Training.


@every_variant
def test_checkpointing_changes_no_gradient(variant: str) -> None:
    """Also over two segments that carry memory, without a detour through a cache that checkpointing takes away."""
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = SUBJECTS[variant].build().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = tokens(2, 20, seed=8)
        memory = MemoryCache.for_model(model)
        loss = model(ids, labels=ids, use_cache=False).loss
        if "full_attention" not in model.config.layer_types:
            model(ids, past_key_values=memory)
            loss = loss + model(ids, past_key_values=memory, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(losses[1], losses[0], tolerance=1e-5)
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient, name, tolerance=1e-4)


@every_variant
def test_a_trainer_trains_saves_and_goes_on(variant: str, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12, seed=9)]

    def trainer(model: Any, steps: int) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=4, report_to=[], use_cpu=True, learning_rate=3e-3,
            per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, save_total_limit=1,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=data)

    once = trainer(SUBJECTS[variant].fresh(), 8)
    once.train()
    log = [entry["loss"] for entry in once.state.log_history if "loss" in entry]
    assert log[-1] < log[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8").eval()
    ids = tokens(1, 9)
    assert torch.equal(loaded(ids).logits, once.model.eval()(ids).logits)


def test_a_base_model_says_what_a_trainer_needs_that_calls_it_alone() -> None:
    """TRL takes the base model's last hidden states and multiplies with the head."""
    model, ids = SUBJECTS["default"].model(), tokens(2, 9)
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids, use_cache=False).logits)


# Saving and loading.


@every_variant
def test_the_auto_classes_load_what_was_saved(variant: str, tmp_path: Path) -> None:
    model, ids = SUBJECTS[variant].model(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SenriForCausalLM and torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is SenriModel
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half(ids).logits.isfinite().all()


def test_a_pipeline_generates() -> None:
    tokenizer = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(ord("a") + i): 3 + i for i in range(26)} | {"<pad>": PAD, "<s>": 1, "</s>": EOS}
    model = tokenizer.models.WordLevel(vocabulary, unk_token="<pad>")
    fast = tokenizer.Tokenizer(model)
    fast.pre_tokenizer = tokenizer.pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")
    generate = pipeline("text-generation", model=SUBJECTS["default"].build(), tokenizer=wrapped)
    out = generate("abcabc", max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"].startswith("a") and len(out[0]["generated_text"]) > 6


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


def test_places_that_a_model_has_not_are_refused() -> None:
    for places in ([4], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"memory_layers=.*from 0 to 3"):
            SenriForCausalLM.from_gpt_neox(neox(), places)


def test_a_model_of_attention_only_is_a_gpt_neox() -> None:
    base, ids = neox(), tokens(2, 11, seed=3)
    model = SenriForCausalLM.from_gpt_neox(base, [])
    assert model.config.layer_types == ["full_attention"] * 3
    assert torch.equal(new_tokens(model, ids), new_tokens(base, ids))


def test_a_tokenizer_that_is_not_there_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"load_open_calm_tokenizer\(folder\)"):
        load_open_calm_tokenizer(tmp_path)


def test_a_memory_goes_on_in_another_dtype(tmp_path: Path) -> None:
    """Saved by a model in float32, read by its bfloat16 copy: the file is float32 in both, and the text goes on."""
    model = SUBJECTS["gated"].model()
    memory = MemoryCache.for_model(model)
    with torch.no_grad():
        model(tokens(1, 30), past_key_values=memory)
    memory.save_pretrained(tmp_path)
    half = copy.deepcopy(model).bfloat16()
    loaded = MemoryCache.from_pretrained(tmp_path, model=half)
    assert all(t.dtype == torch.float32 for t in loaded.state_dict().values() if t.is_floating_point())
    memory.clear_context()
    ids = tokens(1, 5, seed=2)
    assert torch.equal(greedy(half, ids, loaded, new=3)[:, 0], greedy(model, ids, memory, new=3)[:, 0])
