"""How a layer's keys carry their position, and how they are moved to another one.

A rotary position embedding turns pairs of channels by an angle proportional to the position (Su et al. 2021, eq. 34).
Turning by a difference of positions moves a key. The angles come from the model's own rotary module, so that partial,
scaled and per-layer-type forms are the model's; how channels are paired is found by looking at keys at two places.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class KeyLayout:
    """What one cache layer holds for a token.

    Attributes:
        heads, key_size, value_size: Keys are [heads, key_size] and values [heads, value_size] per token.
        rotated: Channels of a key that a rotary embedding turns; 0 for keys without a position.
        interleaved: Whether neighbouring channels form a pair; else a channel and the one half of `rotated` further on.
        angles_in_halves: Whether the rotary module, where it gives every angle twice, gives all of them and then all
            again; else each twice in succession.
        at_end: Whether the turned channels are the last of a key; else the first.
        layer_type: The rotary module's name for the layer's kind, where it has several.
    """

    heads: int
    key_size: int
    value_size: int
    rotated: int = 0
    interleaved: bool = False
    angles_in_halves: bool = True
    at_end: bool = False
    layer_type: str | None = None

    def rotate(self, keys: Tensor, positions: Tensor, rotary: nn.Module | None) -> Tensor:
        """Keys [B, H, N, d], moved by `positions` [B, N] or [N]; the arithmetic is in float32."""
        if not self.rotated or rotary is None:
            return keys
        cosine, sine = angles(rotary, positions, self.layer_type, self.rotated // 2, self.angles_in_halves)
        if positions.dim() == 2:
            cosine, sine = cosine[:, None], sine[:, None]
        start = self.key_size - self.rotated if self.at_end else 0
        turned = keys[..., start : start + self.rotated].float()
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
        rest = keys[..., :start], keys[..., start + self.rotated :]
        return torch.cat([rest[0], turned.to(keys.dtype), rest[1]], dim=-1)


def angles(
    rotary: nn.Module, positions: Tensor, layer_type: str | None, pairs: int, in_halves: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of `positions` [...], each [..., pairs], without the scale of some embeddings."""
    flat = positions.reshape(1, -1)
    example = torch.zeros(1, device=positions.device)
    given: Any = rotary(example, flat) if layer_type is None else rotary(example, flat, layer_type)
    cosine, sine = (part[0].float() for part in given)
    if cosine.shape[-1] == 2 * pairs:  # every angle stands there twice
        cosine, sine = (part[..., :pairs] if in_halves else part[..., ::2] for part in (cosine, sine))
    size = (cosine.square() + sine.square()).sqrt()
    return tuple((part / size).unflatten(0, positions.shape) for part in (cosine, sine))  # type: ignore[return-value]


def find_layout(
    here: tuple[Tensor, Tensor],
    there: tuple[Tensor, Tensor],
    distance: int,
    rotary: nn.Module | None,
    layer_types: Sequence[str | None],
    tolerance: float,
) -> KeyLayout | None:
    """The layout under which the keys of the same tokens at two places are the same.

    Args:
        here, there: Keys and values [1, H, N, d] of one layer, the second read `distance` positions further on.
        layer_types: Names under which the rotary module may know the layer.
        tolerance: Largest difference, relative to the largest key.

    Returns:
        None when there is none, or when the values differ too: positions reach the layer in another way.
    """
    keys, values = here
    plain = KeyLayout(keys.shape[1], keys.shape[-1], values.shape[-1])
    if not close(values, there[1], tolerance):
        return None
    if close(keys, there[0], tolerance):
        return plain
    if rotary is None:
        return None
    moved = torch.full((keys.shape[2],), distance, device=keys.device)
    for layer_type in layer_types:
        try:
            width = angles(rotary, moved, layer_type, -1, True)[0].shape[-1]
        except (TypeError, AttributeError, ValueError, KeyError):
            continue
        pairings = ((False, True), (True, False), (True, True))
        for rotated, pairing, at_end in itertools.product((width, 2 * width), pairings, (False, True)):
            if rotated > plain.key_size or rotated % 2 or (at_end and rotated == plain.key_size):
                continue
            layout = KeyLayout(plain.heads, plain.key_size, plain.value_size, rotated, *pairing, at_end, layer_type)
            if close(layout.rotate(keys, moved, rotary), there[0], tolerance):
                return layout
    return None


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than `tolerance`, relative to the largest value."""
    if ours.shape != theirs.shape:
        return False
    difference = (ours.float() - theirs.float()).abs().max()
    return bool(difference <= tolerance * theirs.float().abs().max().clamp_min(1e-6))
