"""A memory adapter as a folder and as a repository on the Hub, with a card of its own.

PEFT's own card would not say that `import senri_hf` has to come before an adapter is loaded.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel

from ..bases import KNOWN_BASES
from ..files import write_text
from ..memory.fingerprint import public_name
from .config import MemoryAdapterConfig


README = "README.md"


def save_adapter(
    peft_model: PeftModel,
    folder: str | Path,
    *,
    license: str | None = None,
    training_data: str | None = None,
    results: Mapping[str, float] | None = None,
    **kwargs: Any,
) -> None:
    """Save all adapters of a model, as `peft_model.save_pretrained(folder)` does, with cards that say how to load them.

    Args:
        folder: Where the adapter named `default` goes; one of another name goes into a folder of its name inside.
        license, training_data, results: See `adapter_card`.
        kwargs: More arguments of `save_pretrained`.

    Raises:
        ValueError: when none of the adapters that are saved is a memory adapter.
    """
    chosen = kwargs.get("selected_adapters") or list(peft_model.peft_config)
    configs = {name: peft_model.peft_config[name] for name in chosen if name in peft_model.peft_config}
    memories = {name: config for name, config in configs.items() if isinstance(config, MemoryAdapterConfig)}
    if not memories:
        raise ValueError(
            f"The adapters {sorted(configs)} hold no memory: save them with peft_model.save_pretrained(folder)"
        )
    peft_model.save_pretrained(str(folder), **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    loras = [name for name, config in configs.items() if isinstance(config, LoraConfig)]
    cards = {
        name: adapter_card(
            config,
            name=name,
            trainable_parameters=count_parameters(peft_model, name),
            license=license,
            training_data=training_data,
            results=results,
            loras=loras,
        )
        for name, config in memories.items()
    }
    for name, card in cards.items():
        write_text(Path(folder) / ("" if name == "default" else name) / README, card)
    if "default" not in cards:
        # PEFT put its own card there.
        write_text(Path(folder) / README, next(iter(cards.values())))


def push_to_hub(
    peft_model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload memory adapter",
    **card: Any,
) -> str:
    """Upload the adapters of a model, as `save_adapter` saves them, as a repository on the Hub.

    Args:
        card: `license`, `training_data` and `results`, as for `adapter_card`.

    Returns:
        The commit's address.

    Raises:
        ValueError: when the model has no memory adapter.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(peft_model, folder, **card)
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit)


def adapter_card(
    config: MemoryAdapterConfig,
    *,
    name: str = "default",
    trainable_parameters: int | None = None,
    license: str | None = None,
    training_data: str | None = None,
    results: Mapping[str, float] | None = None,
    loras: Sequence[str] = (),
) -> str:
    """The README of a memory adapter: what it is, how it is loaded, and what it was made with.

    Args:
        name: The adapter's name; one that is not `default` lies in a folder of its name.
        trainable_parameters: How many parameters the adapter has.
        license: Name of its license, as the Hub spells them.
        training_data: What it was trained on, in a sentence or more.
        results: Measured values by name.
        loras: Names of LoRA adapters that are saved beside it.
    """
    base = base_name(config)
    known = KNOWN_BASES.get(base)
    hub_id = known.hub_id if known is not None else base
    metadata: dict[str, Any] = {"library_name": "peft", "tags": ["peft", "senri_hf", "memory"]}
    if hub_id.count("/") == 1:
        metadata = {"base_model": hub_id, **metadata}
    if license is not None:
        metadata["license"] = license
    # JSON is YAML, and quotes whatever needs it.
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    layers = config.layers_to_transform
    rows = {
        "base model": f"`{base or 'not recorded'}`",
        "mechanism": config.mechanism,
        "decoder layers with a memory": "chosen when it is added" if layers is None else str(layers),
        "trainable parameters": None if trainable_parameters is None else f"{trainable_parameters:,}",
        "license": license,
    }
    facts = "\n".join(f"| {what} | {value} |" for what, value in rows.items() if value is not None)
    settings = "\n".join(f"| `{f.name}` | `{getattr(config, f.name)!r}` |" for f in mechanism_fields(config))
    subfolder = "" if name == "default" else f', subfolder="{name}"'
    lora = "".join(f'senri_hf.adapters.load_lora(model, "{here(name)}/{lora}", "{lora}")\n' for lora in loras)
    parts = [
        f"""---
{header}
---

# A memory adapter

It gives `{base or "its base model"}` a memory that outlives the context window: what was said in one conversation is
there in the next ones. The base model's weights are not in here and stay as they are.

| | |
|---|---|
{facts}

## How to load it

`import senri_hf` comes first: it makes PEFT know this kind of adapter.

```python
import senri_hf
from peft import PeftModel

base, tokenizer = senri_hf.load_base("{base or "the base model"}")
model = PeftModel.from_pretrained(base, "{here(name)}"{subfolder})
{lora}memory = senri_hf.MemoryCache.for_model(model)

inputs = tokenizer("My name is Alice.", return_tensors="pt")
model.generate(**inputs, past_key_values=memory)
memory.clear_context()  # the conversation is gone, the memory stays
```

## Settings

| | |
|---|---|
{settings}
"""
    ]
    if training_data is not None:
        parts.append(f"## Training data\n\n{training_data}\n")
    if results is not None:
        values = "\n".join(f"| {what} | {value:.4g} |" for what, value in results.items())
        parts.append(f"## Results\n\n| | |\n|---|---|\n{values}\n")
    return "\n".join(parts)


def mechanism_fields(config: MemoryAdapterConfig) -> list[Field[Any]]:
    """The settings of a config's mechanism: those that not every memory adapter has."""
    shared = {f.name for f in fields(MemoryAdapterConfig)}
    return [f for f in fields(config) if f.name not in shared]


def here(name: str) -> str:
    """What stands in a card for the place of its folder."""
    return "this folder or repository" if name == "default" else "the folder or repository above this one"


def base_name(config: MemoryAdapterConfig) -> str:
    """The base model's name; of a folder only its last part, as paths are nobody else's."""
    return public_name(config.base_model_name_or_path or "")


def count_parameters(peft_model: PeftModel, adapter_name: str) -> int:
    """Parameters of one adapter, all of which are trained."""
    marked = f".{adapter_name}."
    return sum(
        parameter.numel() for name, parameter in peft_model.named_parameters() if ".senri_block" + marked in name
    )
