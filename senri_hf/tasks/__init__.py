"""Tasks on which the memory is trained and scored."""

from .recall import (
    Episode,
    Question,
    distractor_conversations,
    names,
    recall_episodes,
    relation_names,
    score_reply,
    training_mixture,
    values,
)
from .sequences import CyclicSequence, autocorrelation, lorenz_symbols, lorenz_trajectories


__all__ = [
    "CyclicSequence",
    "Episode",
    "Question",
    "autocorrelation",
    "distractor_conversations",
    "lorenz_symbols",
    "lorenz_trajectories",
    "names",
    "recall_episodes",
    "relation_names",
    "score_reply",
    "training_mixture",
    "values",
]
