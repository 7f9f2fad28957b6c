"""Learning by what conversations are told apart, before anything is read from them."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.episodic import EpisodicBlock
from .episodes import IGNORED, learned_columns
from .told import ToldStates


TOPIC_PARAMETERS = ("topic_proj", "told_weight", "asked_weight", "topic_scale", "age_scale")
WARMUP = 10


def train_topics(
    told: ToldStates,
    batches: Iterator[dict[str, Any]],
    steps: int,
    learning_rate: float,
    synchronise: Callable[[Tensor], Tensor],
    quiet: bool = False,
) -> None:
    """Train the topics of all blocks by which conversation answers which question, on states read without memory.

    Nothing passes through the model twice and no gradient through it at all: a step costs as much as reading its
    questions. A reader that begins to learn with topics that work learns to rely on them.

    Args:
        batches: What an `EpisodeCollator` makes of episodes whose answers say where they were told.
        synchronise: Makes a gradient the mean of those of all processes.
        quiet: Leaves the progress bar out.
    """
    parameters = [
        parameter
        for _, block in told.blocks
        for name, parameter in block.named_parameters()
        if name.split(".")[0] in TOPIC_PARAMETERS and parameter.requires_grad
    ]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    progress = tqdm(itertools.islice(batches, steps), total=steps, desc="topics", disable=quiet)
    for batch in progress:
        loss, right = topic_loss(told, batch["conversations"])
        if not loss.requires_grad:
            continue  # no answer of the batch says where it was told
        optimizer.zero_grad()
        loss.backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = synchronise(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
    optimizer.zero_grad()


def topic_loss(told: ToldStates, conversations: list[dict[str, Any]]) -> tuple[Tensor, float]:
    """The retrieval loss of a batch of episodes without reading memory, and the share of questions that find theirs."""
    told.read(conversations)
    parts: dict[EpisodicBlock, list[Tensor]] = {block: [] for _, block in told.blocks}
    held: list[Tensor] = []
    losses, right = [], []
    for conversation in conversations:
        if conversation["learns"]:
            states = told.layer_inputs(conversation["input_ids"], conversation["attention_mask"])
            real = conversation["attention_mask"].bool()
        else:
            states, real = told.states_of(conversation["input_ids"], conversation["attention_mask"])
        encoded = {block: block.encode(states[index]) for index, block in told.blocks}
        if conversation["learns"] and held and bool(conversation["told_ago"].any()):
            columns = learned_columns(conversation["labels"] != IGNORED)
            labelled = conversation["labels"][:, columns + 1] != IGNORED
            present = torch.stack([torch.zeros_like(held[0]), *reversed(held)], dim=1)  # by age, of which none is 0
            ages = torch.arange(present.shape[1], device=present.device).where(present, -1)
            scores = []
            for block, past in parts.items():
                topics = block.topics(torch.stack([torch.zeros_like(past[0]), *reversed(past)], dim=1))
                asked = block.asked_parts(encoded[block], real).cumsum(1)[:, columns]
                shares = block.score_conversations(asked, topics, block.recency(ages))
                scores.append(shares.masked_fill(~present[:, None, None], -torch.inf))
            losses += [retrieval_loss(layer, labelled, conversation["told_ago"]) for layer in scores]
            share = torch.stack([layer.exp().mean(1) for layer in scores]).mean(0)  # [B, T, C]
            found = share.argmax(-1) == conversation["told_ago"][:, None]
            right.append(found[labelled & (conversation["told_ago"] > 0)[:, None]])
        for block, past in parts.items():
            past.append((block.topic_parts(encoded[block], block.told_weight) * real[..., None]).sum(1))
        held.append(real.any(1))
    if not losses:
        return torch.zeros(()), math.nan
    return torch.stack(losses).mean(), float(torch.cat(right).float().mean())


def retrieval_loss(scores: Tensor, labelled: Tensor, told_ago: Tensor) -> Tensor:
    """-log of the share that tokens give to the conversation in which their answer was told, a mean over heads.

    The contrastive loss of dense retrieval (Karpukhin et al. 2020, eq. 2), an episode's conversations being the
    candidates.

    Args:
        scores: [B, H, T, C] of conversations by age, minus infinity for those of which nothing is held.
        labelled: [B, T] the tokens that count. told_ago: [B] the age asked for, 0 where it is not known.
    """
    rows = torch.arange(scores.shape[0], device=scores.device)
    age = told_ago.clamp_max(scores.shape[-1] - 1)
    known = (told_ago > 0) & (age == told_ago) & scores[rows, 0, 0, age].isfinite() & labelled.any(1)
    if not bool(known.any()):
        return scores.new_zeros(())
    scores, labelled, age = scores[known].float(), labelled[known], age[known]
    log_share = scores.log_softmax(-1)[torch.arange(len(age), device=age.device), :, :, age]
    return -log_share.mean(1)[labelled].mean()
