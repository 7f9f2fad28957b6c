"""Which chapters a token reads: what it is routed by, the choice, and the losses that keep routers in order."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from transformers import initialization as init

from ..configuration import BankConfig
from .bank_gradient import accumulator
from .state import RowState


@dataclass(frozen=True)
class RouterState(RowState):
    """What routing keeps of the tokens of a conversation so far. W is the window's size, 0 where none is needed."""

    count: Tensor  # [B] int64 real tokens
    total: Tensor  # [B, D] their sum
    window: Tensor  # [B, W, D] the last of them, the latest at the end, zeros where there were fewer
    prompt: Tensor  # [B] int64 how many of them are the prompt; -1 while the prompt goes on

    @classmethod
    def empty(cls, rows: int, size: int, window: int, like: Tensor) -> "RouterState":
        """The state at a conversation's start."""
        dtype = accumulator(like)
        count = torch.zeros(rows, dtype=torch.long, device=like.device)
        total = torch.zeros(rows, size, dtype=dtype, device=like.device)
        return cls(count, total, total.new_zeros(rows, window, size), torch.full_like(count, -1))

    def with_prompt(self, lengths: Tensor) -> "RouterState":
        """The state of which the first `lengths` [B] tokens are the prompt, where nothing else was said before."""
        return replace(self, prompt=torch.where(self.prompt < 0, lengths.to(self.prompt), self.prompt))


def routed_by(x: Tensor, real: Tensor, strategy: str, state: RouterState, starts: Tensor | None = None) -> Tensor:
    """What every token is routed by, [B, T, D].

    Args:
        x: [B, T, D] the tokens. real: [B, T] those that are no padding.
        state: What came before them.
        starts: [B, T] where another document begins, in rows of packed documents.
    """
    if strategy == "token":
        return x
    dtype = state.total.dtype
    values = x.to(dtype) * real[..., None]
    # What precedes every column, and after the last: [B, T + 1, ...]; columns of documents before are taken off.
    sums = torch.cat([state.total[:, None], state.total[:, None] + values.cumsum(1)], dim=1)
    counts = torch.cat([state.count[:, None], state.count[:, None] + real.long().cumsum(1)], dim=1)
    columns = torch.arange(x.shape[1], device=x.device)
    begin = None if starts is None else torch.where(starts, columns, -1).cummax(1).values  # [B, T], -1: before the row
    if strategy == "sequence":
        end = torch.full_like(real, x.shape[1], dtype=torch.long) if starts is None else document_ends(starts)
        return between(at_columns(sums, end), counts.gather(1, end), sums, counts, begin).to(x.dtype)
    prefix = between(sums[:, 1:], counts[:, 1:], sums, counts, begin)
    if strategy == "prefix":
        return prefix.to(x.dtype)
    rolling = windowed(values, real, counts, state, begin)
    if strategy == "rolling":
        return rolling.to(x.dtype)
    in_prompt = (state.prompt[:, None] < 0) | (counts[:, 1:] <= state.prompt[:, None])
    return torch.where(in_prompt[..., None], prefix, rolling).to(x.dtype)


def between(total: Tensor, count: Tensor, sums: Tensor, counts: Tensor, begin: Tensor | None) -> Tensor:
    """Means [B, T, D] of total / count, less those of columns before `begin` where it is >= 0."""
    if begin is not None:
        inside, first = begin >= 0, begin.clamp_min(0)
        total = total - at_columns(sums, first) * inside[..., None]
        count = count - counts.gather(1, first) * inside
    return total / count.clamp_min(1)[..., None]


def windowed(values: Tensor, real: Tensor, counts: Tensor, state: RouterState, begin: Tensor | None) -> Tensor:
    """Means [B, T, D] of the last W real tokens up to every column, of its own document only."""
    window = state.window.shape[1]
    # The window's tokens come first, as columns of their own. Sums start anew here, so that differences stay exact in
    # conversations of any length.
    sums = torch.cat([state.window, values], dim=1).cumsum(1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)  # [B, 1 + W + T, D]
    held = torch.cat([real.new_ones(real.shape[0], window), real], dim=1).long().cumsum(1)
    held = torch.cat([torch.zeros_like(held[:, :1]), held], dim=1)  # [B, 1 + W + T] tokens or places of the window
    upto = held[:, window + 1 :].contiguous()
    first = torch.searchsorted(held.contiguous(), (upto - window).contiguous())
    count = counts[:, 1:].clamp_max(window)
    if begin is not None:
        at = torch.where(begin >= 0, begin + window, 0)
        count = torch.where(begin >= 0, torch.minimum(count, upto - held.gather(1, at)), count)
        first = torch.maximum(first, at)
    end = torch.arange(window + 1, held.shape[1], device=real.device).expand(real.shape)
    return (at_columns(sums, end) - at_columns(sums, first)) / count.clamp_min(1)[..., None]


