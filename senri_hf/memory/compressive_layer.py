"""The cache layer of the compressive mechanism: the memory, what a segment still waits for, and how to go back."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .compressive import read_backwards
from .compressive_state import Associations, CompressiveState, MemoryShape, advance, by_head, look_up, take, take_in
from .layer import BUILT_IN, ROLLBACK_TOKENS, CountsContext, MemoryLayer, too_far_back
from .state import RowState, check_tensors


@dataclass(frozen=True)
class Progress:
    """A point in a conversation.

    Attributes:
        state: The memory that is written.
        tail: [B, columns, channels] what the convolution needs of the last tokens, zero at a conversation's start.
        open: Tokens of a segment that is not complete; None with segments of one token.
        committed: The memory that is read, where that is not the one that is written: what past conversations left.
            `blank` says that they left nothing.
    """

    state: CompressiveState
    tail: Tensor
    open: Associations | None = None
    committed: CompressiveState | None = None
    blank: bool = True

    @classmethod
    def begin(cls, batch_size: int, shape: MemoryShape, device: torch.device, *, commits: bool) -> "Progress":
        """The start of a life. `commits`: whether what a conversation wrote is read only after its end."""
        state = CompressiveState.empty(batch_size, shape, device)
        tail = torch.zeros(batch_size, shape.tail_columns, shape.tail_channels, device=device)
        return cls(state, tail, None, state if commits else None)

    def map(self, function: Callable[[Any], Any]) -> "Progress":
        """Apply `function` to every RowState and tensor held."""
        return replace(
            self,
            state=function(self.state),
            tail=function(self.tail),
            open=None if self.open is None else function(self.open),
            committed=None if self.committed is None else function(self.committed),
        )

    def after(
        self, queries: Tensor, tokens: Associations, shape: MemoryShape, sharpness: Tensor | None, *, writes: bool
    ) -> tuple[Tensor, "Progress"]:
        """What tokens read, [B, L, H, d_v], and the point after them.

        Args:
            queries: [B, L, H, d_k] features.
            sharpness: [H], None where there is one slot.
            writes: Whether the tokens are written.
        """
        now = replace(self, tail=tail_after(self.tail, tokens))
        if not writes:
            state = self.state if self.committed is None else self.committed
            return look_up(state, queries, shape, sharpness), now
        if shape.segment == 1:
            reads, state = advance(self.state, queries, tokens, shape, sharpness)
            now = replace(now, state=state)
        else:
            reads, now = now._by_segments(queries, tokens, shape, sharpness)
        if self.committed is not None:
            reads = look_up(self.committed, queries, shape, sharpness)
        return reads, now

    def over(
        self,
        queries: Tensor,
        tokens: Associations,
        shape: MemoryShape,
        sharpness: Tensor | None,
        *,
        writes: bool,
        carried: bool,
    ) -> tuple[Tensor, "Step"]:
        """`after` for a whole pass, with what the cache needs to take its last tokens back.

        Args:
            carried: Whether there is a cache: without one, no token is ever taken back.
        """
        old = tokens.columns - ROLLBACK_TOKENS
        if not carried or old <= 0:
            reads, now = self.after(queries, tokens, shape, sharpness, writes=writes)
            return reads, Step(now, self, Pass(tokens, writes))
        # Too far back ever to be taken back: taken in, not kept.
        first, rest, cut = tokens.first(old), tokens.last(ROLLBACK_TOKENS), tokens.taken(old)
        asked = take(queries, cut + torch.arange(ROLLBACK_TOKENS, device=cut.device))
        early, before = self.after(queries[:, :old], first, shape, sharpness, writes=writes)
        late, now = before.after(asked, rest, shape, sharpness, writes=writes)
        column = torch.arange(tokens.columns, device=cut.device)
        reads = take(torch.cat([early, late], dim=1), torch.where(column < cut, column, column - cut + old))
        return reads, Step(now, before, Pass(rest, writes))

    def _by_segments(
        self, queries: Tensor, tokens: Associations, shape: MemoryShape, sharpness: Tensor | None
    ) -> tuple[Tensor, "Progress"]:
        """`after` with a memory that stands still inside a segment."""
        length = shape.segment
        waiting = tokens.map(lambda tensor: tensor[:, :0].clone()) if self.open is None else self.open
        waits, new = waiting.written.sum(1, keepdim=True), tokens.written.sum(1, keepdim=True)
        # Columns in which every row's segments start at the same places: first what waits, then what is new.
        width = waiting.keys.shape[1] + tokens.keys.shape[1]
        column = torch.arange(width, device=waits.device)
        source = torch.where(column < waits, column, waiting.keys.shape[1] + column - waits).clamp_max(width - 1)
        row = torch.arange(waits.shape[0], device=waits.device)[:, None]
        stands = replace(waiting, written=column < waits + new)
        stands = replace(
            stands,
            keys=torch.cat([waiting.keys, tokens.keys], dim=1)[row, source],
            values=torch.cat([waiting.values, tokens.values], dim=1)[row, source],
        )
        asks = torch.cat([torch.zeros_like(waiting.keys), queries], dim=1)[row, source]
        state, reads = self.state, []
        for start in range(0, width, length):
            reads.append(look_up(state, asks[:, start : start + length], shape, sharpness))
            if start + length <= width:
                complete = (waits + new >= start + length).expand(-1, length)
                state = take_in(state, part(stands, start, length, complete), shape)
        answers = torch.cat(reads, dim=1)[row, (waits + column[: tokens.keys.shape[1]]).clamp_max(width - 1)]
        total = waits + new
        rest = total // length * length + torch.arange(min(length - 1, width), device=total.device)
        opened = replace(
            stands,
            keys=stands.keys[row, rest.clamp_max(width - 1)],
            values=stands.values[row, rest.clamp_max(width - 1)],
            written=rest < total,
        )
        return answers, replace(self, state=state, open=opened)

    def closed(self, shape: MemoryShape) -> CompressiveState:
        """The memory as it is once the conversation is over."""
        return self.state if self.open is None else take_in(self.state, self.open, shape)


def part(tokens: Associations, start: int, length: int, written: Tensor) -> Associations:
    """`length` columns of keys and values from `start` on, of which `written` [B, length] are to be written."""
    columns = slice(start, start + length)
    return replace(tokens, keys=tokens.keys[:, columns], values=tokens.values[:, columns], written=written)


def tail_after(tail: Tensor, tokens: Associations) -> Tensor:
    """The last `tail.shape[1]` columns that a convolution took in, once tokens have been taken in."""
    if not tail.shape[1]:
        return tail
    joined = torch.cat([tail.to(tokens.raw.dtype), tokens.raw], dim=1)
    last = tokens.valid.sum(1, keepdim=True) + torch.arange(tail.shape[1], device=tail.device)
    return joined[torch.arange(tail.shape[0], device=tail.device)[:, None], last]


@dataclass(frozen=True)
class Pass:
    """Tokens of one forward pass, and whether they were written."""

    tokens: Associations
    writes: bool

    def replay(self, point: Progress, shape: MemoryShape) -> Progress:
        """The point after these tokens."""
        if not self.writes:
            return replace(point, tail=tail_after(point.tail, self.tokens))
        sharpness = self.tokens.keys.new_zeros(shape.heads) if shape.slots > 1 else None
        return point.after(self.tokens.keys, self.tokens, shape, sharpness, writes=True)[1]


@dataclass(frozen=True)
class Step:
    """What a pass leaves for the cache.

    Attributes:
        now: The point after it.
        before: The point before `last`.
        last: Its last tokens, as many as can be taken back.
    """

    now: Progress
    before: Progress
    last: Pass


@dataclass(frozen=True)
class Journal:
    """Two earlier points and the passes that came after each: last tokens are taken back by replaying without them.

    Passes are replayed one by one, as they came, so that what was there between two of them is there again bit for bit.
    The older point lies at least `ROLLBACK_TOKENS` columns back, or at the start of the conversation.
    """

    older: Progress
    newer: Progress
    between: tuple[Pass, ...] = ()
    since: tuple[Pass, ...] = ()
    columns: int = 0  # in `since`


class CompressiveLayer(MemoryLayer):
    """Compressive memory of one layer, for the rows of a batch.

    Args:
        shape: What it is made of. None in a cache that was made from a config alone: the model says it then.
        commits: Whether what a conversation wrote is read only after it.
    """

    _layer_type = "senri_memory"

    def __init__(
        self,
        shape: MemoryShape | None = None,
        layer_idx: int = 0,
        adapter_name: str = BUILT_IN,
        commits: bool = False,
        writes_generated: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_idx, adapter_name)
        self.shape = shape
        self.commits = commits
        self.writes_generated = writes_generated
        self.columns = 0  # of the open conversation
        # In a static cache masks span all of its columns, and transformers asks all layers whether it is one.
        self.is_compileable = "max_cache_len" in kwargs
        self.now: Progress | None = None
        self.journal: Journal | None = None

    # What the module that reads and writes asks.

    def point(self, shape: MemoryShape, batch_size: int, device: torch.device) -> Progress:
        """Where the conversation stands, for a batch of as many rows."""
        self.check_rows(batch_size)
        self.follow(device)
        self.shape = shape
        if self.now is None:
            return Progress.begin(batch_size, shape, device, commits=self.commits)
        return self.now

    def commit(self, step: Step, columns: int) -> None:
        """Take in what a pass over `columns` columns left."""
        if step.last.tokens.columns < columns or self.journal is None:
            journal = Journal(step.before, step.before)
        else:
            journal = self.journal
            if journal.columns >= ROLLBACK_TOKENS:
                journal = Journal(journal.newer, step.before, between=journal.since)
        self.journal = replace(
            journal, since=(*journal.since, step.last), columns=journal.columns + step.last.tokens.columns
        )
        self.now = step.now
        self.columns += columns

    # What is done with slots and whole matrices; `AssociativeOperations` says more.

    @property
    def rules(self) -> list[dict[str, Any]]:
        return [] if self.shape is None else [asdict(self.shape.rule)]

    @property
    def removes(self) -> bool:
        """Whether a write depends on what memory holds, so that memories cannot be added up."""
        return self.shape is None or self.shape.rule.removes

    def check_slots(self, slots: Sequence[int]) -> list[int]:
        """The slots as a list; ValueError unless each is there, once."""
        count, chosen = 0 if self.shape is None else self.shape.slots, list(slots)
        if not chosen or len(set(chosen)) != len(chosen) or not all(type(i) is int and 0 <= i < count for i in chosen):
            raise ValueError(
                f"slots={chosen} was given, but layer {self.layer_idx} has slots 0 to {count - 1}, each once"
            )
        return chosen

    def freeze(self, slots: list[int], *, frozen: bool) -> None:
        assert self.now is not None
        committed = self.now.committed
        state = self.now.state.freeze(slots, frozen=frozen)
        if committed is not None:
            same = committed is self.now.state
            committed = state if same else committed.freeze(slots, frozen=frozen)
        # What came before was written by other slots: it cannot be replayed any more.
        self.now, self.journal = replace(self.now, state=state, committed=committed), None

    def slot_tensors(self, slots: list[int]) -> dict[str, Tensor]:
        """What slots hold, [B, K, ...] by name, as it would be after `clear_context()`."""
        assert self.now is not None and self.shape is not None
        state = self.now.closed(self.shape).detach()
        return {"memory": state.memory[:, slots], "normaliser": state.normaliser[:, slots]}

    def check_slot_tensors(self, tensors: dict[str, Tensor], count: int) -> None:
        """ValueError naming what does not fit in what `slot_tensors` gave for `count` slots."""
        assert self.shape is not None
        rows = tensors["memory"].shape[0] if "memory" in tensors and tensors["memory"].dim() else 1
        if self.rows is not None and rows not in (1, self.rows):
            raise ValueError(f"The slots are of {rows} rows, but this memory holds {self.rows}")
        shape = replace(self.shape, slots=count)
        empty = CompressiveState.empty(rows, shape, torch.device("meta"))
        expected = {"memory": empty.memory, "normaliser": empty.normaliser}
        check_tensors(tensors, expected, f"layer {self.layer_idx}")

    def put_slots(self, slots: list[int], tensors: dict[str, Tensor], *, freeze: bool) -> None:
        """Hold in slots what `slot_tensors` gave, already checked."""
        assert self.shape is not None
        memory, normaliser = tensors["memory"], tensors["normaliser"]
        if self.now is None:
            state = CompressiveState.empty(memory.shape[0], self.shape, memory.device)
        else:
            state = self.now.closed(self.shape)
        device = state.memory.device
        state = state.put(slots, memory.to(device), normaliser.to(device))
        self.hold(state.freeze(slots, frozen=True) if freeze else state)

    def hold(self, state: CompressiveState | None) -> None:
        """Hold a memory, with no conversation open; None for an empty one."""
        if state is None:
            self.reset()
        else:
            self._begin_with(state)

    def merged(self, other: "CompressiveLayer", base: "CompressiveLayer | None") -> CompressiveState | None:
        """The memory with what `other` was written with after `base`; see `AssociativeOperations.merge`."""
        if other.shape != self.shape:
            raise ValueError(
                f"The memories of layer {self.layer_idx} do not fit: this one is {self.shape}, the other {other.shape}"
            )
        if other.now is None or self.shape is None:
            return None if self.now is None else self.now.state
        theirs = other.now.closed(self.shape)
        if self.now is None:
            ours = CompressiveState.empty(theirs.batch_size, self.shape, theirs.memory.device)
        else:
            ours = self.now.closed(self.shape)
        if ours.batch_size != theirs.batch_size:
            raise ValueError(f"This memory holds {ours.batch_size} row(s), the other one {theirs.batch_size}")
        device = ours.memory.device
        if base is None or base.now is None:
            before = CompressiveState.empty(theirs.batch_size, self.shape, theirs.memory.device)
        else:
            before = base.now.closed(self.shape)
        if not self.removes:
            written = ~ours.frozen[:, :, None, None]
            normaliser = (theirs.normaliser - before.normaliser).to(device) * written
            memory = (theirs.memory - before.memory).to(device) * written[..., None]
            return replace(
                ours,
                memory=ours.memory + memory,
                normaliser=ours.normaliser + normaliser,
                tokens=ours.tokens + (theirs.tokens - before.tokens).to(device),
            )
        start = other.now if other.journal is None else other.journal.older
        same = torch.equal(start.state.tokens, before.tokens) and torch.equal(start.state.memory, before.memory)
        if not same:
            raise ValueError(
                f"What the other memory read cannot be written again in layer {self.layer_idx}: the rule "
                f"{self.shape.rule.name!r} takes away what it finds, so that matrices cannot be added up, and only the "
                f"last {ROLLBACK_TOKENS} tokens of an open conversation are kept as they were read. Merge before "
                "clear_context(), after short texts; or hand slots on, with export_slots and import_slots; or use "
                "the rule 'additive'"
            )
        point = Progress.begin(ours.batch_size, self.shape, device, commits=False)
        waiting = None if start.open is None else start.open.map(lambda tensor: tensor.to(device))
        point = replace(point, state=ours, open=waiting)
        for one in () if other.journal is None else (*other.journal.between, *other.journal.since):
            moved = replace(one, tokens=one.tokens.map(lambda tensor: tensor.to(device)))
            point = moved.replay(point, self.shape)
        return point.closed(self.shape)

    def read_reverse(self, values: Tensor) -> Tensor:
        assert self.now is not None and self.shape is not None
        state = self.now.closed(self.shape) if self.now.committed is None else self.now.committed
        expected = [state.batch_size, self.shape.heads, self.shape.value_dim]
        if values.dim() != 4 or [values.shape[0], *values.shape[2:]] != expected:
            raise ValueError(
                f"values of shape {list(values.shape)} were given, but layer {self.layer_idx} holds values of "
                f"[{expected[0]}, T, {expected[1]}, {expected[2]}]"
            )
        return read_backwards(state.memory, by_head(values)).sum(1).transpose(1, 2)

    # What the cache asks.

    def rollback(self, tokens: int) -> None:
        if tokens == 0 or self.now is None:
            self.columns -= min(tokens, self.columns)
            return
        passes = () if self.journal is None else (*self.journal.between, *self.journal.since)
        held = sum(one.tokens.columns for one in passes)
        if tokens > held:
            raise too_far_back(tokens, held)
        assert self.journal is not None and self.shape is not None
        kept, left = [], held - tokens
        for one in passes:
            columns = min(one.tokens.columns, left)
            left -= columns
            if columns:
                whole = columns == one.tokens.columns
                kept.append(one if whole else replace(one, tokens=one.tokens.first(columns)))
        now = self.journal.older
        self.journal = Journal(now, now, since=tuple(kept), columns=held - tokens)
        for one in kept:
            now = one.replay(now, self.shape)
        self.now = now
        self.columns -= tokens

    def clear_context(self) -> None:
        self.journal, self.columns = None, 0
        if self.now is None or self.shape is None:
            return
        self._begin_with(self.now.closed(self.shape))

    def _begin_with(self, state: CompressiveState) -> None:
        """Have a conversation begin with this memory."""
        assert self.shape is not None
        self.journal, self.columns = None, 0
        begun = Progress.begin(state.batch_size, self.shape, state.memory.device, commits=self.commits)
        self.now = replace(begun, state=state, committed=state if self.commits else None, blank=state.is_blank)

    def reset(self) -> None:
        self.now, self.journal, self.columns = None, None, 0

    def reset_but_frozen(self) -> None:
        if self.now is not None and bool(self.now.state.frozen.any()):
            self._begin_with(self.now.state.keep_frozen())
        else:
            self.reset()

    def decay(self, cycles: int) -> None:
        """Nothing: this memory forgets by what is written into it, not by time."""

    def detach(self) -> None:
        self.journal = None
        if self.now is not None:
            self.now = self.now.map(lambda part: part.detach())

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.now is None:
            return
        done: dict[int, Any] = {}

        def once(part: Any) -> Any:
            """The same object stays the same object."""
            if id(part) not in done:
                done[id(part)] = (part.map(function) if isinstance(part, RowState) else function(part), part)
            return done[id(part)][0]

        def moved(one: Pass) -> Pass:
            return replace(one, tokens=once(one.tokens))

        self.now = self.now.map(once)
        if self.journal is not None:
            self.journal = replace(
                self.journal,
                older=self.journal.older.map(once),
                newer=self.journal.newer.map(once),
                between=tuple(map(moved, self.journal.between)),
                since=tuple(map(moved, self.journal.since)),
            )

    def copy(self) -> "CompressiveLayer":
        layer = copy.copy(self)
        layer.losses = []
        return layer

    def state_dict(self) -> dict[str, Tensor]:
        if self.now is None or self.shape is None:
            return {}
        state = self.now.closed(self.shape).detach()
        return {} if state.is_blank and not bool(state.frozen.any()) else state.tensors()

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        if self.shape is None:
            raise ValueError("This cache was made without its model. Use MemoryCache.for_model(model)")
        rows = tensors["tokens"].numel() if "tokens" in tensors else 1
        expected = CompressiveState.empty(rows, self.shape, torch.device("meta")).tensors()
        check_tensors(tensors, expected, f"layer {self.layer_idx}")
        largest = {"slot": self.shape.slots - 1, "tokens": None, "filled": None}
        if self.shape.slots > 1:
            largest["filled"] = self.shape.slot_tokens - 1
        for name, most in largest.items():
            counts = tensors[name].tolist()
            if not all(count >= 0 and (most is None or count <= most) for count in counts):
                raise ValueError(
                    f"The memory of layer {self.layer_idx} is damaged: {name} is {counts}, but must be at least 0"
                    f"{'' if most is None else f' and at most {most}'}. Use an earlier copy"
                )

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.reset()
        if tensors:
            self._begin_with(CompressiveState(**tensors))

    @property
    def rows(self) -> int | None:
        return None if self.now is None else self.now.state.batch_size

    @property
    def device(self) -> torch.device | None:
        return None if self.now is None else self.now.state.tokens.device

    @property
    def nbytes(self) -> int:
        if self.now is None:
            return 0
        parts: list[RowState] = [self.now.state]
        if self.now.committed is not None and self.now.committed is not self.now.state:
            parts.append(self.now.committed)
        if self.now.open is not None:
            parts.append(self.now.open)
        return sum(part.nbytes for part in parts)

    @property
    def nbytes_per_row(self) -> int:
        """Bytes that a row's memory takes once something is written."""
        if self.shape is None:
            return 0
        return CompressiveState.empty(1, self.shape, torch.device("meta")).nbytes

    @property
    def tokens_seen(self) -> Tensor | None:
        if self.now is None:
            return None
        return self.now.state.tokens + (0 if self.now.open is None else self.now.open.written.sum(1))

    @property
    def is_blank(self) -> bool:
        """Whether nothing was ever written, and no slot imported or frozen."""
        state = None if self.now is None else self.now.state
        return state is None or (super().is_blank and not bool(state.memory.any() | state.frozen.any()))

    def summary(self) -> dict[str, float]:
        if self.now is None or self.shape is None:
            return {}
        state = self.now.closed(self.shape)
        used = state.memory.flatten(2).any(-1)
        return {
            "slots used": used.float().mean().item(),
            "slots frozen": state.frozen.float().mean().item(),
            "root mean square of the matrix": state.memory.square().mean().sqrt().item(),
        }


class CountingCompressiveLayer(CountsContext, CompressiveLayer, CacheLayerMixin):
    """The first layer of a model in which no layer holds keys and values: it says how long the context is."""

    _layer_type = "counting_senri_memory"  # type: ignore[misc]
