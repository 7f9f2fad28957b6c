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


__all__ = [
    "Episode",
    "Question",
    "distractor_conversations",
    "names",
    "recall_episodes",
    "relation_names",
    "score_reply",
    "training_mixture",
    "values",
]
