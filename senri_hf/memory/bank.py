"""Banks: learnable rows in chapters, of which only those that are read are ever computed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration import BankConfig
from .bank_gradient import RowGradient, open_rows, take_chapters
from .bank_quantized import dequantize, fake_quantize, quantize


class Table(nn.Module):
    """Rows [rows, width], as a parameter or as codes of a few bits.

    Args:
        std: Standard deviation of new rows.
        bits: Bits a value in which the rows are read; None reads them as they are.
        stored: Whether the codes are what is held; the rows are frozen then.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, rows: int, width: int, std: float, bits: int | None = None, stored: bool = False) -> None:
        super().__init__()
        self.rows, self.width, self.std, self.bits, self.stored = rows, width, std, bits, stored
        if stored:
            assert bits is not None
            self._hold(*quantize(torch.zeros(rows, width), bits))
        else:
            self.weight = nn.Parameter(torch.empty(rows, width))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows anew; codes stay as they are."""
        if not self.stored:
            init.normal_(self.weight, std=self.std)

    def extra_repr(self) -> str:
        bits = f", {self.bits} bits{' stored' if self.stored else ''}" if self.bits else ""
        return f"{self.rows}, {self.width}{bits}"

    def _hold(self, codes: Tensor, scales: Tensor) -> None:
        self.register_buffer("codes", codes)
        # As whole numbers of the same bits: a model that is cast to another dtype leaves them as they are.
        self.register_buffer("scales", scales.view(torch.int16))

    def store(self, bits: int) -> None:
        """Hold codes of `bits` bits instead of floats from now on."""
        if self.stored:
            raise ValueError(f"The bank is held in {self.bits} bits already; quantize a copy that has its floats")
        codes, scales = quantize(self.weight.detach(), bits)
        del self.weight
        self.bits, self.stored = bits, True
        self._hold(codes, scales)

    def forward(self) -> "OpenTable":
        """The table as a forward pass reads it: opened once, however many layers read it."""
        if self.stored:
            return OpenTable(self, self.codes, self.scales)
        gradient = RowGradient()
        return OpenTable(self, open_rows(self.weight, gradient), None, gradient)


@dataclass(frozen=True)
class OpenTable:
    """A table that is read: `held` is its parameter, or its codes, which have `scales`.

    Gradients of chapters are added into `gradient`.

    It stays where it is; of a layer on another device only what that layer reads is moved.
    """

    table: Table
    held: Tensor
    scales: Tensor | None
    gradient: RowGradient | None = None  # of a parameter

    def all(self) -> Tensor:
        """All rows, [rows, width]."""
        return self._rows(self.held, self.scales)

    def chapters(self, chapters: Tensor, length: int) -> Tensor:
        """Chapters [A] of `length` rows each: [A, length, width]."""
        chapters = chapters.to(self.held.device)
        if self.scales is not None:
            codes, scales = (t.unflatten(0, (-1, length))[chapters] for t in (self.held, self.scales))
            return self._rows(codes, scales)
        assert self.gradient is not None
        return self._rows(take_chapters(self.held, chapters, length, self.gradient), None)

    def _rows(self, held: Tensor, scales: Tensor | None) -> Tensor:
        bits = self.table.bits
        if scales is not None:
            assert bits is not None
            return dequantize(held, scales.view(torch.bfloat16), bits, self.table.width)
        return held if bits is None else fake_quantize(held, bits)


class MemoryBank(nn.Module):
    """A bank M [rows, width] of memory tokens that layers read by cross-attention.

    *standard*: M itself. *factorized*: M = A B^T, A [rows, rank], B [width, rank] with variance 1 / rank.
    *reduced_dim*: M [rows, rank], read in `rank` dimensions.

    Args:
        hidden_size: The model's, which is the width of rows where nothing else says so.
    """

    def __init__(self, config: BankConfig, hidden_size: int) -> None:
        super().__init__()
        self.chapter_length = config.tokens_per_chapter
        bits, stored = (config.memory_quant_bits if config.quantize_memory else None), config.quantized_storage
        self.width = row_width(config, hidden_size)
        factorized = config.use_low_rank_memory and config.low_rank_mode == "factorized"
        rank, std = config.memory_rank, config.memory_init_std
        self.tokens = Table(config.bank_rows, rank if factorized else self.width, std, bits, stored)
        self.basis = Table(self.width, rank, rank**-0.5, bits, stored) if factorized else None

    def forward(self) -> "OpenBank":
        """The bank as one forward pass reads it."""
        return OpenBank(self.tokens(), None if self.basis is None else self.basis(), self.chapter_length)

    def store_quantized(self, bits: int) -> None:
        """Hold codes of 8 or 4 bits instead of floats from now on.

        Raises:
            ValueError: when it does already.
        """
        self.tokens.store(bits)
        if self.basis is not None:
            self.basis.store(bits)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, scales included."""
        held = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True)
class OpenBank:
    """A bank that is read."""

    tokens: OpenTable
    basis: OpenTable | None
    chapter_length: int

    def all(self) -> Tensor:
        """All rows, [rows, width]."""
        return self._spread(self.tokens.all())

    def chapters(self, chapters: Tensor) -> Tensor:
        """The rows of chapters [A]: [A, T, width]."""
        return self._spread(self.tokens.chapters(chapters, self.chapter_length))

    def rows_of(self, chapters: Tensor, like: Tensor) -> tuple[Tensor, Tensor, RowGradient | None]:
        """Rows [rows, width] with the dtype and device of `like`, and the numbers that chapters [A] have among them.

        These are the parameter itself where it serves as it is, with where its gradient is added, and otherwise the
        chapters, computed.
        """
        held = self.tokens.held
        serves = self.basis is None and self.tokens.table.bits is None
        if serves and held.dtype == like.dtype and held.device == like.device:
            return held, chapters, self.tokens.gradient
        rows = self.chapters(chapters).to(like).flatten(0, 1)
        return rows, torch.arange(chapters.numel(), device=like.device), None

    def _spread(self, rows: Tensor) -> Tensor:
        return rows if self.basis is None else rows @ self.basis.all().transpose(0, 1)


def row_width(config: BankConfig, hidden_size: int) -> int:
    """The width of a bank's rows."""
    if config.use_low_rank_memory and config.low_rank_mode == "reduced_dim":
        return config.memory_rank
    return config.memory_dim or hidden_size


def attention_width(config: BankConfig, hidden_size: int) -> int:
    """The width of queries, keys and values, all heads together."""
    reduced = config.use_low_rank_memory and config.low_rank_mode == "reduced_dim"
    return config.memory_rank if reduced else hidden_size


def attention_heads(config: BankConfig, hidden_size: int, model_heads: int) -> int:
    """The number of heads of the cross-attention.

    Raises:
        ValueError: when the number that is asked for does not divide the width.
    """
    width = attention_width(config, hidden_size)
    if config.memory_num_heads is None:
        return next(heads for heads in range(min(model_heads, width), 0, -1) if width % heads == 0)
    if width % config.memory_num_heads:
        raise ValueError(
            f"memory_num_heads={config.memory_num_heads} was given, but it must divide the width {width} of the "
            "memory's attention"
        )
    return config.memory_num_heads
