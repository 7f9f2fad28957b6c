"""Attention of every token to the chapters that it reads, grouped by chapter as experts are in a mixture of experts.

Tokens that read the same chapter meet its keys in one matrix product, in tiles of a fixed number of tokens. Tiles are
worked through in blocks of bounded size and computed again in the backward pass: what is held is the queries, the
keys and values of the chapters read, and the outputs, but never keys or scores of every token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


# Values that one block of tiles may hold of each kind: fits a CPU's cache, and keeps a GPU busy.
BLOCK_VALUES = {"cpu": 1 << 20}
BLOCK_VALUES_ELSEWHERE = 1 << 25
# Rows of a tile's query matrix (tokens times heads) below which matrix products waste their width.
LEAST_TILE_ROWS = 8
LARGEST_TILE = 64


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
        """Tokens of a tile: about as many as read a chapter."""
        mean = self.token.numel() // max(1, self.chapters.numel())
        wanted = max(mean, -(-LEAST_TILE_ROWS // query_heads))
        return min(1 << (wanted - 1).bit_length(), LARGEST_TILE)

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
    """Sum over the chapters that a token reads of weight * softmax(query keys^T / scale) values.

    The scale belongs into the query. G key heads, R query heads for each of them.

    Args:
        query: [n, G, R, e]
        keys: [A, T, G, e] of the chapters in `groups`, and values: [A, T, G, f]; the same tensor may serve as both.
        weight: [n, k] of each token's chapters, in the order in which `groups` was made.

    Returns:
        [n, G, R, f]
    """
    attended: Tensor = _ChapterAttention.apply(  # type: ignore[no-untyped-call]
        query, keys, None if values is keys else values, weight.reshape(-1)[groups.order], groups
    )
    return attended


class _ChapterAttention(torch.autograd.Function):
    """Softmax probabilities are computed again in the backward pass, as in FlashAttention (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, values: Tensor | None, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(query, keys, values, weight)
        ctx.groups = groups
        with torch.autocast(query.device.type, enabled=False):
            size = (keys if values is None else values).shape[-1]
            result = query.new_zeros(*query.shape[:-1], size, dtype=accumulator(query))
            for block in blocks(query, keys, groups):
                q, k, v = block.operands(query, keys, values)
                read = softmax(q @ k.transpose(2, 3)).to(v.dtype) @ v
                read = block.by_token(read) * block.weight(weight)
                result.index_add_(0, block.token.flatten(), read.flatten(0, 1).to(result.dtype))
        return result.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, None]:
        query, keys, values, weight = ctx.saved_tensors
        groups: Groups = ctx.groups
        with torch.autocast(query.device.type, enabled=False):
            grad_query = torch.zeros_like(query, dtype=accumulator(query))
            grad_keys = torch.zeros_like(keys, dtype=accumulator(query))
            grad_values = grad_keys if values is None else torch.zeros_like(values, dtype=accumulator(query))
            grad_weight = torch.zeros_like(weight)
            for block in blocks(query, keys, groups):
                q, k, v = block.operands(query, keys, values)
                probability = softmax(q @ k.transpose(2, 3))
                grad_read = block.by_head(grad[block.token])
                read = probability.to(v.dtype) @ v
                of_weight = (block.by_token(read) * block.by_token(grad_read)).sum((2, 3, 4)) * block.real
                grad_weight.index_add_(0, block.pair.flatten(), of_weight.flatten().to(weight.dtype))
                grad_read = block.by_head(block.by_token(grad_read) * block.weight(weight)).to(v.dtype)
                of_values = probability.to(v.dtype).transpose(2, 3) @ grad_read
                of_probability = (grad_read @ v.transpose(2, 3)).to(probability.dtype)
                score = probability * (of_probability - (probability * of_probability).sum(-1, keepdim=True))
                score = score.to(k.dtype)
                grad_query.index_add_(
                    0, block.token.flatten(), block.by_token(score @ k).flatten(0, 1).to(grad_query.dtype)
                )
                of_keys = score.transpose(2, 3) @ q
                grad_keys.index_add_(0, block.chapter, of_keys.transpose(1, 2).to(grad_keys.dtype))
                grad_values.index_add_(0, block.chapter, of_values.transpose(1, 2).to(grad_values.dtype))
        return (
            grad_query.to(query.dtype),
            grad_keys.to(keys.dtype),
            None if values is None else grad_values.to(values.dtype),
            grad_weight,
            None,
        )


@dataclass(frozen=True)
class Block:
    """Some tiles, b of g tokens each."""

    chapter: Tensor  # [b]
    pair: Tensor  # [b, g]
    token: Tensor  # [b, g]
    real: Tensor  # [b, g]

    def operands(self, query: Tensor, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, G, g * R, e], keys [b, G, T, e] and values [b, G, T, f] of the tiles."""
        k = keys[self.chapter].transpose(1, 2)
        v = k if values is None else values[self.chapter].transpose(1, 2)
        return self.by_head(query[self.token]), k, v

    def by_head(self, x: Tensor) -> Tensor:
        """[b, g, G, R, e] to [b, G, g * R, e]."""
        return x.transpose(1, 2).flatten(2, 3)

    def by_token(self, x: Tensor) -> Tensor:
        """[b, G, g * R, e] to [b, g, G, R, e]."""
        return x.unflatten(2, (self.pair.shape[1], -1)).transpose(1, 2)

    def weight(self, weight: Tensor) -> Tensor:
        """The pairs' weights, 0 where a place holds none: [b, g, 1, 1, 1]."""
        return (weight[self.pair] * self.real)[..., None, None, None]


def blocks(query: Tensor, keys: Tensor, groups: Groups) -> list[Block]:
    """All tiles, in blocks that hold a bounded number of values."""
    _, key_heads, query_heads, size = query.shape
    tile = groups.tile_size(query_heads)
    chapter, pair, real = groups.tiles(tile)
    rows = keys.shape[1]
    of_tile = key_heads * max(rows * size, tile * query_heads * max(rows, size))
    count = max(1, BLOCK_VALUES.get(query.device.type, BLOCK_VALUES_ELSEWHERE) // of_tile)
    token = groups.token[pair]
    parts = zip(chapter.split(count), pair.split(count), token.split(count), real.split(count), strict=True)
    return [Block(*part) for part in parts]


def softmax(score: Tensor) -> Tensor:
    """Probabilities in at least float32."""
    return score.softmax(-1, dtype=accumulator(score))


def accumulator(x: Tensor) -> torch.dtype:
    """The type in which sums of x are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
