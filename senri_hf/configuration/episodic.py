"""Settings of the episodic mechanism."""

from dataclasses import dataclass, field, fields


@dataclass
class EpisodicConfig:
    """How an episodic memory stores, forgets and reads.

    The short-term *buffer* takes every novel token and decays; the long-term *store* takes surprising tokens only.

    Args:
        buffer_slots: Slots of the buffer, at least `segment_length`.
        store_slots: Slots of the surprise-gated store; 0 leaves it out.
        decay_rate: Factor in (0, 1] on the strength of every buffer slot, once per conversation boundary.
        min_strength: A buffer slot weaker than this, in [0, 1), is forgotten: reads do not see it.
        novelty_threshold: Cosine similarity in (0, 1] from which on a token counts as known to the buffer and
            reinforces the slot nearest to it; below it the token takes the weakest slot.
        write_alpha: Weight in [0, 1] of the new token when it reinforces a slot.
        surprise: What the surprise of a token is. `"predictor"`: RMS error of a small trained predictor of its hidden
            state from that of the token before. `"nll"`: its negative log-likelihood under the model itself, which
            costs the LM head on every token read.
        predictor_rank: Inner width of the predictor.
        contrastive_weight: What the surprise of a token at least is that is similar to a stored slot and yet different
            from it: max(surprise, mean + contrastive_weight * c * deviation), with the contrast c in [0, 1] (see
            `contrastive_similarity`); 0 turns the contrastive term off.
        contrastive_similarity: Cosine similarity from which on a stored slot is similar enough to contrast with; c
            grows from 0 there to 1 at `consolidation_similarity`, from which on it is 0.
        ema_alpha: Weight in (0, 1] of a new token in the running mean and standard deviation of surprise.
        z_score_threshold: A token is surprising when it lies more than this many standard deviations above the mean.
        span: Tokens after a surprising one, in the same segment, that are as surprising as it is: a name is often
            several tokens, of which only the first surprises.
        capacity_pressure: How much a full store raises that number: z = z_score_threshold * (1 + pressure * fullness).
        consolidation_similarity: Cosine similarity in (0, 1] from which on a surprising token and a stored slot are
            the same thing: the more surprising of the two is kept.
        segment_length: Tokens that are written together, counted from the start of the conversation.
        read_scope: `"conversation"`: a token reads what past conversations left. `"committed_segments"`: it also reads
            the segments of its own conversation that were complete before it.
        write_generated: Whether tokens that `generate()` produced are written too. When False, tokens with which
            a call continues a context one at a time, as decoding does, and candidates of assisted decoding are only
            read.
        init: `"base_attention"`: queries, keys, values and output start as the layer's own attention projections,
            so that reading memory begins as re-reading the past. `"zero"`: random projections, the output zero.
        rank: With `init="base_attention"`, the rank of the trained change of each projection; None trains full copies.
            It is not read with `init="zero"`, whose projections are all trained.
        num_topics, topic_size: Topics by which past conversations are told apart, each pooled with weights of its own,
            and their width.
        num_heads: Read heads for `init="zero"`; the model's own number when None. `init="base_attention"` has the
            layer's heads and refuses a value.
    """

    buffer_slots: int = field(default=256, metadata={"help": "Slots of the decaying short-term buffer."})
    store_slots: int = field(default=128, metadata={"help": "Slots of the surprise-gated long-term store."})
    decay_rate: float = field(default=0.95, metadata={"help": "Buffer retention per conversation boundary."})
    min_strength: float = field(default=0.05, metadata={"help": "Weaker buffer slots are forgotten."})
    novelty_threshold: float = field(default=0.98, metadata={"help": "Cosine from which a token is known already."})
    write_alpha: float = field(default=0.5, metadata={"help": "Weight of the new token when it reinforces a slot."})
    surprise: str = field(default="predictor", metadata={"help": "'predictor' or 'nll'."})
    predictor_rank: int = field(default=64, metadata={"help": "Inner width of the surprise predictor."})
    contrastive_weight: float = field(default=2.0, metadata={"help": "Weight of the contrastive term; 0 is off."})
    contrastive_similarity: float = field(default=0.8, metadata={"help": "Cosine from which slots contrast."})
    ema_alpha: float = field(default=0.1, metadata={"help": "EMA weight of a new token in surprise statistics."})
    z_score_threshold: float = field(default=1.0, metadata={"help": "Surprise threshold in standard deviations."})
    span: int = field(default=2, metadata={"help": "Tokens after a surprising one that go with it."})
    capacity_pressure: float = field(default=0.5, metadata={"help": "How fullness raises the threshold."})
    consolidation_similarity: float = field(default=0.98, metadata={"help": "Cosine of the same stored thing."})
    segment_length: int = field(default=64, metadata={"help": "Tokens written together."})
    read_scope: str = field(default="conversation", metadata={"help": "'conversation' or 'committed_segments'."})
    write_generated: bool = field(default=True, metadata={"help": "Whether generated tokens are written."})
    init: str = field(default="base_attention", metadata={"help": "'base_attention' or 'zero'."})
    rank: int | None = field(default=16, metadata={"help": "Rank of the trained change of projections; None: full."})
    num_topics: int = field(default=4, metadata={"help": "Topics by which conversations are told apart."})
    topic_size: int = field(default=32, metadata={"help": "Width of the topics of conversations."})
    num_heads: int | None = field(default=None, metadata={"help": "Read heads for init='zero'."})

    def validate(self) -> None:
        """Raise ValueError naming the first setting that is out of its range."""
        for name, least in (
            ("buffer_slots", 1),
            ("store_slots", 0),
            ("predictor_rank", 1),
            ("segment_length", 1),
            ("num_topics", 1),
            ("topic_size", 1),
            ("span", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} was given, but {name} must be a whole number of at least {least}")
        infinity = float("inf")
        for name, lowest, highest in (
            ("decay_rate", 0.0, 1.0),
            ("min_strength", 0.0, 1.0),
            ("novelty_threshold", -1.0, 1.0),
            ("write_alpha", 0.0, 1.0),
            ("ema_alpha", 0.0, 1.0),
            ("consolidation_similarity", -1.0, 1.0),
            ("contrastive_similarity", -1.0, 1.0),
            ("contrastive_weight", 0.0, infinity),
            ("capacity_pressure", 0.0, infinity),
            ("z_score_threshold", -infinity, infinity),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest <= value <= highest:
                raise ValueError(f"{name}={value!r} was given, but {name} must be a number from {lowest} to {highest}")
        for name, allowed in (
            ("surprise", ("predictor", "nll")),
            ("read_scope", ("conversation", "committed_segments")),
            ("init", ("base_attention", "zero")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} was given, but {name} must be one of {allowed}")
        for name in ("decay_rate", "ema_alpha"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 was given, but {name} must be more than 0")
        if self.min_strength >= 1:
            raise ValueError(
                f"min_strength={self.min_strength} was given, but no slot would ever be read; it must be below 1"
            )
        if self.buffer_slots < self.segment_length:
            raise ValueError(
                f"buffer_slots={self.buffer_slots} is less than segment_length={self.segment_length}: a segment of "
                "novel tokens must fit into the buffer; raise buffer_slots or lower segment_length"
            )
        if self.contrastive_weight and self.contrastive_similarity >= self.consolidation_similarity:
            raise ValueError(
                f"contrastive_similarity={self.contrastive_similarity} must be below consolidation_similarity="
                f"{self.consolidation_similarity}; set contrastive_weight=0 to turn the contrastive term off"
            )
        if self.surprise == "nll" and self.read_scope == "committed_segments":
            raise ValueError(
                "surprise='nll' is known only after the whole forward pass, too late for "
                "read_scope='committed_segments', which writes inside it; use surprise='predictor'"
            )
        if self.init == "base_attention" and self.num_heads is not None:
            raise ValueError(
                f"num_heads={self.num_heads} was given with init='base_attention', whose heads are the layer's own; "
                "leave num_heads=None or use init='zero'"
            )
        if self.rank is not None and (not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank={self.rank!r} was given, but rank must be a whole number of at least 1, or None")
        if self.num_heads is not None and (not isinstance(self.num_heads, int) or self.num_heads < 1):
            raise ValueError(
                f"num_heads={self.num_heads!r} was given, but num_heads must be a whole number of at least 1"
            )

    @classmethod
    def of(cls, config: "EpisodicConfig") -> "EpisodicConfig":
        """The mechanism's own settings, out of a config that has more fields than these."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
