"""Training of memory: episodes, their collator, the trainer and its arguments."""

from .arguments import MemoryTrainingArguments
from .averaging import WeightAverage
from .collator import EpisodeCollator
from .episodes import encode_conversation
from .evaluation import ask, tell
from .language_model import LanguageModelTrainer, RouterLossMixin
from .trainer import MemoryTrainer


__all__ = [
    "EpisodeCollator",
    "LanguageModelTrainer",
    "MemoryTrainer",
    "MemoryTrainingArguments",
    "RouterLossMixin",
    "WeightAverage",
    "ask",
    "encode_conversation",
    "tell",
]
