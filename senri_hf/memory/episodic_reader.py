"""The trained half of the episodic mechanism: how memory is read, and how surprising a token is."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import EpisodicConfig
from .episodic import EpisodicState
from .episodic_layer import EpisodicLayer


LOW_RANK_SCALE = 2.0
TOPIC_SCALE = 8.0
# Logarithm of the largest weight that a token can have in a topic: sums of thousands of them are finite in float32.
LARGEST_WEIGHT = 30.0

# Conversations that are told apart when memory is read; older ones are taken together.
CONVERSATIONS = 64


@dataclass
class AttentionWeights:
    """A layer's own attention, as a memory read can start from it.

    Attributes:
        q, k, v, o: Weights [out, in]; biases of q, k and v [out] or None. An output bias would be added where nothing
            was read, so there is none.
        q_norm, k_norm: Norms per head, or None.
        scale: What scores are multiplied with.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_key_value_heads: int
    scale: float
    biases: dict[str, Tensor] = field(default_factory=dict)
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    @classmethod
    def random(cls, hidden_size: int, num_heads: int) -> "AttentionWeights":
        """Random queries, keys and values of hidden_size / num_heads each; the output is zero."""
        if hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} was given, but it must divide the hidden size {hidden_size}")
        q, k, v = torch.randn(3, hidden_size, hidden_size).mul_(hidden_size**-0.5).unbind()
        o = torch.zeros(hidden_size, hidden_size)
        return cls(q, k, v, o, num_heads, num_heads, (hidden_size // num_heads) ** -0.5)


@dataclass(frozen=True)
class MemoryView:
    """A memory as a reader sees it: keys and values of its slots. H heads, G key/value heads, head size d."""

    keys: Tensor  # [B, G, N + M, d]
    topics: Tensor  # [B, G, C, t] of unit length, what was talked about in a conversation, by the conversation's age
    values: Tensor  # [B, G, N + M, d]
    conversation: Tensor  # [B, C, N + M] 1 where a slot was written in a conversation, by the conversation's age
    bias: Tensor  # [B, H, N + M] added to scores; minus infinity hides a slot
    stored: int  # M


@dataclass(frozen=True)
class Reading:
    """What a reader makes of its tokens. H heads, M store slots, C conversations by age.

    Attributes:
        added: [B, T, D], to be added to the residual stream.
        access: [B, T, M] the attention mass that every store slot received, a mean over heads.
        conversation_scores: [B, H, T, C] the part of a slot's score that is its conversation's, minus infinity where
            memory holds nothing of that conversation; None except in training.
    """

    added: Tensor
    access: Tensor
    conversation_scores: Tensor | None


class EpisodicReader(nn.Module):
    """Multi-head cross-attention from a layer's tokens to the memory's slots, and the surprise of those tokens.

    Slots hold the layer's input divided by its RMS; norm and projections are applied when they are read, so that each
    of them learns. The score of a slot is that of its own key, plus the score of the conversation in which it was
    written: topic_scale times the cosine of its topic and that of the open conversation so far, less
    age_scale log(1 + age), so that heads learn how much they prefer what was said last. A topic is a projection of
    tokens, pooled with learned weights. (A causal model's state of "Tom" in "Tom is my brother" knows nothing of a
    brother; the conversation does.)

    Beside the slots every head sees a null slot of value zero with a learned key and score: a token for which memory
    holds nothing reads nothing. What is read goes through a tanh gate per head, which starts at zero with
    `init="base_attention"`, and the output projection.
    """

    def __init__(self, config: EpisodicConfig, norm: nn.Module, attention: AttentionWeights) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.num_key_value_heads = attention.num_heads, attention.num_key_value_heads
        self.scale = attention.scale
        self.norm = norm
        rank = config.rank if config.init == "base_attention" else None
        self.q_proj = projection(attention.q, attention.biases.get("q"), rank)
        self.k_proj = projection(attention.k, attention.biases.get("k"), rank)
        self.v_proj = projection(attention.v, attention.biases.get("v"), rank)
        self.o_proj = projection(attention.o, None, rank)
        head_size, hidden_size = attention.q.shape[0] // self.num_heads, attention.q.shape[1]
        topics = self.num_key_value_heads
        self.topic_proj = nn.Linear(hidden_size, topics * config.topic_size, bias=False)
        # What tokens count for in the topic of a past conversation, and in that of the open one.
        self.told_weight = nn.Linear(hidden_size, topics, bias=False)
        self.asked_weight = nn.Linear(hidden_size, topics, bias=False)
        self.q_norm, self.k_norm = copy.deepcopy(attention.q_norm), copy.deepcopy(attention.k_norm)
        start = 0.0 if config.init == "base_attention" else 1.0
        self.gate = nn.Parameter(torch.full((self.num_heads,), start))
        self.null_score = nn.Parameter(torch.zeros(self.num_heads))
        self.null_key = nn.Parameter(torch.zeros(self.num_key_value_heads, head_size))
        self.topic_scale = nn.Parameter(torch.full((self.num_heads,), TOPIC_SCALE))
        self.strength_scale = nn.Parameter(torch.ones(self.num_heads))
        self.age_scale = nn.Parameter(torch.zeros(self.num_heads))
        self.predictor: nn.Module | None = None
        if config.surprise == "predictor":
            down, up = nn.Linear(hidden_size, config.predictor_rank), nn.Linear(config.predictor_rank, hidden_size)
            nn.init.zeros_(up.weight)
            self.predictor = nn.Sequential(down, nn.SiLU(), up)

    def encode(self, hidden: Tensor) -> Tensor:
        """What is stored of a layer's input [B, T, D]: the input divided by its RMS, in float32."""
        return nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])

    def normalise(self, encoded: Tensor) -> Tensor:
        """The layer's norm of what is stored, in the dtype that the reader has."""
        return self.norm(encoded.to(self.gate.dtype))

    def project(self, memory: EpisodicState) -> MemoryView:
        """Keys, values and score biases of all slots: strength_scale log(strength) for those of the buffer."""
        slots = self.normalise(torch.cat([memory.buffer, memory.store], dim=1))
        keys = split_heads(self.k_proj(slots), self.num_key_value_heads)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        values = split_heads(self.v_proj(slots), self.num_key_value_heads)
        age = torch.cat([memory.buffer_age, memory.store_age], dim=1).clamp_max(CONVERSATIONS - 1)
        live = torch.cat([memory.live_buffer(self.config), memory.live_store()], dim=1)
        decayed = self.strength_scale[:, None] * memory.strength.clamp_min(1e-9).log()[:, None]
        bias = torch.nn.functional.pad(decayed, (0, memory.store.shape[1])).masked_fill(~live[:, None], -torch.inf)
        conversation = age[:, None] == torch.arange(CONVERSATIONS, device=age.device)[:, None]
        conversation = (conversation & live[:, None]).to(torch.float32)
        told = self.topic_parts(torch.cat([memory.buffer, memory.store], dim=1), self.told_weight)
        topics = self.topic((conversation @ told.flatten(2)).unflatten(-1, told.shape[2:]))
        return MemoryView(keys, topics.transpose(1, 2), values, conversation, bias, memory.store.shape[1])

    def topic_parts(self, encoded: Tensor, weight: nn.Module) -> Tensor:
        """What tokens [B, T, D] add to topics: their projections and 1, times their weights, [B, T, G, t + 1]."""
        encoded = encoded.to(self.gate.dtype)
        share = weight(encoded).float().clamp_max(LARGEST_WEIGHT).exp()[..., None]
        return torch.cat([self.topic_proj(encoded).float().unflatten(-1, (share.shape[2], -1)) * share, share], dim=-1)

    def topic(self, parts: Tensor) -> Tensor:
        """The topics [..., t], of unit length, of summed parts [..., t + 1]; zero where nothing was summed."""
        return nn.functional.normalize(parts[..., :-1] / parts[..., -1:].clamp_min(1e-9), dim=-1)

    def asked_parts(self, encoded: Tensor, real: Tensor) -> Tensor:
        """What tokens [B, T, D] add to the open conversation's topics, nothing where they are padding, flattened."""
        return (self.topic_parts(encoded, self.asked_weight) * real[..., None, None]).flatten(2)

    def forward(self, encoded: Tensor, view: MemoryView, asked: Tensor) -> Reading:
        """Read memory.

        Args:
            encoded: [B, T, D], what `encode` made of the layer's input.
            asked: [B, T, G (t + 1)] `asked_parts`, summed over the open conversation up to every token.
        """
        batch, length, _ = encoded.shape
        encoded = self.normalise(encoded)
        query = self.q_proj(encoded).view(batch, length, self.num_heads, -1).transpose(1, 2)
        if self.q_norm is not None:
            query = self.q_norm(query)
        groups = self.num_heads // self.num_key_value_heads
        query = query.reshape(batch, self.num_key_value_heads, groups * length, -1)
        score = (query @ view.keys.transpose(2, 3)).view(batch, self.num_heads, length, -1)
        score = score.float() * self.scale + view.bias[:, :, None]
        conversations = self.score_conversations(asked, view)
        score = score + conversations @ view.conversation[:, None]
        null = (query @ self.null_key[..., None]).float().view(batch, self.num_heads, length, 1) * self.scale
        null = null + self.null_score.float()[:, None, None]
        weight = torch.cat([score, null], dim=-1).softmax(-1)[..., :-1]
        access = weight[..., weight.shape[-1] - view.stored :].detach().mean(1)
        weight = weight * self.gate.float().tanh()[:, None, None]
        weight = weight.to(view.values.dtype).view(batch, self.num_key_value_heads, groups * length, -1)
        read = (weight @ view.values).view(batch, self.num_heads, length, -1).transpose(1, 2)
        added = self.o_proj(read.reshape(batch, length, -1))
        if not self.training:
            return Reading(added, access, None)
        absent = ~view.conversation.any(-1)[:, None, None]
        return Reading(added, access, conversations.masked_fill(absent, -torch.inf))

    def score_conversations(self, asked: Tensor, view: MemoryView) -> Tensor:
        """How much every token reads every conversation, [B, H, T, C] by age, before slots are told apart."""
        topic = self.topic(asked.unflatten(-1, (self.num_key_value_heads, -1))).transpose(1, 2)
        similar = (topic @ view.topics.transpose(2, 3)).repeat_interleave(self.num_heads // self.num_key_value_heads, 1)
        age = torch.log1p(torch.arange(CONVERSATIONS, device=similar.device))
        return self.topic_scale[:, None, None] * similar - self.age_scale[:, None, None] * age

    def view_of(self, layer: EpisodicLayer) -> MemoryView | None:
        """The committed memory of a cache layer, None for a blank one.

        It is kept for the next read while no gradient needs it and weights stay.
        """
        memory = layer.readable
        if memory is None:
            return None
        if torch.is_grad_enabled():
            return self.project(memory)
        autocast = torch.is_autocast_enabled(memory.buffer.device.type)
        key = (id(self), autocast, *(parameter._version for parameter in self.parameters()))
        if layer.projected is None or layer.projected[0] != key:
            layer.projected = (key, self.project(memory))
        return layer.projected[1]

    def prediction_error(self, encoded: Tensor, previous: Tensor) -> Tensor:
        """RMS error of the predictor of a token's stored form from that of the token before, [B, T].

        Args:
            encoded: [B, T, D]. previous: [B, T, D], the tokens before those; zero at a conversation's start.
        """
        assert self.predictor is not None
        return (self.predictor(previous.to(self.gate.dtype)) - encoded).float().square().mean(-1).sqrt()


class LowRankLinear(nn.Module):
    """A frozen projection and a trained low-rank change of it: y = (W + scale B A) x + b.

    See LoRA, Hu et al. 2021, eq. 3. W and b are copies of the base model's that no checkpoint holds: they come with the
    base model.
    """

    base_weight: Tensor
    base_bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        self.register_buffer("base_weight", weight.detach().float().clone(), persistent=False)
        self.register_buffer("base_bias", None if bias is None else bias.detach().float().clone(), persistent=False)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.merged: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        if torch.is_grad_enabled():
            x = x.to(self.down.dtype)
            return linear(x, self.base_weight, self.base_bias) + LOW_RANK_SCALE * linear(linear(x, self.down), self.up)
        return linear(x.to(self.down.dtype), self.merged_weight(), self.base_bias)

    def merged_weight(self) -> Tensor:
        """W + scale B A, kept while neither changes."""
        key = (self.down._version, self.up._version, self.down.data_ptr(), self.base_weight.data_ptr())
        if self.merged is None or self.merged[0] != key:
            self.merged = (key, self.base_weight + LOW_RANK_SCALE * self.up @ self.down)
        return self.merged[1]


def projection(weight: Tensor, bias: Tensor | None, rank: int | None) -> nn.Module:
    """A projection that starts as `weight` [out, in] and `bias` [out]: a low-rank change of it, or a trained copy."""
    if rank is not None:
        return LowRankLinear(weight, bias, rank)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] to [B, heads, N, d]."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)
