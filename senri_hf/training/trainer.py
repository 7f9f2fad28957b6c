"""Training of memory on episodes."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalPrediction

from ..memory import MemoryCache
from ..memory.router_loss import take_router_loss
from .arguments import MemoryTrainingArguments
from .episodes import IGNORED, before
from .groups import learning_rate_of
from .schedule import FlooredSchedule
from .told import ToldStates
from .topics import retrieval_loss, train_topics


SCALARS = (".gate", ".null_score", ".topic_scale", ".strength_scale", ".age_scale")


class MemoryTrainer(FlooredSchedule):
    """A `Trainer` whose examples are episodes: conversations in order, with the context cleared between them.

    Every step starts with an empty memory. Conversations without a label are read without a graph, those with one add
    their loss; the memory that they leave is what the next ones read. Give it an `EpisodeCollator`.

    Evaluation reports `exact`: the share of labelled conversations of which every token of the answer comes out on top
    (of the whole reply, where no answer is named).
    """

    args: MemoryTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("compute_metrics", exact_share)
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MemoryTrainingArguments):
            raise TypeError(
                f"args is a {type(self.args).__name__}, but a MemoryTrainer takes senri_hf.MemoryTrainingArguments"
            )
        self.model_accepts_loss_kwargs = False
        self.label_names = []
        self.told = ToldStates(cast(PreTrainedModel, self.model)) if self.args.reuse_told_states else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after `topic_steps` steps of topics alone when training begins anew."""
        if self.args.topic_steps and not resume_from_checkpoint:
            assert self.told is not None
            self._move_model_to_device(cast(nn.Module, self.model), self.args.device)
            train_topics(
                self.told,
                self.endless_batches(),
                self.args.topic_steps,
                self.args.learning_rate,
                lambda gradient: self.accelerator.reduce(gradient, reduction="mean"),
                quiet=self.args.disable_tqdm or not self.is_world_process_zero(),
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def endless_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches, over and over."""
        while True:
            for batch in self.get_train_dataloader():
                yield self._prepare_inputs(batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args`, with gates and other scalars per head at their own rate and without weight decay."""
        if self.optimizer is None:
            trained = cast(PreTrainedModel, self.model if model is None else model)
            decayed = set(self.get_decay_parameter_names(trained))
            groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    scalar = name.endswith(SCALARS)
                    faster = self.args.gate_learning_rate_multiplier if scalar else 1.0
                    rate = learning_rate_of(name, self.args) * faster
                    groups.setdefault((rate, name in decayed and not scalar), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (rate, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, exact = self.run_episodes(model, inputs["conversations"])
        return (loss, {"exact": exact}) if return_outputs else loss

    def run_episodes(self, model: nn.Module, conversations: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """The loss of a batch of episodes, and which labelled conversations came out exactly, [labelled, B].

        A row without a label in a conversation counts as NaN there.
        """
        memory = self.new_memory(model)
        below: list[Tensor | None] = [None] * len(conversations)
        if self.told is not None:
            self.told.read(conversations)
            below = self.told.below(conversations)
        learning = torch.is_grad_enabled()
        losses, counts, exact, retrieved, routed = [], [], [], [], []
        for index, conversation in enumerate(conversations):
            learns = bool(conversation["learns"])
            if conversation["keeps"] and self.args.keep_loss_weight:
                divergence, count = self.divergence(model, memory, conversation)
                losses.append(self.args.keep_loss_weight * divergence)
                counts.append(count)
            if self.told is not None and not learns:
                self.told.write(memory, conversation["input_ids"], conversation["attention_mask"])
            else:
                wanted = before(conversation["labels"] != IGNORED)
                group = index // self.args.detach_every * self.args.detach_every
                followed = any(later["learns"] for later in conversations[index : group + self.args.detach_every])
                with torch.set_grad_enabled(learning and followed), self.from_below(below[index]):
                    logits = model(**model_inputs(conversation), past_key_values=memory, logits_to_keep=wanted).logits
                routed.append(take_router_loss(model))
            if learns:
                target = conversation["labels"].roll(-1, dims=1)[wanted]
                losses.append(nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
                counts.append(wanted.sum())
                retrieved += [
                    retrieval_loss(scores, wanted, conversation["told_ago"])
                    for scores in memory.take_conversation_scores()
                    if bool(conversation["told_ago"].any())
                ]
                judged = before(conversation["judged"].bool()) & wanted if "judged" in conversation else wanted
                wrong = torch.zeros_like(wanted)
                wrong[wanted] = logits.argmax(-1) != target
                exact.append((~wrong | ~judged).all(1).float().masked_fill(~judged.any(1), torch.nan))
            memory.clear_context()
            if (index + 1) % self.args.detach_every == 0:
                memory.detach()
        if not losses:
            raise ValueError(
                'No conversation of the batch has a labelled token: mark an assistant message with "train": True'
            )
        loss = torch.stack(losses).sum() / torch.stack(counts).sum().clamp_min(1)
        predicted = memory.take_losses()
        if predicted and self.args.predictor_loss_weight:
            loss = loss + self.args.predictor_loss_weight * torch.stack(predicted).mean()
        if retrieved and self.args.retrieval_loss_weight:
            loss = loss + self.args.retrieval_loss_weight * torch.stack(retrieved).mean()
        of_routers = [waiting for waiting in routed if waiting is not None]
        if of_routers:
            loss = loss + torch.stack(of_routers).mean()
        rows = conversations[0]["input_ids"].shape[0]
        return loss, torch.stack(exact) if exact else loss.new_full((1, rows), torch.nan)

    def divergence(self, model: nn.Module, memory: MemoryCache, conversation: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """KL divergence of the base model's predictions from those with memory, where rows are marked `keep`.

        Returns:
            Its sum over the marked tokens, and their number.
        """
        rows = conversation["keep"].any(1).nonzero()[:, 0]
        used = conversation["attention_mask"][rows].any(0).nonzero()[:, 0]  # not what other rows are padded to
        used = slice(int(used[0]), int(used[-1]) + 1)
        wanted = before(conversation["keep"][rows][:, used].bool())
        inputs = {name: tensor[rows][:, used] for name, tensor in model_inputs(conversation).items()}
        below: Tensor | None = None
        without: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.told is not None:
            below, without = self.told.kept_below(**inputs), self.told.as_without(**inputs)
        with torch.no_grad(), without:  # without a cache there is no memory: the base model
            base = model(**inputs, use_cache=False, logits_to_keep=wanted).logits
        remembered = (memory if memory.rows is None else memory.select_rows(rows)).snapshot()
        with self.from_below(below):
            logits = model(**inputs, past_key_values=remembered, logits_to_keep=wanted).logits
        divergence = nn.functional.kl_div(
            logits.float().log_softmax(-1), base.float().log_softmax(-1), log_target=True, reduction="sum"
        )
        return divergence, wanted.sum()

    def from_below(self, states: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's pass begins with these states at the first layer with memory; None: as usual."""
        return contextlib.nullcontext() if states is None or self.told is None else self.told.from_below(states)

    def new_memory(self, model: nn.Module) -> MemoryCache:
        """An empty memory for the model."""
        if not hasattr(self, "_blank_memory"):
            self._blank_memory = MemoryCache.for_model(self.accelerator.unwrap_model(model))
        memory = self._blank_memory.snapshot()
        for layer in memory.memory_layers:
            layer.keeps_graph = self.args.detach_every > 1
        return memory

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, exact = self.run_episodes(model, inputs["conversations"])
        share = exact.nanmean(0)
        return loss.detach(), share, share


def model_inputs(conversation: dict[str, Any]) -> dict[str, Tensor]:
    """What of a conversation the model takes."""
    return {name: conversation[name] for name in ("input_ids", "attention_mask")}


def exact_share(prediction: EvalPrediction) -> dict[str, float]:
    """`exact`: the mean over episodes of the share of their labelled conversations that came out exactly."""
    shares = torch.as_tensor(prediction.predictions)
    return {"exact": float(shares.nanmean())}