def document_ends(starts: Tensor) -> Tensor:
    """For every column [B, T] the column behind its document."""
    length = starts.shape[1]
    later = torch.nn.functional.pad(starts[:, 1:], (0, 1))
    ends = torch.where(later, torch.arange(1, length + 1, device=starts.device), length)
    return ends.flip(1).cummin(1).values.flip(1)


def at_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x [B, S, D] at columns [B, T]."""
    return x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))


def advance(state: RouterState, x: Tensor, real: Tensor) -> RouterState:
    """The state after tokens x [B, T, D], of which only the `real` [B, T] ones count."""
    values = x.to(state.total.dtype) * real[..., None]
    state = replace(state, count=state.count + real.sum(1), total=state.total + values.sum(1))
    window = state.window.shape[1]
    if window == 0:
        return state
    # The last W real columns: a stable sort puts padding first.
    tokens = torch.cat([state.window, values], dim=1)
    kept = torch.cat([real.new_ones(real.shape[0], window), real], dim=1)
    last = kept.long().argsort(dim=1, stable=True)[:, -window:]
    return replace(state, window=at_columns(tokens, last))


class RouterRecord(NamedTuple):
    """What a router did in one forward pass, in means over its tokens; padding counts nowhere."""

    tokens: Tensor  # their number
    mean: Tensor  # [C] distribution over chapters
    z: Tensor  # logsumexp squared
    entropy: Tensor  # of a token's distribution, in nats
    usage: Tensor  # [C] share of the routed reads that each chapter got


class Choice(NamedTuple):
    """The chapters that n tokens read, each with its weight; those that are always read come first."""

    chapters: Tensor  # [n, k] int64
    weight: Tensor  # [n, k]


class ChapterRouter(nn.Linear):
    """Logits over the routed chapters, [..., C] in at least float32."""

    def __init__(self, config: BankConfig, hidden_size: int) -> None:
        super().__init__(hidden_size, config.num_chapters - config.num_shared_chapters, bias=False)

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, by: Tensor) -> Tensor:
        """Logits [..., C] of what tokens are routed by, [..., D]."""
        with torch.autocast(by.device.type, enabled=False):
            dtype = accumulator(by)
            return nn.functional.linear(by.to(dtype), self.weight.to(dtype))


def choose(logits: Tensor, real: Tensor, config: BankConfig) -> tuple[Choice, RouterRecord]:
    """Choose chapters by a router's logits [n, C]; real [n] says which of the tokens are no padding."""
    probability = logits.softmax(-1)
    weight, chapters = probability.topk(config.top_k_chapters, dim=-1)
    record = record_of(logits, probability, chapters, real)
    if config.router_weights_are_normalized:
        weight = weight / weight.sum(-1, keepdim=True)
    weight, chapters = weight * config.routed_scaling_factor, chapters + config.num_shared_chapters
    if config.num_shared_chapters:
        always = torch.arange(config.num_shared_chapters, device=chapters.device).expand(chapters.shape[0], -1)
        chapters = torch.cat([always, chapters], dim=-1)
        weight = torch.cat([torch.ones_like(always, dtype=weight.dtype), weight], dim=-1)
    return Choice(chapters, weight), record


