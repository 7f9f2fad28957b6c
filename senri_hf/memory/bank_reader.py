"""Cross-attention from a layer's tokens to a bank."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..configuration import BankConfig
from .bank import OpenBank, attention_heads, attention_width, row_width
from .bank_layer import BankLayer
from .bank_router import ChapterRouter, Choice, RouterRecord, RouterState, choose, mean_record, routed_by
from .chapter_attention import Groups, chapter_attention, row_attention


class MemoryLinear(nn.Linear):
    """A projection without bias that starts with standard deviation `std`, and does so again at every reset."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        if self.std:
            init.normal_(self.weight, std=self.std)
        else:
            init.zeros_(self.weight)


class LowRankProjection(nn.Module):
    """up(down(x))."""

    def __init__(self, inputs: int, outputs: int, rank: int, std: float) -> None:
        super().__init__()
        self.down = MemoryLinear(inputs, rank, std or inputs**-0.5)
        self.up = MemoryLinear(rank, outputs, std)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class BankAttention(nn.Module):
    """Multi-head cross-attention to a bank, of the whole of it or of the chapters that a router chooses.

    read(x) = W_o sum_c w_c softmax(W_q x (W_k M_c)^T / sqrt(d)) W_v M_c, with a softmax of its own for every chapter c.

    Args:
        model_heads: Heads of the model's own attention.
        dropout: On what is read, where the config does not say.
        init_std: Standard deviation of new projections.
    """

    def __init__(
        self, config: BankConfig, hidden_size: int, model_heads: int, dropout: float = 0.0, init_std: float = 0.02
    ) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        width, rows = attention_width(config, hidden_size), row_width(config, hidden_size)
        self.num_heads = attention_heads(config, hidden_size, model_heads)
        self.scale = (width // self.num_heads) ** -0.5
        self.q_proj = self._projection(hidden_size, width, init_std)
        self.k_proj = self._projection(rows, width, init_std)
        self.v_proj = self._projection(rows, width, init_std)
        self.o_proj = self._projection(width, hidden_size, 0.0 if config.wo_init_zero else init_std)
        self.dropout = nn.Dropout(dropout if config.memory_dropout is None else config.memory_dropout)
        self.router = ChapterRouter(config, hidden_size) if config.use_chapters else None
        self.record: RouterRecord | None = None  # of the last pass, for whoever logs it

    def _projection(self, inputs: int, outputs: int, std: float) -> nn.Module:
        if self.config.use_low_rank_projections:
            return LowRankProjection(inputs, outputs, self.config.projection_rank, std)
        return MemoryLinear(inputs, outputs, std)

    @property
    def strategy(self) -> str:
        """What tokens are routed by now."""
        return self.config.routing_strategy_train if self.training else self.config.routing_strategy_inference

    def forward(
        self,
        x: Tensor,
        bank: OpenBank,
        real: Tensor,
        layer: BankLayer | None = None,
        starts: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> tuple[Tensor, RouterRecord | None]:
        """Read the bank.

        Args:
            x: [B, T, D], normalised. real: [B, T] the tokens that are no padding.
            layer: What routing keeps of the tokens before these, in the cache; these are added to it.
            starts: [B, T] where another document begins, in rows of packed documents.
            prompt_lengths: [B] how many real tokens of each row are its prompt, for `"hybrid"` routing; all when None.

        Returns:
            What to add to the residual stream, [B, T, D], and what the router did, None without chapters.
        """
        choice, record = None, None
        if self.router is not None:
            state = self._state(x, layer, prompt_lengths)
            logits = self.router(routed_by(x, real, self.strategy, state, starts)).flatten(0, 1)
            choice, record = choose(logits, real.flatten(), self.config)
            self.record = RouterRecord(*(value.detach() for value in record))
        if layer is not None:
            layer.append(x, real)
        if self.training and self.config.memory_gradient_checkpointing and torch.is_grad_enabled():
            read: Tensor = checkpoint(self.read, x, bank, choice, use_reentrant=False)
        else:
            read = self.read(x, bank, choice)
        return self.dropout(read), record

    def _state(self, x: Tensor, layer: BankLayer | None, prompt_lengths: Tensor | None) -> RouterState:
        if layer is not None:
            return layer.routing_state(x, prompt_lengths)
        window = self.config.routing_window_size if self.strategy in ("rolling", "hybrid") else 0
        state = RouterState.empty(x.shape[0], x.shape[-1], window, x)
        return state if prompt_lengths is None else state.with_prompt(prompt_lengths)

    def read(self, x: Tensor, bank: OpenBank, choice: Choice | None) -> Tensor:
        """What the tokens x [B, T, D] read: of the chapters that were chosen, or of the whole bank."""
        tokens = x.flatten(0, 1)
        query = self.q_proj(tokens).unflatten(-1, (self.num_heads, -1)) * self.scale  # [n, H, e]
        read = self.read_all(query, bank) if choice is None else self.read_chapters(query, bank, choice)
        output: Tensor = self.o_proj(read.flatten(1).to(x.dtype))
        return output.view_as(x)

    def read_all(self, query: Tensor, bank: OpenBank) -> Tensor:
        """The whole bank, for query [n, H, e]: [n, H, f]."""
        attend = nn.functional.scaled_dot_product_attention
        rows = bank.all().to(query)
        if self.absorbs(rows.shape[0], query.shape[0], rows.shape[0]):
            # Every head of every token is a query to the rows themselves.
            lifted = self.lift(query).flatten(0, 1)[None, None]
            read = attend(lifted, rows[None, None], rows[None, None], scale=1)[0, 0]
            return self.lower(read.unflatten(0, (-1, self.num_heads)))
        keys, values = (p(rows).unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for p in (self.k_proj, self.v_proj))
        return attend(query.transpose(0, 1)[None], keys[None], values[None], scale=1)[0].transpose(0, 1)

    def read_chapters(self, query: Tensor, bank: OpenBank, choice: Choice) -> Tensor:
        """The chosen chapters, for query [n, H, e]: [n, H, f]."""
        groups, length = Groups.of(choice.chapters), self.config.tokens_per_chapter
        if self.absorbs(groups.chapters.numel() * length, query.shape[0], choice.chapters.shape[1] * length):
            rows, chapters, gradient = bank.rows_of(groups.chapters, query)
            lifted = self.lift(query)
            return self.lower(row_attention(lifted, rows, chapters, length, choice.weight, groups, gradient))
        rows = bank.chapters(groups.chapters).to(query)  # [A, T, width]
        keys, values = (p(rows).unflatten(-1, (self.num_heads, -1)) for p in (self.k_proj, self.v_proj))
        return chapter_attention(query, keys, values, choice.weight, groups)

    # Scores are q . (W_k m) = (W_k^T q) . m, and sums of W_v m are W_v of sums of m: the projections of keys and values
    # may be applied to queries and to what was read. That costs more a score, and nothing for the rows.

    def absorbs(self, rows: int, tokens: int, rows_each: int) -> bool:
        """Whether that is cheaper.

        Args:
            rows: Rows whose keys and values would be made otherwise. tokens: Tokens that read.
            rows_each: Rows that each of them reads.
        """
        parts = [*self.k_proj.modules(), *self.v_proj.modules()]
        if any(type(part) not in (MemoryLinear, LowRankProjection) for part in parts):
            return False  # quantized, or with an adapter of its own: only its forward says what it does
        if any(parameter.is_meta for part in parts for parameter in part.parameters()):
            return False  # offloaded: the weight is there within its forward only
        head = round(self.scale**-2)
        width, scores = row_width(self.config, self.hidden_size), tokens * rows_each * self.num_heads
        made = rows * width * head * self.num_heads + scores * head
        return scores * width + tokens * head * self.num_heads * width < made

    def lift(self, query: Tensor) -> Tensor:
        """W_k^T q of every head, for query [n, H, e]: [n, H, width]."""
        lifted = self._by_head(query, "nhe,hew->nhw", self.k_proj)
        return lifted @ self.k_proj.down.weight if isinstance(self.k_proj, LowRankProjection) else lifted

    def lower(self, read: Tensor) -> Tensor:
        """W_v of every head of what was read, [n, H, width]: [n, H, f]."""
        if isinstance(self.v_proj, LowRankProjection):
            read = self.v_proj.down(read)
        return self._by_head(read, "nhw,hew->nhe", self.v_proj)

    def _by_head(self, x: Tensor, equation: str, projection: nn.Module) -> Tensor:
        last: Any = projection.up if isinstance(projection, LowRankProjection) else projection
        return torch.einsum(equation, x, last.weight.unflatten(0, (self.num_heads, -1)))


def router_record(model: nn.Module) -> RouterRecord | None:
    """What the routers of a model did in its last pass, a mean over memory layers; None without chapters."""
    records = [m.record for m in model.modules() if isinstance(m, BankAttention) and m.record is not None]
    return mean_record(records) if records else None
