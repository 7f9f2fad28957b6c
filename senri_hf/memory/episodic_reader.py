"""The trained half of the episodic mechanism: how memory is read, and how surprising a token is."""

import copy
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..configuration import EpisodicConfig
from .episodic import EpisodicState, occupied
from .episodic_layer import EpisodicLayer


LOW_RANK_SCALE = 2.0
# What scores of conversations start with: cosines times 20, as dense retrieval has them, and a preference for what was
# told last that decides only between conversations about the same.
TOPIC_SCALE = 20.0
AGE_SCALE = 1.0
# Score of a conversation of which nothing is held: no weight beside any other, and finite in every dtype.
ABSENT = -1e4
# Logarithm of the largest and, negative, of the smallest weight that a token can have in a topic.
TOPIC_WEIGHT = 15.0

# Conversations, of those that memory holds something of, that are told apart when it is read, the newest first; older
# ones are taken together.
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

    @property
    def head_dim(self) -> int:
        """Size of a head of queries and keys."""
        return self.q.shape[0] // self.num_heads

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
    """A memory as a reader sees it: keys and values of its slots and, last, of the null slot.

    H heads, G key/value heads of size d, S = N + M + 1 slots, P topics of size t, C conversations, newest first, at
    least as many as it holds. Laid out for one multiplication of a batch of matrices each: a token that is decoded does
    little else.
    """

    keys: Tensor  # [B G, d, S], scaled
    values: Tensor  # [B G, S, d]
    bias: Tensor  # [B, H, 1, S] added to scores; minus infinity hides a slot
    conversation: Tensor  # [B, C, S] 1 where a slot was written in a conversation
    topics: Tensor  # [B, C, P t] of unit length each, what was talked about in a conversation
    recency: Tensor  # [B, H, 1, C] added to scores of conversations
    ages: Tensor  # [B, C] how many conversations ago, -1 where there is no such conversation
    gate: Tensor  # [H, 1, 1] what is read is multiplied with
    stored: int  # M, as many of the store's first slots as hold all that it holds


@dataclass(frozen=True)
class Reading:
    """What a reader makes of its tokens. H heads, M store slots, C conversations by age.

    Attributes:
        added: [B, T, D], to be added to the residual stream.
        access: [B, T, M] the attention mass that every store slot received, a mean over heads.
        conversation_scores: [B, H, T, C] the part of a slot's score that is its conversation's, the logarithm of a
            share, by age to `CONVERSATIONS` ago; minus infinity where memory holds nothing of that conversation; None
            except in training.
    """

    added: Tensor
    access: Tensor
    conversation_scores: Tensor | None


