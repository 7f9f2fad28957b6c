"""Settings of memory without training: keys and values that the model's own attention reads."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any, Self


# Of 1, 1.2 and 1.4 the one with which remembered values surprise SmolLM2 least, read from 64 slots:
# benchmarks/training_free_settings.py.
SHARPNESS = 1.2
POLICIES = ("surprise", "recent", "random", "all")
# Settings that not every policy reads, with those that do.
READ_BY = {
    "keep_share": ("surprise", "random"),
    **dict.fromkeys(
        ("min_surprise", "span", "decay_rate", "read_gain", "min_importance", "merge_similarity"), ("surprise",)
    ),
}


@dataclass
class AttentionMemoryConfig:
    """What is kept of a conversation's keys and values, and for how long.

    The importance of a token is its surprise, -log p under the model in nats, less with every conversation that passes
    and more when it is read. Settings of importance are `policy="surprise"`'s; with another policy they are refused.

    Args:
        slots: Tokens that memory holds at most.
        policy: What is kept when there are more. `"surprise"`: the most important; `"recent"`: the last; `"random"`:
            any, for comparison; `"all"`: everything, and an error when it does not fit.
        keep_share: Share in (0, 1] of a conversation's tokens that may stay, the most important ones, for
            `policy="surprise"` and `"random"`. Even where there is room, less is remembered better.
        min_surprise: A token less surprising than this, in nats, is not taken in.
        span: Tokens after a surprising one that are as important as it is: a name is often several tokens, of which
            only the first surprises.
        sinks: The first tokens of a memory's life, which stay for good: attention needs somewhere to rest.
        decay_rate: Factor in (0, 1] on every importance, once per conversation boundary.
        read_gain: What a token's importance gains, in nats, when the whole attention of one token of a conversation
            goes to it, in the middle layer and as a mean over heads: what is read stays.
        min_importance: A token less important than this, in nats, is forgotten.
        merge_similarity: Cosine similarity of values from which on a token is the same as a stored one with the same
            id; the stored one then becomes as important as the new one, which is not stored again. Above 1 nothing is.
        sharpness: Factor on the score that attention gives to a remembered token, as an inverse temperature. 1 reads
            memory as the context that it was; above 1 more of what is read comes from the tokens that fit best. None
            stands for 1.2, and for 1 with `policy="all"`, which is to be that context.
    """

    slots: int = field(default=512, metadata={"help": "Tokens that memory holds at most."})
    policy: str = field(default="surprise", metadata={"help": f"What is kept, one of {POLICIES}."})
    keep_share: float = field(default=0.5, metadata={"help": "Share of a conversation's tokens that may stay."})
    min_surprise: float = field(default=2.0, metadata={"help": "Less surprising tokens are not taken in."})
    span: int = field(default=1, metadata={"help": "Tokens after a surprising one that go with it."})
    sinks: int = field(default=4, metadata={"help": "First tokens of all, which stay for good."})
    decay_rate: float = field(default=0.99, metadata={"help": "Importance retained per conversation boundary."})
    read_gain: float = field(default=1.0, metadata={"help": "Nats of importance per token's attention when read."})
    min_importance: float = field(default=0.05, metadata={"help": "Less important tokens are forgotten."})
    merge_similarity: float = field(default=0.95, metadata={"help": "Cosine from which a token is a stored one."})
    sharpness: float | None = field(default=None, metadata={"help": "Factor on the scores of remembered tokens."})

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("span", 0), ("sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} was given, but {name} must be a whole number of at least {least}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} was given, but policy must be one of {POLICIES}")
        defaults = {f.name: f.default for f in fields(self)}
        for name, policies in READ_BY.items():
            if self.policy not in policies and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} was given with policy={self.policy!r}, which does not read it; it "
                    f"is for policy={' or '.join(map(repr, policies))}"
                )
        if self.sharpness is None:
            self.sharpness = 1.0 if self.policy == "all" else SHARPNESS
        infinity = float("inf")
        for name, lowest, highest in (
            ("keep_share", 0.0, 1.0),
            ("decay_rate", 0.0, 1.0),
            ("min_surprise", 0.0, infinity),
            ("read_gain", 0.0, infinity),
            ("min_importance", 0.0, infinity),
            ("merge_similarity", -1.0, infinity),
            ("sharpness", 0.0, infinity),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest <= value <= highest:
                raise ValueError(f"{name}={value!r} was given, but {name} must be a number from {lowest} to {highest}")
        for name in ("read_gain", "sharpness"):
            if getattr(self, name) == infinity:
                raise ValueError(f"{name}=inf was given, but {name} must be finite")
        for name in ("keep_share", "decay_rate", "sharpness"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 was given, but {name} must be more than 0")
        if self.sinks >= self.slots:
            raise ValueError(
                f"sinks={self.sinks} was given with slots={self.slots}, but the first tokens stay for good and would "
                "leave no room; raise slots or lower sinks"
            )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Self:
        """The settings by name; a name that there is not is a ValueError naming the nearest that there is."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
                raise ValueError(f"{name}={settings[name]!r} was given, but memory has no setting {name!r}{hint}")
        return cls(**settings)
