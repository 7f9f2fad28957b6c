"""A memory as a file and as a repository on the Hub. Only safetensors and JSON are ever read."""

import hashlib
import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration.attention_memory import AttentionMemoryConfig
from .fingerprint import difference


WEIGHTS = "memory.safetensors"
DESCRIPTION = "memory.json"
FORMAT_VERSION = 2
# Those before, which are read too. Format 1 has one sample of weights for all adapters of a model.
EARLIER_VERSIONS = (1,)
CODE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def save(tensors: dict[str, Tensor], description: dict[str, Any], folder: Path) -> None:
    """Write a memory's folder. Each file is written under a temporary name and renamed when it is complete.

    The description stands in the header of the safetensors file too, and that is what `load` believes: a folder between
    two renames still is a whole memory.

    Raises:
        OSError: when the disk is full or the place not writable; what was there before is as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a memory is saved as a folder. Name another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    description = {
        "format_version": FORMAT_VERSION,
        "memory": uuid.uuid4().hex,
        **description,
        "shapes": {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()},
    }
    description["checksum"] = checksum(tensors, description)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    made = False
    try:
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(held, scratch / WEIGHTS, metadata={"senri_hf": json.dumps(description)})
        (scratch / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(card(description), encoding="utf-8")
        made = not folder.exists()
        folder.mkdir(exist_ok=True)
        for name in (WEIGHTS, DESCRIPTION, "README.md"):
            (scratch / name).replace(folder / name)
    except SafetensorError as error:
        raise OSError(
            f"The memory could not be written to {folder}: {error}. What was there before is as it was"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def load(name_or_path: str | Path, **hub_kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a memory: its tensors, checked against their checksum, and its description.

    Args:
        name_or_path: A folder, or the name of a repository on the Hub.

    Raises:
        OSError: when there is none. ValueError: when it is damaged, of another format, or not a safetensors file.
    """
    path = locate(name_or_path, **hub_kwargs)
    try:
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}). Use an earlier copy of the memory"
        ) from error
    if "senri_hf" not in metadata:
        raise ValueError(
            f"{path} is no memory: its header does not describe one. Expected what memory.save_pretrained wrote"
        )
    damaged = ValueError(
        f"{path} is damaged: its contents do not match their checksum. Use an earlier copy of the memory"
    )
    try:
        description = json.loads(metadata["senri_hf"])
    except ValueError as error:
        raise damaged from error
    if not isinstance(description, dict):
        raise damaged
    if description.get("format_version") not in (FORMAT_VERSION, *EARLIER_VERSIONS):
        raise ValueError(
            f"{path} has memory format {description.get('format_version')!r}, but this version of senri_hf reads "
            f"{FORMAT_VERSION} and earlier. Install the version that wrote it, or save the memory again with this one"
        )
    if description.get("checksum") != checksum(tensors, description):
        raise damaged
    return tensors, description


def attention_settings(description: dict[str, Any]) -> AttentionMemoryConfig | None:
    """The settings of a file's memory without training, None where it has none; ValueError where they are none."""
    settings = description.get("attention_memory")
    if settings is None and "attention_memory" not in description:
        return None
    if not isinstance(settings, dict):
        raise ValueError(
            f"The file is damaged: its attention_memory is {settings!r}, which are no settings. Use an earlier copy"
        )
    return AttentionMemoryConfig.of(settings)


def locate(name_or_path: str | Path, **hub_kwargs: Any) -> Path:
    """The safetensors file of a folder, or of a repository on the Hub."""
    folder = Path(name_or_path)
    if folder.is_dir():
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
        code = sorted(f.name for f in folder.iterdir() if f.suffix in CODE_SUFFIXES)
        hint = f" {', '.join(code)} can run code when it is read and is never opened." if code else ""
        raise OSError(f"{folder} has no {WEIGHTS}.{hint} A memory is a folder that memory.save_pretrained wrote")
    if folder.is_file():
        raise OSError(f"{folder} is a file, but a memory is a folder with {WEIGHTS} in it; only that is ever read")
    try:
        return Path(hf_hub_download(str(name_or_path), WEIGHTS, **hub_kwargs))
    except Exception as error:
        raise OSError(
            f"There is no memory at {name_or_path!r}: it is no folder here, and the Hub gave none ({error}). Expected "
            "a folder that memory.save_pretrained wrote, or the name of such a repository"
        ) from error


def push(
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Upload a memory as a repository of its own; returns the commit's address."""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "memory"
        save(tensors, description, folder)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, revision=revision, commit_message=commit_message
        )
    return str(commit)


