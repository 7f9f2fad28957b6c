"""Rows of a matrix in 8 or 4 bits a value: one absolute maximum a row, symmetric around zero."""

from typing import Any

import torch
from torch import Tensor


LARGEST = {8: 127, 4: 7}


def quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows [..., D].

    Returns:
        Codes: int8 [..., D] for 8 bits; uint8 [..., ceil(D / 2)] for 4, two values a byte, the first in the low half.
        Scales: bfloat16 [..., 1]; a row is codes * scale.
    """
    scale = row_scale(rows, bits)
    codes = codes_of(rows, scale, bits).to(torch.int8)
    return (codes if bits == 8 else pack(codes)), scale


def dequantize(codes: Tensor, scale: Tensor, bits: int, width: int) -> Tensor:
    """The rows [..., width] that `quantize` encoded, float32."""
    values = codes if bits == 8 else unpack(codes)[..., :width]
    return values.float() * scale.float()


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass and is the identity in the backward pass (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bits: int) -> Tensor:
        scale = row_scale(rows, bits)
        return (codes_of(rows, scale, bits) * scale.float()).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(rows: Tensor, bits: int) -> Tensor:
    """Rows [..., D] as `dequantize(quantize(rows))` gives them; the gradient passes straight through."""
    quantized: Tensor = _StraightThrough.apply(rows, bits)  # type: ignore[no-untyped-call]
    return quantized


def row_scale(rows: Tensor, bits: int) -> Tensor:
    """The bfloat16 scale [..., 1] of every row; never zero, so that a row of zeros stays one."""
    largest = rows.detach().float().abs().amax(-1, keepdim=True) / LARGEST[bits]
    return largest.clamp(torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max).to(torch.bfloat16)


def codes_of(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whole numbers from -LARGEST to LARGEST, as float32."""
    return (rows.detach().float() / scale.float()).round().clamp(-LARGEST[bits], LARGEST[bits])


def pack(codes: Tensor) -> Tensor:
    """Two values of int8 codes [..., D] a byte, [..., ceil(D / 2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    halves = (codes.to(torch.int16) + 8).to(torch.uint8)
    return halves[..., ::2] | (halves[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The int8 codes [..., 2 * bytes] of packed bytes."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return halves.to(torch.int8) - 8
