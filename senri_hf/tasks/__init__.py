"""Tasks on which the memory is trained and scored."""

from .associative import AssociativeRecall, Passkey
from .recall import (
    Episode,
    Question,
    distractor_conversations,
    general_conversations,
    names,
    recall_episodes,
    relation_names,
    score_reply,
    training_mixture,
    values,
)
from .sequences import CyclicSequence, autocorrelation, lorenz_symbols, lorenz_trajectories
from .world import WorldStory, world_story


__all__ = [
    "AssociativeRecall",
    "CyclicSequence",
    "Episode",
    "Passkey",
    "Question",
    "WorldStory",
    "autocorrelation",
    "distractor_conversations",
    "general_conversations",
    "lorenz_symbols",
    "lorenz_trajectories",
    "names",
    "recall_episodes",
    "relation_names",
    "score_reply",
    "training_mixture",
    "values",
    "world_story",
]
