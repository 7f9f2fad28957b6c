"""Attention of every token to the chapters that it reads, grouped by chapter as experts are in a mixture of experts.

Tokens that read the same chapter meet its keys in one matrix product, in tiles of a fixed number of tokens. Tiles are
worked through in blocks of bounded size and computed again in the backward pass: what is held is the queries, the
keys and values of the chapters read, and the outputs, but never keys or scores of every token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bank_gradient import RowGradient, accumulator


# Values that one block of tiles may hold of each kind: fits a CPU's cache, and keeps a GPU busy.
BLOCK_VALUES = {"cpu": 1 << 20}
BLOCK_VALUES_ELSEWHERE = 1 << 25
# What reading a chapter for one more tile costs, in rows of a tile's query matrix (tokens times heads).
ROWS_OF_A_TILE = 16
TILE_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Groups:
    """Pairs of a token and a chapter that it reads, sorted by chapter. P pairs, A chapters that are read.

    Attributes:
        chapters: [A] numbers of the chapters read, ascending.
        counts: [A] pairs of each.
        order: [P] places of the sorted pairs among the unsorted ones, which go token by token.
        token: [P] the token of each pair.
    """

    chapters: Tensor
    counts: Tensor
    order: Tensor
    token: Tensor

    @classmethod
    def of(cls, choice: Tensor) -> "Groups":
        """The groups of choice [n, k]: the chapters that each of n tokens reads.

        Asks the device once how many chapters are read.
        """
        flat = choice.reshape(-1)
        order = flat.argsort(stable=True)
        chapters, counts = torch.unique_consecutive(flat[order], return_counts=True)
        return cls(chapters, counts, order, order // choice.shape[1])

    def tile_size(self, query_heads: int) -> int:
        """Tokens of a tile: few tiles, and few places in them that hold no pair. Asks the device once."""
        sizes = torch.tensor(TILE_SIZES, device=self.counts.device)
        tiles = ((self.counts[:, None] + sizes - 1) // sizes).sum(0)
        return TILE_SIZES[int((tiles * (sizes * query_heads + ROWS_OF_A_TILE)).argmin())]

    def tiles(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cut every chapter's pairs into tiles of `size`.

        Returns:
            The chapter [tiles] of each tile as an index into `chapters`, its pairs [tiles, size], and which of these
            places hold a pair [tiles, size].
        """
        tiles = (self.counts + size - 1) // size
        chapter = torch.repeat_interleave(torch.arange(tiles.numel(), device=tiles.device), tiles)
        in_chapter = torch.arange(chapter.numel(), device=tiles.device) - (tiles.cumsum(0) - tiles)[chapter]
        place = in_chapter[:, None] * size + torch.arange(size, device=tiles.device)
        pair = (self.counts.cumsum(0) - self.counts)[chapter][:, None] + place
        return chapter, pair.clamp_max(self.token.numel() - 1), place < self.counts[chapter][:, None]


