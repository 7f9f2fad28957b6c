"""The card that a model writes beside its weights."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel

from ..files import write_text
from ..memory import CompressiveLayer, HeadGroupsLayer
from ..memory.fingerprint import public_name
from ..memory.owner import owners


README = "README.md"


@dataclass
class About:
    """What a card says of a model itself, beside how it was made.

    Attributes:
        text: What it is, in a sentence or more.
        facts: Sizes and the like by name; those that are None are left out.
        usage: Lines of Python that load it, after `import senri_hf`, and read or run it.
        tags: By which it is found, beside `senri_hf` and its model type.
        sections: Further parts of the card, as markdown.
    """

    text: str
    facts: Mapping[str, Any]
    usage: str
    tags: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()


class ModelWithCard(PreTrainedModel):
    """Base of models whose `save_pretrained` writes a card where there is none, and whose `push_to_hub` uploads it.

    transformers' own `push_to_hub` puts an empty card in the place of any other.
    """

    def about(self) -> About:
        """What the card says of this model."""
        raise NotImplementedError

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """As of every model, with a card. What it is to say of training is given as `card={…}`, see `model_card`."""
        card = kwargs.pop("card", None)
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        uploads = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in ("private", "revision", "commit_message") if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        place = Path(save_directory) / README
        if kwargs.get("is_main_process", True) and (card is not None or not place.exists()):
            write_text(place, model_card(self, **(card or {})))
        if uploads:
            self.push_to_hub(repo_id, token=kwargs.get("token"), card=card, **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload weights, config and card as a repository on the Hub; returns the commit's address.

        Args:
            kwargs: `private`, `token`, `revision`, `commit_message`, and as for `save_pretrained`.
        """
        private, token, revision = (kwargs.pop(name, None) for name in ("private", "token", "revision"))
        commit_message = kwargs.pop("commit_message", None) or "Upload model"
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            commit = api.upload_folder(
                repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit)


class ModelWithMemory(ModelWithCard):
    """Base of models with memory built in."""

    def about(self) -> About:
        loader = auto_class(self)
        sections = []
        for index, layer in enumerate(getattr(self.config, "layers", None) or []):
            # One memory, or a list of heads that each have their own settings.
            for head, settings_of_head in enumerate(layer if isinstance(layer, list) else [layer]):
                said = {f"`{key}`": f"`{value!r}`" for key, value in settings_of_head.items() if key != "type"}
                where = f"layer {index}, head {head}" if isinstance(layer, list) else f"layer {index}"
                if said:
                    sections.append(f"## Memory of {where}\n\n{table(said)}\n")
        return About(
            text="It has a memory that outlives the context window: what was read in one conversation is there in the "
            "next ones.",
            facts={
                "layers": ", ".join(layers_in_words(self.config.layer_types)),
                "hidden size": self.config.hidden_size,
                "vocabulary": f"{self.config.vocab_size:,}",
                "bytes of memory a row": f"{memory_bytes(self):,}, however long the text is",
            },
            usage=f"""from transformers import {loader}

model = {loader}.from_pretrained("this folder or repository")
memory = senri_hf.MemoryCache.for_model(model)

model(input_ids, past_key_values=memory)  # reads and writes
memory.clear_context()  # the conversation is gone, the memory stays""",
            tags=("memory",),
            sections=tuple(sections),
        )


def model_card(
    model: ModelWithCard,
    *,
    license: str | None = None,
    training_data: str | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Mapping[str, float] | None = None,
) -> str:
    """The README of a model: what it is, how it is loaded, and what it was made with.

    Args:
        license: Name of its license, as the Hub spells them.
        training_data: What it was trained on, in a sentence or more.
        settings: Of the training, by name.
        results: Measured values by name.
    """
    about = model.about()
    tags = ["senri_hf", *about.tags, model.config.model_type]
    metadata: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if license is not None:
        metadata["license"] = license
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())  # JSON is YAML
    count = sum(parameter.numel() for parameter in model.parameters())
    name = public_name(str(getattr(model.config, "_name_or_path", "") or ""))
    facts = {
        "class": f"`{type(model).__name__}`",
        "parameters": f"{count:,}",
        **about.facts,
        "started from": f"`{name}`" if name else None,
        "license": license,
    }
    parts = [
        f"""---
{header}
---

# A {model.config.model_type} model

{about.text}

{table(facts)}

## How to load it

`import senri_hf` (`pip install senri_hf`) comes first: it makes the Auto classes know this kind of model.

```python
import senri_hf
{about.usage}
```
""",
        *about.sections,
    ]
    if training_data is not None:
        parts.append(f"## Training data\n\n{training_data}\n")
    if settings is not None:
        parts.append(f"## Training\n\n{table({f'`{key}`': f'`{value!r}`' for key, value in settings.items()})}\n")
    if results is not None:
        parts.append(f"## Results\n\n{table({key: f'{value:.4g}' for key, value in results.items()})}\n")
    return "\n".join(parts)


def auto_class(model: PreTrainedModel) -> str:
    """The Auto class that loads a model."""
    auto = {"ForCausalLM": "AutoModelForCausalLM", "ForSequenceClassification": "AutoModelForSequenceClassification"}
    return next((ours for kind, ours in auto.items() if type(model).__name__.endswith(kind)), "AutoModel")


def table(rows: Mapping[str, Any]) -> str:
    """A table of two columns, without the rows that are None."""
    lines = (f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return "\n".join(["| | |", "|---|---|", *lines])


def layers_in_words(types: list[str] | None) -> list[str]:
    """Runs of equal layers, as `1 senri_memory, 5 full_attention`."""
    runs: list[tuple[int, str]] = []
    for kind in types or []:
        count = runs.pop()[0] if runs and runs[-1][1] == kind else 0
        runs.append((count + 1, kind))
    return [f"{count} {kind}" for count, kind in runs]


def memory_bytes(model: nn.Module) -> int:
    """Bytes of one row's memory, where it is of a size that the config says."""
    layers = [layer for owner in owners(model) for layer in owner.memory_layers()]
    return sum(layer.nbytes_per_row for layer in layers if isinstance(layer, (CompressiveLayer, HeadGroupsLayer)))
