"""Which tokens of a forward pass are real: padding is never written into a memory."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


def real_tokens(
    tokens: Tensor, mask: Any, position_ids: Tensor | None, given: dict[str, Any], past: Any
) -> tuple[Tensor, bool]:
    """Which tokens [B, T] of this pass are no padding, and whether all of them are without having looked.

    Args:
        mask: [B, columns] for those that are real, or [B, 1, T, columns] for which token sees which; a dict of such
            masks for several kinds of attention, all of which tell padding.
        given: What else the decoder was given.
        past: Columns of context before this pass, a number or a tensor of one.

    Raises:
        ValueError: for packed documents, several of which share a row and could not have memories of their own, and for
            a mask of another kind.
    """
    batch, length = tokens.shape[:2]
    if given.get("cu_seq_lens_q") is not None or given.get("seq_idx") is not None:
        raise packed()
    if isinstance(mask, dict):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        real, is_known = torch.ones(batch, length, dtype=torch.bool, device=tokens.device), True
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:] != 0, False
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        real, is_known = sees_itself(mask, past).expand(batch, -1), False
    else:
        what = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
        raise ValueError(
            f"An attention_mask {what} was given, which does not tell padding. Memory takes a mask [batch, tokens], or "
            "one [batch, 1, tokens, columns]"
        )
    if position_ids is not None and position_ids.dim() == 2 and length > 1:
        goes_back = position_ids[:, 1:] < position_ids[:, :-1]
        if bool((goes_back & real[:, 1:] & real[:, :-1]).any()):
            raise packed()
    return real, is_known


def sees_itself(mask: Tensor, past: Any) -> Tensor:
    """[B, T] whether a token is seen by itself, as all are but padding, by a mask [B, 1, T, columns] of any dtype."""
    length, columns = mask.shape[-2:]
    # Those of a static cache reach beyond this pass; those of a sliding window may begin after the context does.
    start = torch.as_tensor(past, device=mask.device).clamp_max(columns - length)
    place = start + torch.arange(length, device=mask.device)
    itself = mask[:, 0].gather(2, place.view(1, -1, 1).expand(mask.shape[0], -1, 1))[..., 0]
    return itself > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else itself != 0


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
        "document per row, with padding; or, where nothing is to be carried on, use_cache=False and no cache"
    )


@dataclass(frozen=True)
class AfterEnd:
    """The tokens that `generate()` feeds to a row that has ended, and marks as real: they are padding all the same.

    An end that only `generate()` was told of is not known here: then give it a `pad_token_id` too.

    Attributes:
        fillers: What ends a row or pads it. After one of them that was decoded, the next is padding: without a padding
            token of its own a model is fed ends. Ends that follow one another in a text that is read are text.
        pads: Those that are nothing but padding, whatever they follow.
    """

    fillers: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @classmethod
    def of(cls, *configs: Any) -> Self:
        """By the first of a model's configs that names a token of a kind."""
        begin, end, pad = (special_ids(kind, *configs) for kind in ("bos", "eos", "pad"))
        return cls((*end, *pad), tuple(token for token in pad if token not in (*begin, *end)))

    def among(self, ids: Tensor, recent: Tensor | None) -> Tensor:
        """Where in ids [B, T] such padding is, [B, T].

        Args:
            recent: [B, R] the ids before them, -1 for those that were no decoding's: of a text that was read at once.
        """
        fills = is_any(ids, self.fillers)
        before = fills.new_zeros(ids.shape[0], 1) if recent is None else is_any(recent[:, -1:], self.fillers)
        before = torch.nn.functional.pad(before, (1 - before.shape[1], 0))
        goes_on = torch.cat([before, fills], dim=1).long().cumprod(1)[:, 1:].bool()
        return goes_on | is_any(ids, self.pads)


def special_ids(kind: str, *configs: Any) -> tuple[int, ...]:
    """The ids of a kind (`bos`, `eos`, `pad`), of the first of `configs` that names any."""
    known = (getattr(config, f"{kind}_token_id", None) for config in configs)
    ids = next((ids for ids in known if ids is not None), ())
    return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


def is_any(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """Where ids are one of a few tokens, without making a tensor of these."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found = found | (ids == token)
    return found
