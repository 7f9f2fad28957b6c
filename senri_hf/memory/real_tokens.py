"""Which tokens of a forward pass are real: padding is never written into a memory."""

from typing import Any

import torch
from torch import Tensor


def real_tokens(tokens: Tensor, mask: Any, position_ids: Tensor | None, given: dict[str, Any]) -> tuple[Tensor, bool]:
    """Which tokens [B, T] of this pass are no padding, and whether all of them are without having looked.

    Raises:
        ValueError: for packed documents, several of which share a row and could not have memories of their own.
    """
    batch, length = tokens.shape[:2]
    everything = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if given.get("cu_seq_lens_q") is not None or given.get("seq_idx") is not None:
        raise packed()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:] != 0, False
    if position_ids is None or position_ids.dim() != 2 or length == 1:
        return everything, True
    step = position_ids[:, 1:] - position_ids[:, :-1]
    if mask is None:
        if bool((step < 0).any()):
            raise packed()
        return everything, True
    # A mask that says which token sees which (static caches): a token is real where positions go on after it.
    real = everything.clone()
    real[:, :-1] = (step == 1).expand(batch, -1)
    return real, False


def document_starts(tokens: Tensor, mask: Any, position_ids: Tensor | None, given: dict[str, Any]) -> Tensor | None:
    """Where documents that share a row begin, [B, T]; None where a row is one document."""
    if given.get("cu_seq_lens_q") is not None:
        starts = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        starts[:, given["cu_seq_lens_q"][:-1].long()] = True
        return starts
    if mask is not None or position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] == 1:
        return None
    starts = torch.nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0), value=True)
    return starts.expand(tokens.shape[0], -1)


def packed() -> ValueError:
    return ValueError(
        "Several documents are packed into one row, but a memory belongs to a row: they would share it. Pass one "
        "document per row, with padding"
    )


def padding_after_end(ids: Tensor, recent: Tensor | None, pad_id: int, end_ids: tuple[int, ...]) -> Tensor:
    """[B, T] the padding that `generate()` feeds to a row that has ended, and marks as real.

    A padding token after an end or after another padding token is such padding.
    """
    before = ids.new_full((ids.shape[0], 1), -1) if recent is None or not recent.shape[1] else recent[:, -1:]
    previous = torch.cat([before, ids[:, :-1]], dim=1)
    ended = previous == pad_id
    for end_id in end_ids:
        ended = ended | (previous == end_id)
    return ended & (ids == pad_id)