def record_of(logits: Tensor, probability: Tensor, chapters: Tensor, real: Tensor) -> RouterRecord:
    """What was done for the real tokens."""
    kept = real.to(probability.dtype)
    tokens = kept.sum()
    reads = torch.zeros_like(probability[0]).index_add(
        0, chapters.flatten(), kept[:, None].expand_as(chapters).flatten()
    )
    log_normalizer = logits.logsumexp(-1)
    surprise = log_normalizer - (probability * logits).sum(-1)
    count = tokens.clamp_min(1)
    return RouterRecord(
        tokens=tokens,
        mean=(probability * kept[:, None]).sum(0) / count,
        z=(log_normalizer.square() * kept).sum() / count,
        entropy=(surprise.detach() * kept).sum() / count,
        usage=reads / (count * chapters.shape[-1]),
    )


def mean_record(records: list[RouterRecord]) -> RouterRecord:
    """The mean over memory layers, usage included."""
    device = records[0].z.device  # layers may be on several
    return RouterRecord(*(torch.stack([p.to(device) for p in parts]).mean(0) for parts in zip(*records, strict=True)))


class RouterLosses(NamedTuple):
    """Scalars: means over memory layers."""

    load_balance: Tensor
    auxiliary: Tensor
    z: Tensor


def router_losses(records: list[RouterRecord], over_processes: bool = False) -> RouterLosses:
    """The losses of what the routers of memory layers did.

    Load balance: C sum_c f_c P_c (Switch Transformer, Fedus et al. 2021, eq. 4), f_c the share of reads that chapter c
    got and P_c its mean probability. z: mean of logsumexp squared (ST-MoE, Zoph et al. 2022, eq. 5). Auxiliary:
    KL(mean distribution || uniform).

    Args:
        over_processes: Whether f and the distribution in the logarithm are those of the tokens of all processes of
            `torch.distributed`, which then all have to ask at once (as Qiu et al. 2025, "Demons in the Detail"). The
            mean over processes of the losses, and of their gradients, is what one process with all tokens has.
    """
    losses = [
        layer_losses(record, shared) for record, shared in zip(records, of_all(records, over_processes), strict=True)
    ]
    device = losses[0].z.device  # layers may be on several
    return RouterLosses(*(torch.stack([p.to(device) for p in parts]).mean(0) for parts in zip(*losses, strict=True)))


def layer_losses(record: RouterRecord, shared: RouterRecord) -> RouterLosses:
    """The losses of one layer's record, beside what all processes did, which has no gradient."""
    count = record.mean.shape[0]
    weight = record.tokens / shared.tokens.clamp_min(torch.finfo(record.z.dtype).tiny)
    # The gradient of the KL divergence through its logarithm is that of the distribution's sum, which is always 1.
    return RouterLosses(
        load_balance=weight * count * (shared.usage * record.mean).sum(),
        auxiliary=weight * torch.xlogy(record.mean, shared.mean * count).sum(),
        z=weight * record.z,
    )


def of_all(records: list[RouterRecord], over_processes: bool) -> list[RouterRecord]:
    """Records without a gradient; if so asked with the usage, mean and mean number of the tokens of all processes."""
    records = [RouterRecord(*(value.detach() for value in record)) for record in records]
    if not over_processes:
        return records
    device = records[0].mean.device
    parts = [torch.cat([torch.ones_like(r.mean[:1]), r.mean, r.usage]) * r.tokens for r in records]
    sums = torch.stack([part.to(device) for part in parts])
    distributed.all_reduce(sums)
    tokens, means = sums[:, 0] / distributed.get_world_size(), sums[:, 1:] / sums[:, :1].clamp_min(1)
    shared = []
    for record, count, values in zip(records, tokens, means, strict=True):
        mean, usage = values.to(record.mean.device).chunk(2)
        shared.append(record._replace(tokens=count.to(record.mean.device), mean=mean, usage=usage))
    return shared


def router_loss(losses: RouterLosses, config: BankConfig) -> Tensor:
    """The weighted sum of the losses that the configuration turns on."""
    loss = losses.z.new_zeros(())
    if config.use_load_balance_loss:
        loss = loss + config.load_balance_coefficient * losses.load_balance
    if config.use_auxiliary_loss:
        loss = loss + config.auxiliary_loss_coefficient * losses.auxiliary
    if config.use_z_loss:
        loss = loss + config.z_loss_coefficient * losses.z
    return loss


def has_router_loss(config: BankConfig) -> bool:
    """Whether training has a loss of routers."""
    return config.use_chapters and (config.use_load_balance_loss or config.use_auxiliary_loss or config.use_z_loss)
