"""Models that have their memory built in: what every one of them keeps. The six laws are in `test_laws`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILT_IN_SUBJECTS, EOS, PAD, VOCABULARY, BuiltIn, assert_close, greedy, tokens
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from senri_hf import MemoryCache


every_subject = pytest.mark.parametrize("subject", BUILT_IN_SUBJECTS, ids=str)
every_family = pytest.mark.parametrize("subject", [s for s in BUILT_IN_SUBJECTS if s.variant == "default"], ids=str)


def new_tokens(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The new tokens of greedy decoding, without a memory of its own unless given."""
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "eos_token_id": None} | kwargs
    return model.generate(input_ids=ids, do_sample=False, **kwargs)[:, ids.shape[1] :]


@every_subject
@torch.no_grad()
def test_every_way_to_generate_gives_one_text(subject: BuiltIn) -> None:
    """Without a cache, with one made from the config, with a memory; looking up the prompt; with an assistant."""
    model, ids = subject.model(), tokens(1, 9, seed=5)
    expected = new_tokens(model, ids, use_cache=False)
    assert expected.unique().numel() > 2
    assistant = subject.build(seed=3)
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


@every_subject
@torch.no_grad()
def test_what_was_taken_back_is_there_again_bit_for_bit(subject: BuiltIn) -> None:
    """Between two passes, as assisted decoding goes back."""
    model, memory = subject.model(), MemoryCache.for_model(subject.model())
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


@every_family
def test_a_cache_without_memory_is_refused(subject: BuiltIn) -> None:
    model = subject.model()
    with pytest.raises(ValueError, match="no memory for layer 0"):
        model(tokens(1, 3), past_key_values=DynamicCache())


@every_subject
@torch.no_grad()
def test_memory_is_not_written_where_it_shall_not_be(subject: BuiltIn) -> None:
    model, memory = subject.model(), MemoryCache.for_model(subject.model())
    model(tokens(1, 9), past_key_values=memory)
    before = memory.state_dict()
    model(tokens(1, 5, seed=2), past_key_values=memory, update_memory=False)
    assert all(torch.equal(t, before[name]) for name, t in memory.state_dict().items())
    model(tokens(1, 5, seed=2), past_key_values=memory)
    after = memory.state_dict()
    assert not all(torch.equal(t, before[name]) for name, t in after.items() if t.is_floating_point())


@every_subject
@torch.no_grad()
def test_rows_that_were_packed_are_as_alone(subject: BuiltIn) -> None:
    """By positions that begin again, by cu_seq_lens and by seq_idx, with no mask and no cache."""
    model, ids = subject.model(), tokens(1, 24, seed=7)
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


@every_subject
def test_checkpointing_changes_no_gradient(subject: BuiltIn) -> None:
    """Also over two segments that carry memory, without a detour through a cache that checkpointing takes away."""
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = subject.build().train()
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


@every_subject
def test_a_trainer_trains_saves_and_goes_on(subject: BuiltIn, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 12, seed=9)]

    def trainer(model: Any, steps: int) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=4, report_to=[], use_cpu=True, learning_rate=3e-3,
            per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, save_total_limit=1,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=data)

    once = trainer(subject.fresh(), 8)
    once.train()
    log = [entry["loss"] for entry in once.state.log_history if "loss" in entry]
    assert log[-1] < log[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8").eval()
    ids = tokens(1, 9)
    assert torch.equal(loaded(ids).logits, once.model.eval()(ids).logits)


@every_family
def test_a_base_model_says_what_a_trainer_needs_that_calls_it_alone(subject: BuiltIn) -> None:
    """TRL takes the base model's last hidden states and multiplies with the head."""
    model, ids = subject.model(), tokens(2, 9)
    hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids, use_cache=False).logits)


@every_subject
def test_the_auto_classes_load_what_was_saved(subject: BuiltIn, tmp_path: Path) -> None:
    model, ids = subject.model(), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.model)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half(ids).logits.isfinite().all()


@every_subject
def test_a_memory_goes_on_in_another_dtype(subject: BuiltIn, tmp_path: Path) -> None:
    """Saved by a model in float32, read by its bfloat16 copy: the file is float32 in both, and the text goes on."""
    model = subject.model()
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


@every_family
def test_a_pipeline_generates(subject: BuiltIn) -> None:
    tokenizer = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(ord("a") + i): 3 + i for i in range(26)} | {"<pad>": PAD, "<s>": 1, "</s>": EOS}
    model = tokenizer.models.WordLevel(vocabulary, unk_token="<pad>")
    fast = tokenizer.Tokenizer(model)
    fast.pre_tokenizer = tokenizer.pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="</s>")
    generate = pipeline("text-generation", model=subject.build(), tokenizer=wrapped)
    no_letters = [PAD, 1, EOS, *range(29, VOCABULARY)]
    out = generate("abcabc", max_new_tokens=4, do_sample=False, suppress_tokens=no_letters)
    said = out[0]["generated_text"].replace(" ", "")
    assert said.startswith("abcabc") and len(said) == 10
