"""What is asked of memory without training: the cells of the benchmark and of its page."""

from typing import Any


SUITES: dict[str, dict[str, Any]] = {
    "five facts": {"facts": 5, "questions": 5},
    "names": {"relations": "name"},
    "after a correction": {"facts": 3, "correction": True},
}
SLOTS = (64, 128, 256, 512, 1024)
DISTRACTORS = (0, 5, 20, 50)
POLICIES = ("surprise", "recent", "random")
BASELINES = ("kept in context", "trained adapter", "text prepended", "no memory")
EPISODES, SEEDS = 200, 2
LIFE = 1000  # conversations of a long life


def cell(suite: str, distractors: int) -> str:
    """What the answers of a suite after some distractors are called."""
    return f"{suite}, {distractors} distractors" if distractors else suite


def methods(slots: tuple[int, ...] = SLOTS, policies: tuple[str, ...] = POLICIES) -> dict[str, dict[str, Any] | None]:
    """Memory settings by name, None for those without memory of ours, in the order in which they are run.

    First what tells most: the whole context beside the smallest memories; then from the largest, which may stand for
    those between.
    """
    smallest, *others = sorted(slots) or [0]
    counts = [smallest, *reversed(others)]
    ours = {f"{policy}, {count} slots": {"policy": policy, "slots": count} for count in counts for policy in policies}
    context, *baselines = BASELINES
    return {context: None, **ours, **dict.fromkeys(baselines)}
