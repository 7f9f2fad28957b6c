"""A model writes its card, and that is what goes to the Hub."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import BuiltIn, tiny_model
from transformers import AutoModelForCausalLM

import senri_hf
from senri_hf import (
    SenriForSequenceClassification,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    SymbolicTransformerConfig,
    SymbolicTransformerForCausalLM,
)
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


def autoencoder(**settings: Any) -> SparseAutoencoder:
    return SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, k=3, skip_positions=1, **settings))


def symbolic() -> Any:
    sizes = {"vocab_size": 5, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 12}
    return SymbolicTransformerForCausalLM(SymbolicTransformerConfig(**sizes, use_mlp=False))


def code(text: str) -> str:
    """The Python that a card shows."""
    return text.split("```python\n")[1].split("```")[0]


def test_an_autoencoders_card_says_what_it_is_of_and_how_to_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = autoencoder(model_name="smollm2-135m-instruct", hook_name="model.layers.1")
    sae.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert {"senri_hf", "sparse-autoencoder", "sparse_autoencoder"} <= set(ModelCard(text).data.tags)
    for part in (
        "| of the model | `smollm2-135m-instruct` |",
        "| of the module | `model.layers.1` |",
        "| variant | batchtopk |",
        "| active latents (k) | 3 |",
        "| width of the activations | 8 |",
        "| latents | 16 |",
    ):
        assert part in text, part
    # What it says is what runs.
    ids = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    base = tiny_model("llama", hidden_size=8), lambda text, return_tensors: ids
    monkeypatch.setattr(senri_hf, "load_base", lambda name: base if name == "smollm2-135m-instruct" else None)
    found: dict[str, Any] = {}
    exec(code(text).replace("this folder or repository", str(tmp_path)), found)
    assert found["latents"].shape == (3, 16) and found["directions"].shape == (16, 8)
    unknown = card.model_card(autoencoder(variant="relu", model_name=str(tmp_path / "someone")))
    assert "| of the model | `someone` |" in unknown and "of the module" not in unknown and "(k)" not in unknown


def test_a_symbolic_transformers_card_says_what_it_is_and_how_to_look_into_it(tmp_path: Path) -> None:
    model = symbolic()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("| layers | 2, without MLP |", "| symbols | 5 |", "| positions | 12 |", "| heads | 2 |"):
        assert part in text, part
    found: dict[str, Any] = {"input_ids": torch.tensor([[0, 1, 2]])}
    exec(code(text).replace("this folder or repository", str(tmp_path)), found)
    assert found["activations"].shape == (3, 16)
    assert "AutoModel.from_pretrained" in card.model_card(model.model)


@pytest.mark.parametrize("make", [senri, symbolic, autoencoder])
@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_has_our_card(
    through: str, make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert make().push_to_hub("m", private=True, token="t", card={"license": "mit"}) == "https://hub/someone/m"
    else:
        make().save_pretrained(tmp_path / "m", push_to_hub=True, private=True, token="t", card={"license": "mit"})
        assert (tmp_path / "m" / "config.json").is_file()
    (upload,) = uploads
    assert upload["token"] == "t" and upload["private"] is True
    assert {"config.json", "model.safetensors", "README.md"} <= set(upload["files"])
    assert "| license | mit |" in upload["card"]
