"""Arguments of the memory trainer."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what memory needs.

    Args:
        detach_every: Conversations through which a loss is followed back into what was written: with 1 memory is data
            to every conversation, with n an answer also teaches how the n - 1 conversations before were read while
            they were written.
        gate_learning_rate_multiplier: Learning rate of gates and other scalars per head, as a multiple of the others'.
        predictor_loss_weight: Weight of the surprise predictor's own loss; 0 leaves the predictor as it is.
        reuse_told_states: Read conversations without a label as if memory were blank, compute what they leave in memory
            once and reuse it whenever the same text is told again. Several epochs over long episodes then cost little
            more than their questions; what is given up is that memory also shaped how later conversations were read.
        topic_steps: Steps before the first in which the episodic memory learns only which conversation answers which
            question, on states that are read without memory; needs `reuse_told_states`.
        keep_loss_weight: Weight of the divergence from the base model where a conversation is marked `keep`.
        memory_lr, lora_lr, base_model_lr: Learning rates of memory, of LoRA and of everything else; `learning_rate`
            where None.
        min_lr_ratio: Share of the learning rate at which the schedule ends.
        retrieval_loss_weight: Weight of a loss on which conversation an answer is read from, where an episode says in
            which one it was told: the contrastive loss of dense retrieval (Karpukhin et al. 2020, eq. 2) with the
            episode's other conversations as negatives.
    """

    detach_every: int = field(default=1, metadata={"help": "Conversations between cuts of the gradient."})
    gate_learning_rate_multiplier: float = field(
        default=30.0, metadata={"help": "Gates' multiple of the learning rate."}
    )
    predictor_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the surprise predictor's loss."})
    reuse_told_states: bool = field(default=False, metadata={"help": "Read told conversations once, without memory."})
    topic_steps: int = field(default=0, metadata={"help": "Steps of learning to tell conversations apart, before."})
    keep_loss_weight: float = field(default=1.0, metadata={"help": "Weight of staying as the base model is."})
    memory_lr: float | None = field(default=None, metadata={"help": "Learning rate of memory."})
    lora_lr: float | None = field(default=None, metadata={"help": "Learning rate of LoRA."})
    base_model_lr: float | None = field(default=None, metadata={"help": "Learning rate of everything else."})
    min_lr_ratio: float = field(default=0.0, metadata={"help": "Share of the learning rate at the end."})
    retrieval_loss_weight: float = field(
        default=0.3, metadata={"help": "Weight of reading from the conversation in which the answer was told."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A batch is a list of conversations; dropping columns that forward() does not name would drop all of it.
        self.remove_unused_columns = False
        if self.detach_every < 1:
            raise ValueError(f"detach_every={self.detach_every} was given, but it must be a whole number of at least 1")
        if self.reuse_told_states and self.detach_every > 1:
            raise ValueError(
                f"reuse_told_states was given with detach_every={self.detach_every}, but no gradient leads into states "
                "that are reused; use one of the two"
            )
        if self.topic_steps < 0 or (self.topic_steps and not self.reuse_told_states):
            raise ValueError(
                f"topic_steps={self.topic_steps} was given with reuse_told_states={self.reuse_told_states}, but it "
                "must be a whole number of at least 0, and topics are learned on reused states; set reuse_told_states"
            )
        for name in (
            "gate_learning_rate_multiplier",
            "predictor_loss_weight",
            "keep_loss_weight",
            "retrieval_loss_weight",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} was given, but it must not be negative")
