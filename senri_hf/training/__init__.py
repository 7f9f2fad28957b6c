"""Training of memory: episodes, their collator, the trainer and its arguments."""

from .arguments import MemoryTrainingArguments
from .collator import EpisodeCollator
from .episodes import encode_conversation
from .evaluation import ask, tell
from .trainer import MemoryTrainer


__all__ = ["EpisodeCollator", "MemoryTrainer", "MemoryTrainingArguments", "ask", "encode_conversation", "tell"]
