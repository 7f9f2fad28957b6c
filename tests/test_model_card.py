"""A model with memory built in writes its card, and that is what goes to the Hub."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from models import BuiltIn
from transformers import AutoModelForCausalLM

from senri_hf import SenriForSequenceClassification
from senri_hf.modeling import card


def senri() -> Any:
    return BuiltIn("senri", "built_in", "slots").fresh()


def test_a_saved_model_has_a_card_that_says_what_it_is(tmp_path: Path) -> None:
    model = senri()
    made_with = {"license": "mit", "training_data": "Manuals.", "settings": {"steps": 7}, "results": {"loss": 2.71828}}
    model.save_pretrained(tmp_path, card=made_with)
    text = (tmp_path / "README.md").read_text()
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.license == "mit" and {"senri_hf", "memory", "senri"} <= set(loaded.data.tags)
    for part in (
        "| layers | 2 full_attention, 1 senri_memory |",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        # 3 slots of 4 heads of 8: matrix and normaliser, in float32
        f"| bytes of memory a row | {3 * 4 * (8 * 8 + 8) * 4:,}, however long the text is |",
        "## Memory of layer 2",
        "| `num_memories` | `3` |",
        "Manuals.",
        "| `steps` | `7` |",
        "| loss | 2.718 |",
        'AutoModelForCausalLM.from_pretrained("',
    ):
        assert part in text, part
    assert text.index("import senri_hf") < text.index("AutoModelForCausalLM")
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_card_that_a_person_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine.")
    senri().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


def test_the_card_names_the_class_that_loads_it(tmp_path: Path) -> None:
    classifier = SenriForSequenceClassification(senri().config)
    assert "AutoModelForSequenceClassification.from_pretrained" in card.model_card(classifier)
    assert "AutoModel.from_pretrained" in card.model_card(senri().model)


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_has_our_card(through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the empty one that transformers would put in its place."""
    uploads: list[dict[str, Any]] = []

    class Hub:
        def __init__(self, token: Any = None) -> None:
            uploads.append({"token": token})

        def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
            uploads[-1].update(kwargs)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Any, **kwargs: Any) -> str:
            files = sorted(path.name for path in Path(folder_path).iterdir())
            uploads[-1].update(kwargs, files=files, card=(Path(folder_path) / "README.md").read_text())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(card, "HfApi", Hub)
    if through == "push_to_hub":
        assert senri().push_to_hub("m", private=True, token="t", card={"license": "mit"}) == "https://hub/someone/m"
    else:
        senri().save_pretrained(tmp_path / "m", push_to_hub=True, private=True, token="t", card={"license": "mit"})
        assert (tmp_path / "m" / "config.json").is_file()
    (upload,) = uploads
    assert upload["token"] == "t" and upload["private"] is True
    assert {"config.json", "model.safetensors", "README.md"} <= set(upload["files"])
    assert "| license | mit |" in upload["card"]
