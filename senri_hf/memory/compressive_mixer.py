"""The trained half of the compressive mechanism: what is written, what is asked for, and what becomes of the answer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import CompressiveConfig
from .compressive import UpdateRule, elu_features, unit_features, unit_length
from .compressive_layer import Progress, Step
from .compressive_state import Associations, MemoryShape
from .layout import Layout


SHARPNESS = 8.0


class CompressiveMemory(nn.Module):
    """Token mixing by a compressive memory alone: project, read, write, project back; no positions.

    With `"gated_delta"` it is the layer of Gated DeltaNet (Yang et al. 2025, section 3.3): a short causal convolution
    with SiLU before queries, keys and values, a strength b = sigmoid(W_b x) and a decay
    log a = -exp(A) softplus(W_a x + dt) for every token and head, an RMS norm and a SiLU gate on what was read.

    Args:
        hidden_size: Of the model.
        config: The mechanism's settings.
        heads: Their number and size; by default the hidden size is divided into heads of `config.memory_head_dim`.
    """

    def __init__(self, hidden_size: int, config: CompressiveConfig, heads: tuple[int, int] | None = None) -> None:
        super().__init__()
        count, size = heads or (hidden_size // config.head_dim(hidden_size), config.head_dim(hidden_size))
        inner = count * size
        self.is_gated, self.activates = config.update_rule == "gated_delta", config.activation == "silu"
        width = config.conv_kernel if self.is_gated else 1
        self.shape = MemoryShape(
            rule=UpdateRule(config.update_rule),
            heads=count,
            key_dim=size,
            value_dim=size,
            slots=config.num_memories,
            slot_tokens=config.memory_slot_tokens,
            segment=config.memory_segment_length,
            tail_columns=width - 1,
            tail_channels=3 * inner if width > 1 else 0,
        )
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, hidden_size, bias=False)
        # What was read, for those who look at it.
        self.memory_read = nn.Identity()
        if self.is_gated:
            self.b_proj = nn.Linear(hidden_size, count, bias=False)
            self.a_proj = nn.Linear(hidden_size, count, bias=False)
            self.A_log = nn.Parameter(torch.empty(count))
            self.dt_bias = nn.Parameter(torch.empty(count))
            self.g_proj = nn.Linear(hidden_size, inner, bias=False)
            self.o_norm = nn.RMSNorm(size, eps=1e-6)
            self.conv1d = nn.Conv1d(3 * inner, 3 * inner, width, groups=3 * inner, bias=False)
        if config.num_memories > 1:
            self.sharpness = nn.Parameter(torch.empty(count))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Start the parameters that are no projections as Gated DeltaNet's own code does, with decays less strong.

        Args:
            copy: Puts a value into a parameter; transformers' own passes by what a checkpoint has filled.
        """
        if self.is_gated:
            heads = self.shape.heads
            copy(self.A_log, torch.empty(heads).uniform_(0.01, 1.0).log())
            step = torch.exp(torch.empty(heads).uniform_(-6.9, -2.3))  # softplus(dt_bias) from 0.001 to 0.1
            copy(self.dt_bias, step + torch.log(-torch.expm1(-step)))
            width = self.conv1d.kernel_size[0]
            copy(self.conv1d.weight, torch.empty_like(self.conv1d.weight).uniform_(-(width**-0.5), width**-0.5))
        if self.shape.slots > 1:
            copy(self.sharpness, torch.full((self.shape.heads,), SHARPNESS))

    def forward(
        self, hidden: Tensor, point: Progress | None, layout: Layout, *, writes: bool = True
    ) -> tuple[Tensor, Step]:
        """Read memory with every token and write it.

        Args:
            hidden: [B, T, D].
            point: Where the conversation stands; None for its start, with what is written read at once.
            layout: Which of the columns are real.
            writes: Whether the tokens are written.

        Returns:
            What was read, projected, [B, T, D], zero at padding; and what is to be committed to the cache layer.
        """
        streams = layout.gather(hidden)
        carried = point is not None
        if point is None:
            point = Progress.begin(streams.shape[0], self.shape, hidden.device, commits=False)
        queries, tokens = self.associations(streams, point, layout)
        sharpness = self.sharpness if self.shape.slots > 1 else None
        reads, step = point.over(queries, tokens, self.shape, sharpness, writes=writes, carried=carried)
        read = self.memory_read(reads.to(hidden.dtype))
        if self.is_gated:
            gate = self.g_proj(streams).unflatten(-1, (self.shape.heads, -1))
            read = self.o_norm(read) * nn.functional.silu(gate)
        return layout.scatter(self.o_proj(read.flatten(-2))), step

    def associations(self, streams: Tensor, point: Progress, layout: Layout) -> tuple[Tensor, Associations]:
        """What streams [R, L, D] ask, [R, L, H, d_k], and what they write."""
        valid = layout.valid
        q, k, v = self.q_proj(streams), self.k_proj(streams), self.v_proj(streams)
        raw = streams[..., :0]
        if self.shape.tail_columns:
            raw = torch.cat([q, k, v], dim=-1)  # streams are zero at padding, and so is this
            taps = torch.cat([point.tail.to(raw.dtype), raw], dim=1).transpose(1, 2)
            q, k, v = self.conv1d(taps).transpose(1, 2).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.shape.heads, -1)) for part in (q, k, v))
        features: Callable[[Tensor], Tensor] = elu_features
        if self.is_gated:
            features, v = (unit_features, nn.functional.silu(v)) if self.activates else (unit_length, v)
            strength = self.b_proj(streams).float().sigmoid()
            step = nn.functional.softplus(self.a_proj(streams).float() + self.dt_bias.float())
            log_decay = -self.A_log.float().exp() * step
        else:
            strength = log_decay = streams[..., :0]
        tokens = Associations(features(k), v.float(), strength, log_decay, raw, valid, valid, layout.real)
        return features(q), tokens