class EpisodicReader(nn.Module):
    """Multi-head cross-attention from a layer's tokens to the memory's slots, and the surprise of those tokens.

    Slots hold the layer's input divided by its RMS; norm and projections are applied when they are read, so that each
    of them learns. The score of a slot is that of its own key, plus the logarithm of its conversation's share: the
    softmax, over the conversations held, of topic_scale times the mean cosine of a conversation's topics and those of
    the open one so far, less age_scale log(1 + age), so that heads learn how much they prefer what was said last. A
    topic is a projection of tokens, pooled with learned weights. (A causal model's state of "Tom" in "Tom is my
    brother" knows nothing of a brother; the conversation does.) Shares choose between conversations: one that stands
    alone is read as if there were no topics.

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
        head_size, hidden_size = attention.head_dim, attention.q.shape[1]
        topics = config.num_topics
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
        self.age_scale = nn.Parameter(torch.full((self.num_heads,), AGE_SCALE))
        self.times_changed = 0
        self.predictor: nn.Module | None = None
        if config.surprise == "predictor":
            down, up = nn.Linear(hidden_size, config.predictor_rank), nn.Linear(config.predictor_rank, hidden_size)
            nn.init.zeros_(up.weight)
            self.predictor = nn.Sequential(down, nn.SiLU(), up)

    def train(self, mode: bool = True) -> Self:
        """Training changes weights, also where it leaves their version as it is, as fused optimizers do."""
        self.times_changed += mode
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loading may put other parameters in the place of these."""
        self.times_changed += 1
        super()._load_from_state_dict(*args, **kwargs)

    def encode(self, hidden: Tensor) -> Tensor:
        """What is stored of a layer's input [B, T, D]: the input divided by its RMS, in float32."""
        return nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])

    def normalise(self, encoded: Tensor) -> Tensor:
        """The layer's norm of what is stored, in the dtype that the reader has."""
        return self.norm(encoded.to(self.gate.dtype))

    def project(self, memory: EpisodicState) -> MemoryView:
        """Keys, values and score biases of all slots: strength_scale log(strength) for those of the buffer."""
        stored = occupied(memory.live_store())  # slots that hold nothing are not read
        some = slice(stored)
        held = torch.cat([memory.buffer, memory.store[:, some]], dim=1)
        slots = self.normalise(held)
        key, value = projected(slots, self.k_proj, self.v_proj)
        keys = split_heads(key, self.num_key_value_heads)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        null = self.null_key.to(keys.dtype)[None, :, None].expand(keys.shape[0], -1, -1, -1)
        values = split_heads(value, self.num_key_value_heads)
        live = torch.cat([memory.live_buffer(self.config), memory.live_store()[:, some]], dim=1)
        place, ages = by_conversation(torch.cat([memory.buffer_age, memory.store_age[:, some]], dim=1), live)
        decayed = self.strength_scale[:, None] * memory.strength.clamp_min(1e-9).log()[:, None]
        bias = nn.functional.pad(decayed, (0, stored)).masked_fill(~live[:, None], -torch.inf)
        bias = torch.cat([bias, self.null_score[:, None].expand(bias.shape[0], -1, -1)], dim=2)
        ages = ages[:, : max(occupied(ages >= 0), 1)]
        conversation = place[:, None] == torch.arange(ages.shape[1], device=place.device)[:, None]
        conversation = conversation & live[:, None]
        told = conversation.to(torch.float32) @ self.topic_parts(held, self.told_weight)
        return MemoryView(
            keys=(torch.cat([keys, null], dim=2) * self.scale).flatten(0, 1).transpose(1, 2),
            values=nn.functional.pad(values, (0, 0, 0, 1)).flatten(0, 1),
            bias=bias[:, :, None].float(),
            conversation=nn.functional.pad(conversation.to(torch.float32), (0, 1)),
            topics=self.topics(told),
            recency=self.recency(ages),
            ages=ages,
            gate=self.gate.float().tanh()[:, None, None],
            stored=stored,
        )

    def topic_parts(self, encoded: Tensor, weight: nn.Linear) -> Tensor:
        """What tokens [B, T, D] add to topics: their projections times their weights, [B, T, P t]."""
        topic, weight_log = projected(encoded.to(self.gate.dtype), self.topic_proj, weight)
        share = weight_log.float().clamp(-TOPIC_WEIGHT, TOPIC_WEIGHT).exp()
        return (topic.float().unflatten(-1, (share.shape[-1], -1)) * share[..., None]).flatten(2)

    def topics(self, parts: Tensor) -> Tensor:
        """The topics [B, N, P t], of unit length each, of summed parts [B, N, P t]; zero where nothing was summed."""
        return nn.functional.normalize(parts.unflatten(-1, (self.config.num_topics, -1)), dim=-1).flatten(2)

    def recency(self, ages: Tensor) -> Tensor:
        """What is added to scores of conversations of these ages [B, C], -1 where there is none: [B, H, 1, C]."""
        age = torch.log1p(ages.clamp_min(0).float())[:, None]
        return (-self.age_scale[:, None] * age).float().masked_fill((ages < 0)[:, None], ABSENT)[:, :, None]

    def asked_parts(self, encoded: Tensor, real: Tensor) -> Tensor:
        """What tokens [B, T, D] add to the open conversation's topics, nothing where they are padding."""
        return self.topic_parts(encoded, self.asked_weight) * real[..., None]

    def score_conversations(self, asked: Tensor, topics: Tensor, recency: Tensor) -> Tensor:
        """The logarithm of every conversation's share for every token, [B, H, T, C].

        Args:
            asked: As `forward` takes it. topics, recency: As a `MemoryView` has them.
        """
        similar = torch.bmm(self.topics(asked), topics.transpose(1, 2))[:, None]
        mean = 1 / self.config.num_topics
        return torch.addcmul(recency, self.topic_scale.float()[:, None, None], similar.float(), value=mean).log_softmax(
            -1
        )

    def forward(self, encoded: Tensor, view: MemoryView, asked: Tensor) -> Reading:
        """Read memory.

        Args:
            encoded: [B, T, D], what `encode` made of the layer's input.
            asked: [B, T, P t] `asked_parts`, summed over the open conversation up to every token.
        """
        batch, length, _ = encoded.shape
        query = self.q_proj(self.normalise(encoded)).view(batch, length, self.num_heads, -1).transpose(1, 2)
        if self.q_norm is not None:
            query = self.q_norm(query)
        grouped = (batch * self.num_key_value_heads, self.num_heads // self.num_key_value_heads * length)
        score = torch.bmm(query.reshape(*grouped, -1), view.keys).view(batch, self.num_heads, length, -1)
        conversations = self.score_conversations(asked, view.topics, view.recency)
        of_slots = torch.bmm(conversations.flatten(1, 2), view.conversation).view_as(score)  # no copy for every head
        weight = (score + view.bias + of_slots).softmax(-1)
        access = weight[..., -1 - view.stored : -1].detach().mean(1)
        access = nn.functional.pad(access, (0, self.config.store_slots - view.stored))
        weight = weight.to(view.values.dtype)
        read = torch.bmm(weight.view(*grouped, -1), view.values).view(batch, self.num_heads, length, -1)
        read = read * view.gate.to(read.dtype)
        added = self.o_proj(read.transpose(1, 2).reshape(batch, length, -1))
        if not self.training:
            return Reading(added, access, None)
        return Reading(added, access, by_age(conversations, view.ages))

    def view_of(self, layer: EpisodicLayer) -> MemoryView | None:
        """The committed memory of a cache layer, None for a blank one.

        It is kept for the next read while no gradient needs it and weights stay.
        """
        memory = layer.readable
        if memory is None:
            return None
        if torch.is_grad_enabled() or self.training:
            return self.project(memory)
        key = (id(self), torch.is_autocast_enabled(memory.buffer.device.type), self.times_changed)
        if layer.projected is not None:
            known, counted, changes, view = layer.projected
            if known == key and sum([parameter._version for parameter in counted]) == changes:
                return view
        view = self.project(memory)
        counted = [parameter for parameter in self.parameters() if not parameter.is_inference()]
        layer.projected = (key, counted, sum([parameter._version for parameter in counted]), view)
        return view

    def prediction_error(self, encoded: Tensor, previous: Tensor) -> Tensor:
        """RMS error of the predictor of a token's stored form from that of the token before, [B, T].

        Args:
            encoded: [B, T, D]. previous: [B, T, D], the tokens before those; zero at a conversation's start.
        """
        assert self.predictor is not None
        return (self.predictor(previous.to(self.gate.dtype)) - encoded).float().square().mean(-1).sqrt()


def by_conversation(age: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the conversations that memory holds something of each slot was written in, the newest being 0.

    Not by age: conversations of which nothing is held, and cycles without any, take up no place.

    Args:
        age: [B, S] of slots. live: [B, S] which of them are held.

    Returns:
        The place [B, S] of slots, below `CONVERSATIONS`, of no meaning for those that are not live; and the age
        [B, CONVERSATIONS] of every place, that of the youngest where older ones are taken together, -1 for empty ones.
    """
    never = torch.iinfo(age.dtype).max
    ordered, slots = age.masked_fill(~live, never).sort(dim=1)
    later = nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0))
    places = later.cumsum(1).clamp_max(CONVERSATIONS - 1)
    ages = age.new_full((age.shape[0], CONVERSATIONS), never).scatter_reduce(1, places, ordered, "amin")
    return torch.empty_like(places).scatter(1, slots, places), ages.masked_fill(ages == never, -1)


def by_age(scores: Tensor, ages: Tensor) -> Tensor:
    """Scores [B, H, T, C] of conversations of ages [B, C], by age: minus infinity for those that there are not."""
    known = (ages >= 0) & (ages < CONVERSATIONS)
    place = ages.masked_fill(~known, CONVERSATIONS)[:, None, None].expand_as(scores)
    spread = scores.new_full((*scores.shape[:-1], CONVERSATIONS + 1), -torch.inf)
    return spread.scatter(-1, place, scores)[..., :CONVERSATIONS]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for one made in inference mode, of which that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


class LowRankLinear(nn.Module):
    """A frozen projection and a trained low-rank change of it: y = (W + scale B A) x + b.

    See LoRA, Hu et al. 2021, eq. 3. W and b are copies of the base model's that no checkpoint holds: they come with the
    base model. In evaluation the sum is one matrix in the base model's dtype.
    """

    base_weight: Tensor
    base_bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int) -> None:
        super().__init__()
        self.register_buffer("base_weight", weight.detach().clone(), persistent=False)
        self.register_buffer("base_bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self.merged: tuple[Any, Tensor] | None = None

    def train(self, mode: bool = True) -> Self:
        """Training changes weights, also where it leaves their version as it is, as fused optimizers do."""
        self.merged = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.training:
            return self.together(x, (self,))[0]
        weight = self.merged_weight()
        return nn.functional.linear(x.to(weight.dtype), weight, self.base_bias)

    @staticmethod
    def together(x: Tensor, projections: "tuple[LowRankLinear, ...]") -> list[Tensor]:
        """Several of them of the same x. What is frozen is multiplied apart: its gradient would be computed, too."""
        x = x.to(projections[0].down.dtype)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        frozen = torch.cat([projection.base_weight for projection in projections]).to(x.dtype)
        base = nn.functional.linear(x, frozen).split([len(p.base_weight) for p in projections], dim=-1)
        down = torch.cat([projection.down for projection in projections])
        low = nn.functional.linear(x, down).split([len(p.down) for p in projections], dim=-1)
        return [
            part + LOW_RANK_SCALE * nn.functional.linear(change, projection.up)
            if projection.base_bias is None
            else part
            + projection.base_bias.to(part.dtype)
            + LOW_RANK_SCALE * nn.functional.linear(change, projection.up)
            for part, change, projection in zip(base, low, projections, strict=True)
        ]

    def merged_weight(self) -> Tensor:
        """W + scale B A, kept while neither changes."""
        key = (version_of(self.down), version_of(self.up), self.down.data_ptr(), self.base_weight.data_ptr())
        if self.merged is None or self.merged[0] != key:
            change = LOW_RANK_SCALE * self.up.float() @ self.down.float()
            self.merged = (key, (self.base_weight.float() + change).to(self.base_weight.dtype))
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


def projected(x: Tensor, *projections: nn.Module) -> list[Tensor]:
    """Several projections of x, of one kind and without biases of copies, by one multiplication where they are learned.

    Then x is large and they are not, and every multiplication would make its own copy of x in the dtype of autocast.
    """
    if not torch.is_grad_enabled() and not any(projection.training for projection in projections):
        return [projection(x) for projection in projections]
    if all(isinstance(projection, LowRankLinear) for projection in projections):
        return LowRankLinear.together(x, cast(tuple[LowRankLinear, ...], projections))
    layers = cast(tuple[nn.Linear, ...], projections)
    biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    weight = torch.cat([layer.weight for layer in layers])
    return list(nn.functional.linear(x, weight, biases).split([layer.out_features for layer in layers], dim=-1))


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] to [B, heads, N, d]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
