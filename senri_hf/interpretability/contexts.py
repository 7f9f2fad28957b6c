"""Where latents are active, as text that a person can read."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .activations import Batch, module_activations, real_positions
from .sparse_autoencoder import SparseAutoencoder, check_latents


# Tokens shown before and after.
BEFORE, AFTER = 12, 4
# Latents that are active more often than this say little by where they are most active.
DENSE = 0.1


@dataclass
class Peaks:
    """Where every latent of an autoencoder is most active, at most once in every row of the text.

    Attributes:
        rows: Ids of the real tokens of every row, [T] each.
        values: Its largest activations, the largest first, 0 where there are no more, [d_sae, top].
        row: The row of each, [d_sae, top].
        column: The token of that row, [d_sae, top].
        density: Share of the tokens at which it is active, [d_sae].
    """

    rows: list[Tensor]
    values: Tensor
    row: Tensor
    column: Tensor
    density: Tensor

    def places(self, latent: int) -> list[tuple[float, int, int]]:
        """Activation, row and column where a latent is most active, the largest activation first."""
        found = zip(*(of[latent].tolist() for of in (self.values, self.row, self.column)), strict=True)
        return [(value, row, column) for value, row, column in found if value > 0]

    def followers(self, latent: int, without: Collection[int] = ()) -> list[int]:
        """Ids of the tokens after those at which a latent is most active, the largest activation first.

        Nothing follows the last token of a row.

        Args:
            without: Rows that are passed over.
        """
        return [
            int(self.rows[row][column + 1])
            for _, row, column in self.places(latent)
            if row not in without and column + 1 < len(self.rows[row])
        ]

    def sample(self, count: int) -> list[int]:
        """`count` of the latents that are active at less than a tenth of the tokens.

        They are evenly spread over their rank by how often they are, the most frequent first.
        """
        living = ((self.density > 0) & (self.density < DENSE)).nonzero()[:, 0]
        ranked = living[self.density[living].argsort(descending=True)]
        chosen: list[int] = ranked[torch.linspace(0, max(0, len(ranked) - 1), min(count, len(ranked))).long()].tolist()
        return chosen


@torch.no_grad()
def peak_activations(
    model: nn.Module,
    module: str | nn.Module,
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    *,
    top: int = 5,
    run: Callable[[Batch], Any] | None = None,
) -> Peaks:
    """Where every latent is most active, in the `top` rows where it is so most.

    Args:
        run: As for `module_activations`.

    Raises:
        ValueError: when there are no tokens to look at.
    """
    rows: list[Tensor] = []
    best, place = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.long)  # [d_sae, top]: value, row and column
    column = torch.empty(0, 0, dtype=torch.long)
    active, seen = torch.zeros(sae.W_dec.shape[0]), 0
    skip = sae.config.skip_positions
    for batch in batches:
        (activations,) = module_activations(model, module, [batch], skip_positions=skip, run=run)
        mask = real_positions(batch, skip)
        values = sae.encode(activations.to(sae.W_dec.device)).cpu()
        active += (values > 0).sum(0)
        seen += len(values)
        real = real_positions(batch)
        start = 0
        for ids, of_row, chosen in zip(batch["input_ids"], real, mask, strict=True):
            length = int(chosen.sum())
            rows.append(ids[of_row].cpu())
            if length:
                highest, at = values[start : start + length].max(0)
                new = torch.full((len(highest), 1), len(rows) - 1)
                first = int(of_row.sum()) - length
                best, place, column = merged(best, place, column, highest[:, None], new, at[:, None] + first, top)
            start += length
    if not seen:
        raise ValueError("There were no tokens to look at")
    return Peaks(rows, best, place, column, active / seen)


def top_contexts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    module: str | nn.Module,
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    *,
    latents: Sequence[int] | None = None,
    count: int = 20,
    top: int = 5,
    run: Callable[[Batch], Any] | None = None,
) -> list[dict[str, Any]]:
    """The tokens at which latents are most active, with the text around them; at most one of every row.

    Args:
        latents: Which; when None, `count` of those active at less than a tenth of the tokens, evenly spread over their
            rank by how often they are.
        run: As for `module_activations`.

    Returns:
        For every latent `latent`, `density`, and `contexts` with `value`, `before`, `token`, `after`.

    Raises:
        ValueError: when there is no such latent, or there are no tokens to look at.
    """
    check_latents(latents or (), sae)
    peaks = peak_activations(model, module, sae, batches, top=top, run=run)
    shown = []
    for latent in peaks.sample(count) if latents is None else latents:
        contexts = []
        for value, row, at in peaks.places(latent):
            ids = peaks.rows[row]
            contexts.append(
                {
                    "value": round(value, 4),
                    "before": tokenizer.decode(ids[max(0, at - BEFORE) : at]),
                    "token": tokenizer.decode(ids[at : at + 1]),
                    "after": tokenizer.decode(ids[at + 1 : at + 1 + AFTER]),
                }
            )
        shown.append({"latent": int(latent), "density": float(peaks.density[latent]), "contexts": contexts})
    return shown


def merged(
    best: Tensor, place: Tensor, column: Tensor, value: Tensor, row: Tensor, at: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `top` largest of what was held and one more, for every latent."""
    if best.numel():
        value, row, at = torch.cat([best, value], 1), torch.cat([place, row], 1), torch.cat([column, at], 1)
    order = value.argsort(dim=1, descending=True)[:, :top]
    return value.gather(1, order), row.gather(1, order), at.gather(1, order)
