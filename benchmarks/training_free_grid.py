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


def cell(suite: str, distractors: int) -> str:
    """What the answers of a suite after some distractors are called."""
    return f"{suite}, {distractors} distractors" if distractors else suite


def methods(slots: tuple[int, ...] = SLOTS, policies: tuple[str, ...] = POLICIES) -> dict[str, dict[str, Any] | None]:
    """Memory settings by name, None for those without memory of ours; large memories first, as they may stand for small
    ones.
    """
    counts = sorted(slots, reverse=True)
    ours = {f"{policy}, {count} slots": {"policy": policy, "slots": count} for policy in policies for count in counts}
    return {**ours, **dict.fromkeys(BASELINES)}
