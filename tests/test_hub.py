"""A memory adapter's folder explains itself, and is what goes to the Hub."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import MEMORY_LAYERS, SMALL, assert_identical_memory, perturb, remembering, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import senri_hf
from senri_hf import EpisodicConfig, MemoryAdapterConfig, MemoryCache
from senri_hf.adapters import adapter_card, hub, push_to_hub, save_adapter
from senri_hf.memory import file


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Callable[[], PreTrainedModel]:
    """Makes base models that bear a known name, of which PEFT needs no file."""

    def make() -> PreTrainedModel:
        model = tiny_model("llama")
        model.name_or_path = model.config._name_or_path = "smollm2-135m-instruct"
        return model

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **kwargs: False)
    return make


def config(**changes: Any) -> MemoryAdapterConfig:
    return MemoryAdapterConfig(**{"layers_to_transform": MEMORY_LAYERS, **SMALL["episodic"], **changes})


def test_a_saved_adapter_has_our_card(base: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = perturb(get_peft_model(base(), config()))
    save_adapter(model, tmp_path, license="mit", training_data="Ten conversations.", results={"exact answers": 0.91234})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.library_name == "peft"
    assert {"peft", "senri_hf"} <= set(card.data.tags)
    assert card.data.license == "mit"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for part in (
        "import senri_hf\n",
        'senri_hf.load_base("smollm2-135m-instruct")',
        "PeftModel.from_pretrained(base, ",
        "MemoryCache.for_model(model)",
        "| mechanism | episodic |",
        f"| decoder layers with a memory | {MEMORY_LAYERS} |",
        f"| trainable parameters | {trained:,} |",
        "| `buffer_slots` | `12` |",
        "Ten conversations.",
        "| exact answers | 0.9123 |",
    ):
        assert part in card.text
    assert card.text.index("import senri_hf") < card.text.index("PeftModel.from_pretrained")
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_card_tells_every_setting_and_nothing_it_does_not_know() -> None:
    card = adapter_card(config())
    assert all(f"| `{name}` |" in card for name in EpisodicConfig.__dataclass_fields__)
    for part in ("base_model:", "license", "Training data", "Results", "None, None", "load_lora"):
        assert part not in card


@pytest.mark.parametrize("name", ["/home/someone/secret/llama", "."])
def test_a_path_is_not_published(name: str) -> None:
    card = adapter_card(config(base_model_name_or_path=name))
    assert "secret" not in card
    assert "base_model:" not in card


def test_a_hub_id_is_the_base_model() -> None:
    card = ModelCard(adapter_card(config(base_model_name_or_path="someone/some-llama")))
    assert card.data.base_model == "someone/some-llama"
    assert 'load_base("someone/some-llama")' in card.text


@pytest.mark.parametrize("value", ["a: b", 'say "hello"', "line\nbreak", "# no comment", "no"])
def test_a_cards_header_quotes_what_needs_it(value: str) -> None:
    assert ModelCard(adapter_card(config(), license=value)).data.license == value


def test_every_adapter_of_a_model_gets_its_card(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), config(), adapter_name="work")
    model.add_adapter("home", config(buffer_slots=20))
    senri_hf.add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]), "style")
    save_adapter(model, tmp_path)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("", "work", "home")}
    assert cards[""] == cards["work"]
    assert "| `buffer_slots` | `20` |" in cards["home"] and "| `buffer_slots` | `12` |" in cards["work"]
    assert all('"style")' in card and "load_lora" in card for card in cards.values())
    assert 'subfolder="home"' in cards["home"]
    save_adapter(model, tmp_path / "one", selected_adapters=["home"])
    assert not (tmp_path / "one" / "work").exists()


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"\['default'\] hold no memory"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub:
    """Stands in for the Hub's client and keeps what it was given last."""

    def __init__(self, token: str | bool | None = None) -> None:
        self.token = token
        Hub.made: Any = self

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        self.repo = {"repo_id": repo_id, **kwargs}
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def upload_folder(self, folder_path: str, **kwargs: Any) -> str:
        self.upload = kwargs
        self.files = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }
        return "https://example.org/commit/1"


