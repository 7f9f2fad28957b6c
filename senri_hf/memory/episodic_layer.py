"""The cache layer of the episodic mechanism: what is committed, what is staged, and the open segment."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..configuration import EpisodicConfig
from .episodic import EMPTY, EpisodicState, add_access, end_conversation, pass_cycles, stage_segment, take
from .layer import BUILT_IN, ROLLBACK_TOKENS, MemoryLayer, too_far_back
from .state import RowState, check_tensors


# Columns of decoding that are taken in together: work for each of them by itself would cost more than what it does.
WAITING_TOKENS = 32


@dataclass(frozen=True)
class Tokens(RowState):
    """Columns of tokens that wait for their segment to be complete; only `real` ones are written."""

    hidden: Tensor  # [B, T, D]
    surprise: Tensor  # [B, T]
    access: Tensor  # [B, T, M] attention mass that the token's read gave to every store slot; [B, T, 0] for none
    asked: Tensor  # [B, T, K] what the token adds to what the open conversation asks about
    real: Tensor  # [B, T] bool

    @property
    def columns(self) -> int:
        return self.real.shape[1]

    def slice(self, start: int, stop: int) -> "Tokens":
        return self.map(lambda tensor: tensor[:, start:stop])

    def at(self, index: Tensor) -> "Tokens":
        """Row by row, the columns index [B, K]."""
        return Tokens(
            take(self.hidden, index),
            self.surprise.gather(1, index),
            take(self.access, index),
            take(self.asked, index),
            self.real.gather(1, index),
        )

    @classmethod
    def join(cls, chunks: "tuple[Tokens, ...] | list[Tokens]") -> "Tokens":
        if len(chunks) == 1:
            return chunks[0]
        return cls(*(torch.cat(parts, dim=1) for parts in zip(*(c.tensors().values() for c in chunks), strict=True)))


@dataclass(frozen=True)
class Progress:
    """A point in a conversation.

    Attributes:
        committed: The memory that is read; `blank` says that nothing was ever committed to it.
        staged: The memory that is written.
        open: Tokens of the open segment, in the chunks in which they came.
        previous: [B, D] the last token so far, zero where there is none.
        asked: [B, K] the sum of what the conversation's tokens added to what it asks about; None before the first.
        open_bound: Upper bound of the open segment's length in any row, known without asking the device.
    """

    committed: EpisodicState
    staged: EpisodicState
    previous: Tensor
    open: tuple[Tokens, ...] = ()
    open_bound: int = 0
    blank: bool = True
    asked: Tensor | None = None

    def map(self, function: Callable[[Any], Any]) -> "Progress":
        """Apply `function` to every RowState and tensor held."""
        return replace(
            self,
            committed=function(self.committed),
            staged=function(self.staged),
            previous=function(self.previous),
            open=tuple(function(chunk) for chunk in self.open),
            asked=None if self.asked is None else function(self.asked),
        )


@dataclass(frozen=True)
class Journal:
    """Two earlier points and the columns that came after each: last tokens are taken back by replaying without them.

    The older point lies at least `ROLLBACK_TOKENS` columns back, or at the start of the conversation.
    """

    older: Progress
    newer: Progress
    between: tuple[Tokens, ...] = ()
    since: tuple[Tokens, ...] = ()
    columns: int = 0  # in `since`


class EpisodicLayer(MemoryLayer):
    """Episodic memory of one decoder layer, for the rows of a batch.

    Tokens wait until their segment is complete and are then staged; what is staged is committed, that is read, from
    the next `clear_context()` on (with `read_scope="committed_segments"` at once). A segment is counted per row and
    over real tokens only: neither the pieces in which text arrives, nor padding, nor other rows change the memory.
    """

    _layer_type = "episodic_memory"

    def __init__(
        self,
        config: EpisodicConfig | None = None,
        layer_idx: int = 0,
        adapter_name: str = BUILT_IN,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_idx, adapter_name)
        self.hidden_size = hidden_size  # where it is known, a memory of another size is refused
        self.config = config if config is not None else EpisodicConfig()
        self.writes_generated = self.config.write_generated
        self._now: Progress | None = None
        # Columns that wait to be taken in, what they add to what is asked about, and what takes them in.
        self.waiting: tuple[Tokens, ...] = ()
        self.waiting_asked: Tensor | None = None
        self.take_in: Callable[[EpisodicLayer, Tokens], None] | None = None
        self.journal: Journal | None = None
        self.projected: tuple[Any, Any, Any, Any] | None = None  # what a reader derived from the committed memory

    @property
    def rules(self) -> list[dict[str, Any]]:
        """What surprise is, as errors of a predictor and nats cannot be held against each other."""
        return [{"surprise": self.config.surprise}]

    @property
    def now(self) -> Progress | None:
        """Where the conversation stands, everything taken in; None before anything was."""
        if self.waiting and self.take_in is not None:
            tokens = Tokens.join(self.waiting)
            self._forget_waiting()
            self.take_in(self, tokens)
        return self._now

    @now.setter
    def now(self, now: Progress | None) -> None:
        self._now = now

    @property
    def readable(self) -> EpisodicState | None:
        """The committed memory, None where nothing was ever committed."""
        return None if self._now is None or self._now.blank else self._now.committed

    def previous(self, hidden: Tensor) -> Tensor:
        """The last written token of this conversation for the rows of hidden [B, T, D]: [B, D], zero at its start."""
        self._begin(hidden)
        return cast(Progress, self.now).previous

    def asked_upto(self, parts: Tensor) -> Tensor:
        """What was asked about up to each of the next tokens, given what these add to it, [B, T, K]."""
        upto = parts if parts.shape[1] == 1 else parts.cumsum(1)
        for before in (None if self._now is None else self._now.asked, self.waiting_asked):
            if before is not None:
                upto = upto + before[:, None]
        return upto

    def blocks(self, real: Tensor) -> list[tuple[int, int]]:
        """Split the next columns, real [B, T], where a segment of some row is complete, as (start, stop) pairs."""
        columns = real.shape[1]
        count = real.long().cumsum(1)
        if self.now is not None and self.now.open:
            count = count + Tokens.join(self.now.open).real.sum(1, keepdim=True)
        ends = ((count % self.config.segment_length == 0) & real).any(0)
        ends[-1] = True
        stops = (torch.arange(1, columns + 1, device=real.device)[ends]).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def defer(self, tokens: Tokens, take_in: "Callable[[EpisodicLayer, Tokens], None]") -> None:
        """Have `take_in(self, columns)` called for the next columns and others together, before memory is looked at.

        Until then nothing changes but what is asked about: what a conversation leaves is read from the next one on.
        """
        self._begin(tokens.hidden)
        self.waiting = (*self.waiting, tokens)
        asked = tokens.asked.sum(1)
        self.waiting_asked = asked if self.waiting_asked is None else self.waiting_asked + asked
        self.take_in = take_in
        if len(self.waiting) >= WAITING_TOKENS:
            _ = self.now

    def append(self, tokens: Tokens) -> None:
        """Take in the next columns and stage the segments that they complete."""
        self._begin(tokens.hidden)
        if not self.keeps_graph and self.config.read_scope == "conversation":
            tokens = tokens.detach()
        now = cast(Progress, self.now)
        old = tokens.columns - ROLLBACK_TOKENS
        if old > 0:  # too far back ever to be taken back: taken in, not kept
            now = self._absorb(now, tokens.slice(0, old))
            tokens = tokens.slice(old, tokens.columns).map(torch.clone)  # a view would keep the others alive
            self.journal = None
        journal = self.journal if self.journal is not None else Journal(now, now)
        if journal.columns >= ROLLBACK_TOKENS:
            journal = Journal(journal.newer, now, between=journal.since)
        self.journal = replace(journal, since=(*journal.since, tokens), columns=journal.columns + tokens.columns)
        self.now = self._absorb(now, tokens)

    def append_whole(self, tokens: Tokens) -> None:
        """Take in and stage all columns of a conversation that is over with them: none of them can be taken back.

        Every row's real columns come first. Their `access` and `asked` may have no columns where nothing was read.
        Slots are changed in place, also for whoever shares them with this layer.
        """
        self._begin(tokens.hidden)
        now = cast(Progress, self.now)
        assert not now.open
        self.journal, self.now = None, self._stage(now, tokens, final=True, in_place=True)

    def rollback(self, tokens: int) -> None:
        if self.now is None or tokens == 0:
            return
        chunks = () if self.journal is None else (*self.journal.between, *self.journal.since)
        held = sum(chunk.columns for chunk in chunks)
        if tokens > held:
            raise too_far_back(tokens, held)
        assert self.journal is not None
        kept = Tokens.join(chunks).slice(0, held - tokens)
        now = self.journal.older
        self.journal = Journal(now, now, since=(kept,), columns=kept.columns)
        self.now = self._absorb(now, kept)
        self.projected = None

    def clear_context(self) -> None:
        self.journal, self.projected = None, None
        if self.now is None:
            return
        state = self._closed(self.now)
        blank = not bool((state.buffer_tag != EMPTY).any())
        self.now = Progress(state, state, torch.zeros_like(self.now.previous), blank=blank)

    def reset(self) -> None:
        self._forget_waiting()
        self.now, self.journal, self.projected = None, None, None

    def decay(self, cycles: int) -> None:
        if self.now is None:
            return
        self.projected, self.journal = None, None
        committed = pass_cycles(self.now.committed, cycles, self.config)
        same = self.now.committed is self.now.staged
        staged = committed if same else pass_cycles(self.now.staged, cycles, self.config)
        self.now = replace(self.now, committed=committed, staged=staged)

    def detach(self) -> None:
        """Cut the graph that leads to what was written."""
        self.journal, self.projected = None, None
        if self.now is not None:
            self.now = self.now.map(lambda part: part.detach())

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.projected = None
        if self.now is None:
            return
        done: dict[int, Any] = {}

        def once(part: Any) -> Any:
            """The same object stays the same object: a state that is read and written is held once."""
            if id(part) not in done:
                done[id(part)] = (part.map(function) if isinstance(part, RowState) else function(part), part)
            return done[id(part)][0]

        self.now = self.now.map(once)
        if self.journal is not None:
            self.journal = replace(
                self.journal,
                older=self.journal.older.map(once),
                newer=self.journal.newer.map(once),
                between=tuple(map(once, self.journal.between)),
                since=tuple(map(once, self.journal.since)),
            )

    def copy(self) -> "EpisodicLayer":
        """A layer that goes its own way from here. Tensors are shared: they are never changed in place."""
        layer = copy.copy(self)
        layer.losses, layer.conversation_scores, layer.projected = [], None, self.projected
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled: nothing that waits, and nothing of a model."""
        _ = self.now
        return self.__dict__ | {"take_in": None, "projected": None}

    def state_dict(self) -> dict[str, Tensor]:
        state = None if self.now is None else self._closed(self.now).detach()
        return state.tensors() if state is not None and bool(state.tokens.any()) else {}

    def check_state_dict(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        # What is missing or has other dimensions than these is named by the check.
        rows = tensors["tokens"].numel() if "tokens" in tensors else 1
        hidden_size = self.hidden_size or (tensors["buffer"].shape[-1] if "buffer" in tensors else 1)
        expected = EpisodicState.empty(rows, hidden_size, self.config, torch.device("meta")).tensors()
        check_tensors(tensors, expected, f"layer {self.layer_idx}")

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.reset()
        if tensors:
            state = EpisodicState(**tensors)
            blank = not bool((state.buffer_tag != EMPTY).any())
            self.now = Progress(state, state, torch.zeros_like(state.buffer[:, 0]), blank=blank)

    @property
    def rows(self) -> int | None:
        return None if self._now is None else len(self._now.previous)

    @property
    def device(self) -> torch.device | None:
        return None if self._now is None else self._now.staged.tokens.device

    @property
    def nbytes(self) -> int:
        if self.now is None:
            return 0
        parts: list[RowState] = [self.now.committed, *self.now.open]
        if self.now.staged is not self.now.committed:
            parts.append(self.now.staged)
        return sum(part.nbytes for part in parts)

    @property
    def tokens_seen(self) -> Tensor | None:
        if self.now is None:
            return None
        return self.now.staged.tokens + sum(chunk.real.sum(1) for chunk in self.now.open)

    def summary(self) -> dict[str, float]:
        if self.now is None:
            return {}
        state = self._closed(self.now)
        live, stored = state.live_buffer(self.config), state.live_store()
        count = live.sum().clamp_min(1)
        return {
            "buffer slots used": live.float().mean().item(),
            "store slots used": stored.float().mean().item() if self.config.store_slots else 0.0,
            "mean strength": ((state.strength * live).sum() / count).item(),
            "mean surprise kept": ((state.surprise * stored).sum() / stored.sum().clamp_min(1)).item(),
            "oldest kept, in conversations": float((state.store_age * stored).max())
            if self.config.store_slots
            else 0.0,
        }

    def _forget_waiting(self) -> None:
        self.waiting, self.waiting_asked = (), None

    def _begin(self, hidden: Tensor) -> None:
        self.check_rows(hidden.shape[0])
        if self._now is None:
            state = EpisodicState.empty(hidden.shape[0], hidden.shape[-1], self.config, hidden.device)
            self.now = Progress(state, state, torch.zeros_like(hidden[:, 0], dtype=torch.float32))

    def _absorb(self, now: Progress, tokens: Tokens) -> Progress:
        """`now` after `tokens`."""
        asked = tokens.asked.sum(1) if now.asked is None else now.asked + tokens.asked.sum(1)
        now = replace(now, previous=last_real(tokens.hidden, tokens.real, now.previous), asked=asked)
        chunks, bound = (*now.open, tokens), now.open_bound + tokens.columns
        if bound < self.config.segment_length:
            return replace(now, open=chunks, open_bound=bound)
        return self._stage(now, Tokens.join(chunks), final=False)

    def _stage(self, now: Progress, tokens: Tokens, *, final: bool, in_place: bool = False) -> Progress:
        """Stage all complete segments of `tokens`, and the open one too when `final`; the rest stays open.

        Args:
            in_place: For tokens of which every row's real ones come first: change the slots of what is staged, as is
                done with those that are made here.
        """
        length, device = self.config.segment_length, tokens.real.device
        count = tokens.real.sum(1)
        longest = int(count.max())  # asks the device once a segment, so that padding does not stage at every token
        if longest == 0:
            return replace(now, open=(), open_bound=0)
        if in_place:
            tokens = tokens.slice(0, longest)
        else:
            tokens = tokens.at((~tokens.real).long().argsort(dim=1, stable=True)[:, :longest])  # padding last
        if longest < length and not final:
            return replace(now, open=(tokens,), open_bound=longest)
        complete = count if final else count // length * length  # tokens to stage, per row
        staged = now.staged
        for start in range(0, longest if final else longest // length * length, length):
            segment = tokens.slice(start, start + length)
            valid = segment.real & (torch.arange(start, start + segment.columns, device=device) < complete[:, None])
            read = staged if self.config.read_scope == "committed_segments" else now.committed
            if segment.access.shape[-1]:
                staged = add_access(staged, (segment.access * valid[..., None]).sum(1), read.tag)
            staged = stage_segment(staged, segment.hidden, segment.surprise, valid, self.config, in_place)
            in_place = True
        if final:
            return self._staged(now, staged, ())
        left = count - complete
        index = torch.arange(min(length - 1, longest), device=device)
        rest = tokens.at((complete[:, None] + index).clamp_max(max(longest - 1, 0)))
        return self._staged(now, staged, (replace(rest, real=index < left[:, None]),))

    def _staged(self, now: Progress, staged: EpisodicState, rest: tuple[Tokens, ...]) -> Progress:
        """`now` with what is staged by then, and what is left of the open segment."""
        now = replace(now, staged=staged, open=rest, open_bound=sum(chunk.columns for chunk in rest))
        if self.config.read_scope == "committed_segments":
            self.projected = None
            now = replace(now, committed=staged, blank=False)
        return now

    def _closed(self, now: Progress) -> EpisodicState:
        """The memory as it is once the conversation is over."""
        if now.open:
            now = self._stage(now, Tokens.join(now.open), final=True)
        return end_conversation(now.staged, self.config)


def last_real(hidden: Tensor, real: Tensor, before: Tensor) -> Tensor:
    """The last real column of hidden [B, T, D] per row, `before` [B, D] where there is none."""
    if real.shape[1] == 1:
        return torch.where(real, hidden[:, 0], before.to(hidden.dtype))
    # With the column of `before`, so that a row of no columns has one too.
    known = torch.nn.functional.pad(real, (1, 0), value=True)
    index = torch.where(known, torch.arange(known.shape[1], device=real.device), 0).amax(1)
    columns = torch.cat([before[:, None].to(hidden.dtype), hidden], dim=1)
    return take(columns, index[:, None])[:, 0]
