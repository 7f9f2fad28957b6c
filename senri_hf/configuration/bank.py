"""Settings of the bank mechanism."""

import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Any, Self


CAUSAL_STRATEGIES = ("token", "prefix", "rolling", "hybrid")
ROUTING_STRATEGIES = (*CAUSAL_STRATEGIES, "sequence")
SHARING = ("shared", "per_layer", "every_k_layers")
LOW_RANK_MODES = ("factorized", "reduced_dim")
QUANTIZED_BITS = (4, 8)


@dataclass
class BankConfig:
    """How a bank of learnable memory tokens is held, read and trained.

    A bank has `num_memory_tokens` rows. Without chapters every token reads all of them by cross-attention; with
    chapters a router chooses, token by token, the `top_k_chapters` of `num_chapters` groups of consecutive rows that
    are read, each with a softmax of its own, and mixes what they gave.

    Args:
        num_memory_tokens: Rows of a bank. With chapters every chapter has `num_memory_tokens // num_chapters` of them,
            and what is left over is not held.
        memory_dim: Width of a row; the hidden size when None.
        memory_num_heads: Heads of the cross-attention; when None the largest number that divides its width and is at
            most the model's own number of heads.
        memory_sharing: Which memory layers share a bank: `"shared"` all, `"per_layer"` none, `"every_k_layers"` those
            of every `memory_sharing_k` consecutive ones.
        memory_sharing_k: See `memory_sharing`.
        memory_dropout: Dropout on what memory adds; the model's own when None (0 in an adapter).
        use_low_rank_memory: Hold the bank by low rank, as `low_rank_mode` says.
        memory_rank: Rank of the bank.
        low_rank_mode: `"factorized"`: the rows are A B^T, with A [rows, rank] and B [memory_dim, rank].
            `"reduced_dim"`: rows and attention have `memory_rank` dimensions.
        use_low_rank_projections: Make each of the four projections up(down(x)) of rank `projection_rank`.
        projection_rank: See `use_low_rank_projections`.
        use_chapters: Read routed chapters instead of the whole bank.
        num_chapters: Chapters of a bank, those that are always read included.
        top_k_chapters: Chapters that a token reads by routing.
        num_shared_chapters: Chapters at the bank's start that every token reads, at weight 1, and that are not routed.
        routed_scaling_factor: Factor on what the routed chapters give together.
        normalize_router_weights: Divide a token's router weights by their sum; when None, yes unless one chapter only
            is read, which then could not teach the router.
        routing_strategy_train, routing_strategy_inference: What a token is routed by, while training and otherwise.
            `"token"`: its own state. `"prefix"`: the mean of its document's tokens up to it. `"rolling"`: the mean of
            the last `routing_window_size` of them. `"hybrid"`: prefix within the prompt, rolling after it.
            `"sequence"`: the mean of the whole sequence, which looks ahead: for encoders and classification.
        routing_window_size: See `"rolling"`.
        allow_lookahead_routing: Allow `"sequence"` where it lets tokens see what they are to predict: in the loss of a
            causal language model, in perplexity and in generation.
        use_load_balance_loss, load_balance_coefficient: Loss that spreads tokens evenly over chapters.
        use_auxiliary_loss, auxiliary_loss_coefficient: Loss that is the divergence of the mean router distribution from
            the uniform one.
        use_z_loss, z_loss_coefficient: Loss that keeps router logits small.
        memory_gradient_checkpointing: Compute reads again in the backward pass instead of keeping what they need.
        quantize_memory: Read rows as `memory_quant_bits` hold them. In training gradients pass straight through, so
            that the bank learns to be quantized.
        memory_quant_bits: 8 or 4 bits a value, with one scale a row.
        quantized_storage: Hold the bank as codes instead of floats; it is then frozen, and only the chapters that are
            read are made floats. `senri-hf merge --quantize` makes such a copy.
        wo_init_zero: Start the output projection at zero: a new memory then changes nothing.
        memory_init_std: Standard deviation of a new bank's values.
    """

    num_memory_tokens: int = field(default=1024, metadata={"help": "Rows of a bank."})
    memory_dim: int | None = field(default=None, metadata={"help": "Width of a row; the hidden size when None."})
    memory_num_heads: int | None = field(default=None, metadata={"help": "Heads of the cross-attention."})
    memory_sharing: str = field(default="shared", metadata={"help": f"Which layers share a bank: {SHARING}."})
    memory_sharing_k: int = field(default=2, metadata={"help": "Layers a bank for 'every_k_layers'."})
    memory_dropout: float | None = field(default=None, metadata={"help": "Dropout on what memory adds."})
    use_low_rank_memory: bool = field(default=False, metadata={"help": "Hold the bank by low rank."})
    memory_rank: int = field(default=64, metadata={"help": "Rank of the bank."})
    low_rank_mode: str = field(default="factorized", metadata={"help": f"One of {LOW_RANK_MODES}."})
    use_low_rank_projections: bool = field(default=False, metadata={"help": "Make the projections low-rank."})
    projection_rank: int = field(default=64, metadata={"help": "Rank of the projections."})
    use_chapters: bool = field(default=False, metadata={"help": "Read routed chapters instead of the whole bank."})
    num_chapters: int = field(default=100, metadata={"help": "Chapters of a bank."})
    top_k_chapters: int = field(default=20, metadata={"help": "Chapters that a token reads by routing."})
    num_shared_chapters: int = field(default=0, metadata={"help": "Chapters that every token reads."})
    routed_scaling_factor: float = field(default=1.0, metadata={"help": "Factor on what routed chapters give."})
    normalize_router_weights: bool | None = field(default=None, metadata={"help": "Let router weights sum to 1."})
    routing_strategy_train: str = field(default="prefix", metadata={"help": f"One of {ROUTING_STRATEGIES}."})
    routing_strategy_inference: str = field(default="prefix", metadata={"help": f"One of {ROUTING_STRATEGIES}."})
    routing_window_size: int = field(default=128, metadata={"help": "Tokens of a rolling mean."})
    allow_lookahead_routing: bool = field(default=False, metadata={"help": "Allow 'sequence' in causal models."})
    use_load_balance_loss: bool = field(default=True, metadata={"help": "Spread tokens evenly over chapters."})
    load_balance_coefficient: float = field(default=0.01, metadata={"help": "Weight of that loss."})
    use_auxiliary_loss: bool = field(default=False, metadata={"help": "Pull the mean router distribution to uniform."})
    auxiliary_loss_coefficient: float = field(default=0.01, metadata={"help": "Weight of that loss."})
    use_z_loss: bool = field(default=False, metadata={"help": "Keep router logits small."})
    z_loss_coefficient: float = field(default=0.001, metadata={"help": "Weight of that loss."})
    memory_gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute reads in the backward pass."}
    )
    quantize_memory: bool = field(default=False, metadata={"help": "Read rows as few bits hold them."})
    memory_quant_bits: int = field(default=8, metadata={"help": f"One of {QUANTIZED_BITS}."})
    quantized_storage: bool = field(default=False, metadata={"help": "Hold the bank as codes; it is then frozen."})
    wo_init_zero: bool = field(default=True, metadata={"help": "Start the output projection at zero."})
    memory_init_std: float = field(default=0.02, metadata={"help": "Standard deviation of a new bank's values."})

    def check_bank(self) -> None:
        """Raise ValueError naming the first setting of the bank that is out of its range or contradicts another."""
        for name, least in (
            ("num_memory_tokens", 1),
            ("memory_sharing_k", 1),
            ("memory_rank", 1),
            ("projection_rank", 1),
            ("num_chapters", 1),
            ("top_k_chapters", 1),
            ("num_shared_chapters", 0),
            ("routing_window_size", 1),
        ):
            check_whole(name, getattr(self, name), least)
        for name in ("memory_dim", "memory_num_heads"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name, highest in (
            ("memory_dropout", 1.0),
            ("routed_scaling_factor", float("inf")),
            ("load_balance_coefficient", float("inf")),
            ("auxiliary_loss_coefficient", float("inf")),
            ("z_loss_coefficient", float("inf")),
            ("memory_init_std", float("inf")),
        ):
            value = getattr(self, name)
            if name == "memory_dropout" and value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or not 0 <= value <= highest:
                raise ValueError(f"{name}={value!r} was given, but {name} must be a number from 0 to {highest}")
        for name, allowed in (
            ("memory_sharing", SHARING),
            ("low_rank_mode", LOW_RANK_MODES),
            ("routing_strategy_train", ROUTING_STRATEGIES),
            ("routing_strategy_inference", ROUTING_STRATEGIES),
            ("memory_quant_bits", QUANTIZED_BITS),
        ):
            check_choice(name, getattr(self, name), allowed)
        for field_ in fields(BankConfig):
            name, value = field_.name, getattr(self, field_.name)
            if field_.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} was given, but {name} must be true or false")
            if field_.type == bool | None and not isinstance(value, bool | None):
                raise ValueError(f"{name}={value!r} was given, but {name} must be true, false or null")
        if self.use_low_rank_memory and self.low_rank_mode == "reduced_dim" and self.memory_dim is not None:
            raise ValueError(
                f"memory_dim={self.memory_dim} was given with low_rank_mode='reduced_dim', whose rows are memory_rank="
                f"{self.memory_rank} wide; leave memory_dim out"
            )
        if self.use_chapters:
            self._check_chapters()
        if self.quantized_storage and not self.quantize_memory:
            raise ValueError("quantized_storage=True was given without quantize_memory=True, which it follows from")

    def _check_chapters(self) -> None:
        routed = self.num_chapters - self.num_shared_chapters
        if self.num_chapters > self.num_memory_tokens:
            raise ValueError(
                f"num_chapters={self.num_chapters} was given, but a bank of num_memory_tokens={self.num_memory_tokens} "
                "rows has at most that many chapters"
            )
        if self.top_k_chapters > routed:
            raise ValueError(
                f"top_k_chapters={self.top_k_chapters} was given, but only {routed} chapters are routed "
                f"(num_chapters={self.num_chapters}, num_shared_chapters={self.num_shared_chapters})"
            )
        if self.normalize_router_weights and self.top_k_chapters == 1:
            raise ValueError(
                "normalize_router_weights=True was given with top_k_chapters=1: the one weight would always be 1 and "
                "the router never learn; leave it out"
            )

    @property
    def tokens_per_chapter(self) -> int:
        """Rows of a chapter; of the whole bank where there are no chapters."""
        return self.num_memory_tokens // self.num_chapters if self.use_chapters else self.num_memory_tokens

    @property
    def bank_rows(self) -> int:
        """Rows that a bank really holds: whole chapters only."""
        return self.tokens_per_chapter * self.num_chapters if self.use_chapters else self.num_memory_tokens

    @property
    def router_weights_are_normalized(self) -> bool:
        """Whether a token's router weights sum to 1."""
        if self.normalize_router_weights is None:
            return self.top_k_chapters > 1
        return self.normalize_router_weights

    @property
    def routing_strategies(self) -> tuple[str, ...]:
        """The strategies in use, that of training first; none without chapters."""
        return (self.routing_strategy_train, self.routing_strategy_inference) if self.use_chapters else ()

    @property
    def looks_ahead(self) -> tuple[str, ...]:
        """The settings by which tokens are routed by their future."""
        names = ("routing_strategy_train", "routing_strategy_inference")
        return tuple(name for name in names if self.use_chapters and getattr(self, name) == "sequence")

    def bank_of_layer(self, order: int) -> int:
        """The number of the bank that the memory layer at place `order` among memory layers reads."""
        return {"shared": 0, "per_layer": order, "every_k_layers": order // self.memory_sharing_k}[self.memory_sharing]

    @classmethod
    def of(cls, config: Any) -> Self:
        """The mechanism's own settings, out of a config that has more fields than these."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


def check_whole(name: str, value: Any, least: int) -> None:
    """ValueError when a setting is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} was given, but {name} must be a whole number of at least {least}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """ValueError, with the nearest right value, when a setting is none of those allowed."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} was given, but {name} must be one of {allowed}{hint}")


def lookahead_error(settings: tuple[str, ...], what: str) -> ValueError:
    """Why routing that looks ahead is refused."""
    return ValueError(
        f"{' and '.join(settings)}='sequence' routes every token by the mean of the whole sequence, so {what} would "
        "see the tokens to be predicted, and its numbers would not be those of a language model. Use 'prefix', "
        "'rolling', 'hybrid' or 'token', or set allow_lookahead_routing=True if that is what you want"
    )