def chapter_attention(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Sum over the chapters that a token reads of weight * softmax(query keys^T) values, for every head.

    The scale belongs into the query.

    Args:
        query: [n, H, e]
        keys: [A, T, H, e] of the chapters in `groups`, and values: [A, T, H, f].
        weight: [n, k] of each token's chapters, in the order in which `groups` was made.

    Returns:
        [n, H, f]
    """
    attended: Tensor = _ChapterAttention.apply(  # type: ignore[no-untyped-call]
        query, keys, values, weight.reshape(-1)[groups.order], groups
    )
    return attended


def row_attention(
    query: Tensor,
    rows: Tensor,
    chapters: Tensor,
    length: int,
    weight: Tensor,
    groups: Groups,
    gradient: RowGradient | None = None,
) -> Tensor:
    """Sum over the chapters that a token reads of weight * softmax(query M^T) M, M being the chapter's rows themselves.

    Rows are read where they lie.

    Args:
        query: [n, H, width]
        rows: [C * length, width], among which chapters [A] of `groups` have these numbers.
        weight: [n, k] as in `chapter_attention`.
        gradient: Where the gradient of rows is added, which autograd does not get then.

    Returns:
        [n, H, width]
    """
    attended: Tensor = _RowAttention.apply(  # type: ignore[no-untyped-call]
        query, rows, weight.reshape(-1)[groups.order], groups, chapters, length, gradient
    )
    return attended


class _ChapterAttention(torch.autograd.Function):
    """Softmax probabilities are computed again in the backward pass, as in FlashAttention (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(query, keys, values, weight)
        ctx.groups = groups
        with torch.autocast(query.device.type, enabled=False):
            result = query.new_zeros(*query.shape[:-1], values.shape[-1], dtype=accumulator(query))
            for block in blocks(groups, 1, query.shape[1], keys.shape[1], keys.shape[-1]):
                q, k, v = block.operands(query, keys, values)
                read = softmax(q @ k.transpose(2, 3)).to(v.dtype) @ v
                read = read.transpose(1, 2) * block.weight(weight)
                result.index_add_(0, block.token.flatten(), read.flatten(0, 1).to(result.dtype))
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        query, keys, values, weight = ctx.saved_tensors
        groups: Groups = ctx.groups
        with torch.autocast(query.device.type, enabled=False):
            grad_query = torch.zeros_like(query, dtype=accumulator(query))
            grad_keys = torch.zeros_like(keys, dtype=accumulator(query))
            grad_values = torch.zeros_like(values, dtype=accumulator(query))
            grad_weight = torch.zeros_like(weight)
            for block in blocks(groups, 1, query.shape[1], keys.shape[1], keys.shape[-1]):
                q, k, v = block.operands(query, keys, values)
                probability = softmax(q @ k.transpose(2, 3))
                grad_read = grad[block.token].transpose(1, 2)
                # The gradient of a probability, but for the chapter's weight, whose own gradient is their product.
                grows = (grad_read @ v.transpose(2, 3)).to(probability.dtype)
                product = (probability * grows).sum(-1, keepdim=True)
                block.add_weight(grad_weight, product.sum((1, 3)))
                weighed = block.weight(weight).transpose(1, 2)
                score = (probability * (grows - product) * weighed).to(k.dtype)
                grad_query.index_add_(
                    0, block.token.flatten(), (score @ k).transpose(1, 2).flatten(0, 1).to(grad_query.dtype)
                )
                of_keys = score.transpose(2, 3) @ q
                of_values = probability.to(v.dtype).transpose(2, 3) @ (grad_read * weighed).to(v.dtype)
                grad_keys.index_add_(0, block.chapter, of_keys.transpose(1, 2).to(grad_keys.dtype))
                grad_values.index_add_(0, block.chapter, of_values.transpose(1, 2).to(grad_values.dtype))
        return (
            grad_query.to(query.dtype),
            grad_keys.to(keys.dtype),
            grad_values.to(values.dtype),
            grad_weight,
            None,
        )


class _RowAttention(torch.autograd.Function):
    """As `_ChapterAttention`, with rows that are keys and values of all heads: their products are taken together."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        rows: Tensor,
        weight: Tensor,
        groups: Groups,
        chapters: Tensor,
        length: int,
        gradient: RowGradient | None,
    ) -> Tensor:
        ctx.save_for_backward(query, rows, weight, chapters)
        ctx.groups, ctx.length, ctx.gradient = groups, length, gradient
        table = rows.unflatten(0, (-1, length))
        with torch.autocast(query.device.type, enabled=False):
            result = torch.zeros_like(query, dtype=accumulator(query))
            for block in blocks(groups, query.shape[1], 1, length, rows.shape[1]):
                m = table[chapters[block.chapter]]  # [b, T, width]
                q = query[block.token].flatten(1, 2)
                read = softmax(q @ m.transpose(1, 2)).to(m.dtype) @ m
                read = read.view(*block.token.shape, *query.shape[1:]) * block.weight(weight)
                result.index_add_(0, block.token.flatten(), read.flatten(0, 1).to(result.dtype))
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None, None]:
        query, rows, weight, chapters = ctx.saved_tensors
        groups: Groups = ctx.groups
        length: int = ctx.length
        table = rows.unflatten(0, (-1, length))
        sums: Tensor | None = None
        if ctx.needs_input_grad[1]:
            sums = (ctx.gradient or RowGradient()).of(rows).view_as(table)
        with torch.autocast(query.device.type, enabled=False):
            grad_query = torch.zeros_like(query, dtype=accumulator(query))
            grad_weight = torch.zeros_like(weight)
            for block in blocks(groups, query.shape[1], 1, length, rows.shape[1]):
                m = table[chapters[block.chapter]]
                both = torch.cat([query[block.token].flatten(1, 2), grad[block.token].flatten(1, 2)], dim=1)
                score, grows = (both @ m.transpose(1, 2)).chunk(2, dim=1)
                probability = softmax(score)
                product = (probability * grows).sum(-1, keepdim=True)  # [b, g * H, 1]
                block.add_weight(grad_weight, product.view(*block.token.shape, -1).sum(-1))
                weighed = block.weight(weight).expand(-1, -1, query.shape[1], -1).flatten(1, 2)
                probability = probability * weighed
                of_score = probability * (grows - product)
                of_query = (of_score.to(m.dtype) @ m).view(*block.token.shape, *query.shape[1:])
                grad_query.index_add_(0, block.token.flatten(), of_query.flatten(0, 1).to(grad_query.dtype))
                if sums is not None:
                    of_rows = torch.cat([of_score, probability], dim=1).to(m.dtype).transpose(1, 2) @ both
                    sums.index_add_(0, chapters[block.chapter], of_rows.to(sums.dtype))
        of_table = None if sums is None or ctx.gradient is not None else sums.flatten(0, 1).to(rows.dtype)
        return grad_query.to(query.dtype), of_table, grad_weight, None, None, None, None


@dataclass(frozen=True)
class Block:
    """Some tiles, b of g tokens each."""

    chapter: Tensor  # [b]
    pair: Tensor  # [b, g]
    token: Tensor  # [b, g]
    real: Tensor  # [b, g]

    def operands(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, H, g, e], keys [b, H, T, e] and values [b, H, T, f] of the tiles."""
        q, k, v = query[self.token], keys[self.chapter], values[self.chapter]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def weight(self, weight: Tensor) -> Tensor:
        """The pairs' weights, 0 where a place holds none: [b, g, 1, 1]."""
        return (weight[self.pair] * self.real)[..., None, None]

    def add_weight(self, total: Tensor, share: Tensor) -> None:
        """Add what the places [b, g] have to the pairs [P]."""
        total.index_add_(0, self.pair.flatten(), (share * self.real).flatten().to(total.dtype))


def blocks(groups: Groups, queries: int, heads: int, length: int, width: int) -> list[Block]:
    """All tiles, in blocks that hold a bounded number of values.

    Args:
        queries: Rows of a tile's query matrix for each of its tokens.
        heads: Key heads. length: Rows of a chapter. width: Values of a row and head.
    """
    tile = groups.tile_size(queries)
    chapter, pair, real = groups.tiles(tile)
    of_tile = heads * max(length * width, tile * queries * max(length, width))
    device = groups.token.device.type
    count = max(1, BLOCK_VALUES.get(device, BLOCK_VALUES_ELSEWHERE) // of_tile)
    parts = zip(*(part.split(count) for part in (chapter, pair, groups.token[pair], real)), strict=True)
    return [Block(*part) for part in parts]


def softmax(score: Tensor) -> Tensor:
    """Probabilities in at least float32."""
    return score.softmax(-1, dtype=accumulator(score))