def test_the_folder_is_what_is_uploaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    model = get_peft_model(tiny_model("llama"), config())
    address = push_to_hub(model, "memory", private=True, token="t", revision="next", license="mit")
    assert address == "https://example.org/commit/1"
    assert Hub.made.token == "t"
    assert Hub.made.repo == {"repo_id": "memory", "private": True, "exist_ok": True}
    assert Hub.made.upload == {
        "repo_id": "someone/memory",
        "revision": "next",
        "commit_message": "Upload memory adapter",
    }
    save_adapter(model, tmp_path, license="mit")
    assert Hub.made.files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(Hub.made.files["adapter_config.json"])["peft_type"] == "SENRI"


@pytest.fixture
def model() -> PeftModel:
    """A model with an adapter that has a name of its own."""
    return perturb(get_peft_model(tiny_model("llama"), config(), adapter_name="friend").eval())


def test_a_memory_is_uploaded_as_it_is_saved(model: PeftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file, "HfApi", Hub)
    memory = remembering(model, rows=2)
    address = memory.push_to_hub("alice", private=True, token="t", revision="next", commit_message="Met Alice")
    assert address == "https://example.org/commit/1"
    assert Hub.made.token == "t"
    assert Hub.made.repo == {"repo_id": "alice", "private": True, "exist_ok": True}
    assert Hub.made.upload == {"repo_id": "someone/alice", "revision": "next", "commit_message": "Met Alice"}
    assert set(Hub.made.files) == {file.WEIGHTS, file.DESCRIPTION, "README.md"}
    for name, contents in Hub.made.files.items():
        (tmp_path / name).write_bytes(contents)
    loaded = MemoryCache.from_pretrained(tmp_path, model=model)
    assert_identical_memory(loaded.state_dict(), memory.state_dict())


@pytest.mark.parametrize("named", [{}, {"repo_id": "someone/other"}], ids=["by its folder", "by name"])
def test_a_memory_is_saved_and_uploaded(
    model: PeftModel, named: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file, "HfApi", Hub)
    memory = remembering(model)
    memory.save_pretrained(tmp_path / "alice", push_to_hub=True, token="t", **named)
    assert Hub.made.token == "t"
    assert Hub.made.repo["repo_id"] == named.get("repo_id", "alice")
    assert set(Hub.made.files) == {path.name for path in (tmp_path / "alice").iterdir()}
    loaded = MemoryCache.from_pretrained(tmp_path / "alice", model=model)
    assert_identical_memory(loaded.state_dict(), memory.state_dict())


def test_a_memory_comes_from_the_hub(model: PeftModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of its repository only the safetensors file is asked for."""
    memory = remembering(model)
    memory.save_pretrained(tmp_path)
    asked = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        return str(tmp_path / file.WEIGHTS)

    monkeypatch.setattr(file, "hf_hub_download", download)
    loaded = MemoryCache.from_pretrained("someone/alice", model=model, revision="next", token="t")
    assert asked == [(("someone/alice", file.WEIGHTS), {"revision": "next", "token": "t"})]
    assert_identical_memory(loaded.state_dict(), memory.state_dict())


def test_a_memorys_card_says_what_made_it(model: PeftModel, tmp_path: Path) -> None:
    """Model and adapter, each with a fingerprint that another one has not."""
    remembering(model).save_pretrained(tmp_path / "one")
    other = perturb(copy.deepcopy(model), seed=5)
    remembering(other).save_pretrained(tmp_path / "two")
    cards = [(tmp_path / name / "README.md").read_text() for name in ("one", "two")]
    found = [dict(re.findall(r"\| fingerprint of (.*) \| `(\w{12})` \|", card)) for card in cards]
    assert set(found[0]) == {"the model", "`friend` in it"}
    assert found[0]["the model"] == found[1]["the model"]
    assert found[0]["`friend` in it"] != found[1]["`friend` in it"]
    assert all("0 (friend), 2 (friend)" in card for card in cards)


def test_nothing_is_created_when_saving_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.made = None
    monkeypatch.setattr(hub, "HfApi", Hub)
    with pytest.raises(ValueError, match="hold no memory"):
        push_to_hub(get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])), "memory")
    assert Hub.made is None
