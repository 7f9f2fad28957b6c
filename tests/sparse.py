"""Activations with known directions, and an autoencoder of tiny models, for tests."""

from typing import Any

import torch
from torch import Tensor

from senri_hf import SparseAutoencoder, SparseAutoencoderConfig


DIRECTIONS = torch.nn.functional.normalize(torch.randn(12, 16, generator=torch.Generator().manual_seed(5)), dim=-1)


def sparse_data(rows: int, seed: int) -> Tensor:
    """Sums of three of twelve directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, 12, generator=generator).topk(3).indices
    size = 1 + torch.rand(rows, 3, generator=generator)
    return (torch.zeros(rows, 12).scatter(1, chosen, size) @ DIRECTIONS) * 7 + 3


def autoencoder(d_in: int = 32, seed: int = 0, **settings: Any) -> SparseAutoencoder:
    """An autoencoder that explains only part of its activations, all latents of which can be active."""
    torch.manual_seed(seed)
    config = SparseAutoencoderConfig(d_in=d_in, d_sae=48, variant="relu", **settings)
    sae = SparseAutoencoder(config).eval()
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn_like(sae.W_enc))
        sae.activation_scale.fill_(1.3)
    return sae


class Letters:
    """A tokenizer whose every id is a letter of its own."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids: Any) -> str:
        return "".join(chr(0x4E00 + int(index)) for index in ids)
