"""Synthetic tests of what a memory holds: multi-query associative recall, and a passkey in noise."""

from dataclasses import dataclass

import torch
from torch import Tensor


IGNORED = -100


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall: pairs of a key and a value, then the keys again in another order.

    `k1 v1 k2 v2 … kn vn  k3 v3 k1 v1 …`: the value is to be predicted wherever a key comes again (Arora et al. 2023,
    "Zoology", section 3.2; here every key is asked for once, right after the pairs).

    Args:
        pairs: Pairs in a sequence; keys of one sequence differ.
        vocab_size: Tokens; the lower half are keys, the upper half values.
    """

    pairs: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.vocab_size // 2:
            raise ValueError(
                f"pairs={self.pairs!r} was given, but there are {self.vocab_size // 2} keys among {self.vocab_size} "
                "tokens: pairs must be from 1 to that"
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 4 * self.pairs

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the values of the sequence."""
        return 1 / self.pairs

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels, each [rows, length]; a label is the token itself where it is to be predicted, else -100."""
        half = self.vocab_size // 2
        keys = torch.rand(rows, half, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(half, self.vocab_size, (rows, self.pairs), generator=generator)
        order = torch.rand(rows, self.pairs, generator=generator).argsort(1)
        told = torch.stack([keys, values], dim=-1).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=-1).flatten(1)
        labels = asked.clone()
        labels[:, ::2] = IGNORED
        return torch.cat([told, asked], dim=1), torch.cat([torch.full_like(told, IGNORED), labels], dim=1)


@dataclass(frozen=True)
class Passkey:
    """A key told once in a long stretch of noise, and asked for at its end.

    `noise … KEY d1 d2 … noise … ASK d1 d2 …`, with digits d from 0 to 9, KEY and ASK two tokens of their own, and noise
    of the tokens that are left.

    Args:
        length: Tokens of a sequence, at least 3 * digits + 2.
        digits: Of the key.
        vocab_size: Tokens, more than 12.
    """

    length: int
    digits: int = 5
    vocab_size: int = 64

    def __post_init__(self) -> None:
        if self.vocab_size <= 12:
            raise ValueError(f"vocab_size={self.vocab_size!r} was given, but digits, marks and noise need more than 12")
        if self.digits < 1 or self.length < 3 * self.digits + 2:
            raise ValueError(
                f"length={self.length!r} was given, but {self.digits} digits, told and asked for, need at least "
                f"{3 * self.digits + 2} tokens"
            )

    def batch(self, rows: int, depth: float | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and labels, each [rows, length]; a label is the token itself where it is to be predicted, else -100.

        Args:
            depth: Where the key is told: 0 at the beginning, 1 just before it is asked for; anywhere when None.
        """
        ids = torch.randint(12, self.vocab_size, (rows, self.length), generator=generator)
        key = torch.randint(0, 10, (rows, self.digits), generator=generator)
        places = self.length - 2 * (self.digits + 1)
        if depth is None:
            start = torch.randint(0, places + 1, (rows, 1), generator=generator)
        else:
            start = torch.full((rows, 1), round(depth * places))
        told = torch.cat([torch.full((rows, 1), 10), key], dim=1)
        ids = ids.scatter(1, start + torch.arange(self.digits + 1), told)
        ids[:, -self.digits - 1] = 11
        ids[:, -self.digits :] = key
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.digits :] = key
        return ids, labels
