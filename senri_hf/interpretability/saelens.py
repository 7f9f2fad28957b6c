"""Sparse autoencoders in SAELens' file format, both ways (its version 6; `cfg.json` and `sae_weights.safetensors`)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..configuration.sparse_autoencoder import SparseAutoencoderConfig
from ..files import whole, write_json
from .sparse_autoencoder import SparseAutoencoder


CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
# From this version on SAELens reads names of modules from `metadata`; before, it drops ours.
FORMAT_VERSION = "6.0.0"
# SAELens has no batchtopk at inference: it is a jumprelu with one threshold, as in SAELens' own export.
ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu", "gated": "gated"}
VARIANTS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
NAMES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}


@torch.no_grad()
def export_saelens(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write an autoencoder so that `sae_lens.SAE.load_from_disk(folder)` gives the same latents and reconstructions.

    The activation scale goes into the weights: latents stay as they are, rows of `W_dec` get its inverse as norm.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = ARCHITECTURES[sae.config.variant]
    scale = sae.activation_scale
    tensors = {"W_enc": sae.W_enc * scale, "W_dec": sae.W_dec / scale, "b_dec": sae.b_dec / scale}
    for name in NAMES[architecture]:
        tensors[name] = getattr(sae, name).expand(sae.W_dec.shape[0])
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.config.d_in,
        "d_sae": sae.W_dec.shape[0],
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "sae_lens_training_version": None,
            "model_name": sae.config.model_name,
            "hook_name": sae.config.hook_name,
            "senri_hf": {"variant": sae.config.variant, "k": sae.config.k, "skip_positions": sae.config.skip_positions},
        },
    }
    if architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    with whole(folder / WEIGHTS_FILE) as scratch:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, scratch)
    write_json(folder / CONFIG_FILE, config)
    return folder


@torch.no_grad()
def import_saelens(folder: str | Path) -> SparseAutoencoder:
    """Read an autoencoder that SAELens, or `export_saelens`, wrote; latents are as strong as they are there.

    Its activation scale is what gives rows of `W_dec` a mean norm of 1; the norms of SAELens' own rows can differ.

    Raises:
        ValueError: when it is damaged, or of a kind that has no counterpart here, naming what.
        OSError: when there is none.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    architecture, metadata = config.get("architecture"), config.get("metadata") or {}
    if architecture not in VARIANTS:
        raise ValueError(f"{folder} has architecture={architecture!r}; known ones are {sorted(VARIANTS)}")
    for name, known in (("normalize_activations", ("none",)), ("reshape_activations", ("none",))):
        if config.get(name, "none") not in known:
            raise ValueError(f"{folder} has {name}={config[name]!r}, which has no counterpart here")
    for name in ("d_in", "d_sae"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"{folder / CONFIG_FILE} is damaged: {name} is {config.get(name)!r}")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from error
    check_tensors(folder, architecture, config, tensors)
    ours = metadata.get("senri_hf") or {}
    k = config.get("k", ours.get("k"))
    if architecture == "topk" and not isinstance(k, int):
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: k is {k!r}")
    sae = SparseAutoencoder(
        SparseAutoencoderConfig(
            d_in=config["d_in"],
            d_sae=config["d_sae"],
            variant=VARIANTS[architecture],
            **({} if k is None else {"k": k}),
            model_name=metadata.get("model_name"),
            hook_name=metadata.get("hook_name"),
            skip_positions=int(ours.get("skip_positions") or 0),
        )
    )
    torch.nn.Module.to(sae, tensors["W_enc"].dtype)
    norms = tensors["W_dec"].norm(dim=-1)
    rescaled = architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm"))
    if rescaled:  # latents are multiples of unit directions there
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    if not config.get("apply_b_dec_to_input", True):  # what is subtracted here was not there
        shift = tensors["b_dec"] @ tensors["W_enc"]
        for name in ("b_enc", "b_gate"):
            if name in tensors:
                tensors[name] = tensors[name] + shift
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"] + shift * tensors["r_mag"].exp()
    size = tensors["W_dec"].norm(dim=-1).mean()
    scale = torch.where(size > 0, 1 / size, 1.0)
    tensors |= {name: tensors[name] * scale for name in ("W_dec", "b_dec")} | {"W_enc": tensors["W_enc"] / scale}
    for name, tensor in tensors.items():
        getattr(sae, name).copy_(tensor)
    sae.activation_scale.copy_(scale)
    return sae.eval()


def check_tensors(folder: Path, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError naming what in the weights does not fit their config."""
    d_in, d_sae = config["d_in"], config["d_sae"]
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    expected |= {name: [d_sae] for name in NAMES[architecture]}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{folder / WEIGHTS_FILE} holds {found}, but its config wants {expected}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {name} holds NaN or infinity")