def check_fits(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """ValueError naming what differs when a memory was made by another model or with another adapter.

    Only what the memory holds something of counts: adapters that are in one of the models alone may be any.
    """
    names = adapter_names({place_of(name)[0] for name in theirs["shapes"]}, {layer[0] for layer in ours["layers"]})
    model, mine = theirs["model"], ours["model"]
    weights = model.get("memory_weights", {})
    if theirs["format_version"] == 1:
        merged = {key: values for sample in mine.get("memory_weights", {}).values() for key, values in sample.items()}
        model, mine = {**model, "memory_weights": {"": weights}}, {**mine, "memory_weights": {"": merged}}
    else:
        weights = {names[adapter]: sample for adapter, sample in weights.items() if adapter in names}
        model = {**model, "memory_weights": weights}
    found = difference(model, mine)
    if found is not None:
        raise ValueError(f"The memory does not fit this model: {found}. Load it with the model that wrote it")
    expected = {(layer[0], layer[1]): rules for layer, rules in zip(ours["layers"], ours["rules"], strict=True)}
    for layer, rules in zip(theirs["layers"], theirs.get("rules", []), strict=False):
        writes = expected.get((names.get(layer[0]), layer[1]))
        if rules and writes is not None and rules != writes:  # none: an empty layer, or a file that does not say
            raise ValueError(
                f"The memory does not fit this model: layer {layer[1]} of it was written by {rules}, but this model "
                f"writes by {writes}. Load it with the model that wrote it"
            )


def place_of(name: str) -> tuple[str, str, str]:
    """Adapter, layer and field of a memory's tensor, of which its name is made."""
    place, _, field = name.rpartition(".")
    adapter, _, layer_idx = place.rpartition(".")
    return adapter, layer_idx, field


def adapter_names(theirs: set[str], ours: set[str]) -> dict[str, str]:
    """By what name this model knows the adapters of a memory: where there is one on either side, whatever it is called
    there, and by the same name otherwise.
    """
    return dict(zip(theirs, ours, strict=True)) if len(theirs) == len(ours) == 1 else {name: name for name in theirs}


def checksum(tensors: dict[str, Tensor], description: dict[str, Any]) -> str:
    """SHA-256 over what the description says but its own checksum, and over names, dtypes, shapes and bytes."""
    said = {key: value for key, value in description.items() if key != "checksum"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def short(weights: dict[str, list[float]]) -> str:
    """What a person can compare two samples of weights by; the same weights in another dtype have another one."""
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:12]


def card(description: dict[str, Any]) -> str:
    """The README of a memory."""
    model = description["model"]
    name = model.get("name_or_path") or model["architecture"]
    layers = ", ".join(f"{index} ({adapter})" for adapter, index, _ in description["layers"])
    prints = [("the model", short(model.get("weights", {})))]
    prints += [(f"`{name}` in it", short(sample)) for name, sample in model.get("memory_weights", {}).items()]
    fingerprints = "\n".join(f"| fingerprint of {what} | `{value}` |" for what, value in prints)
    size = sum(
        torch.empty(0, dtype=getattr(torch, dtype)).element_size() * int(torch.Size(shape).numel())
        for dtype, *shape in description["shapes"].values()
    )
    adapters = {adapter for adapter, _, _ in description["layers"]} - {"attention", "model"}
    settings = description.get("attention_memory")
    kept = "" if settings is None else f"| kept without training | {settings['slots']} slots, {settings['policy']} |\n"
    imports = "\nfrom peft import PeftModel" if adapters else ""
    loading = '\nmodel = PeftModel.from_pretrained(model, "the adapter that it was made with")' if adapters else ""
    who = f"`{name}` model{' with a memory adapter' if adapters else ''}"
    return f"""---
library_name: senri_hf
tags: [memory, senri_hf]
---

# A memory

What a {who} remembers, as data: no weights of the model are in it.

| | |
|---|---|
| model | `{name}`, {model["num_hidden_layers"]} layers of {model["hidden_size"]} |
{fingerprints}
| memory layers, and whose they are | {layers} |
{kept}| rows | {len(description["tokens_seen"])} |
| tokens seen, per row | {description["tokens_seen"]} |
| bytes | {size:,} |
| format version | {description["format_version"]} |
| id | `{description["memory"]}`{f", continued from `{description['parent']}`" if description["parent"] else ""} |

A memory can hold what people said. Treat it like the conversations it comes from.

```python
import senri_hf{imports}

model, tokenizer = senri_hf.load_base("{name}"){loading}
memory = senri_hf.MemoryCache.from_pretrained("this folder", model=model)
model.generate(**inputs, past_key_values=memory)
```
"""
