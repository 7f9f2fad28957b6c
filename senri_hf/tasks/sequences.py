"""Symbol sequences with known answers: a cycle that holds each symbol for a while, and the Lorenz system in symbols."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CyclicSequence:
    """0…0 1…1 2…2 0…0 …, every symbol held for `hold` steps: who predicts it must count.

    There are `period` different sequences, one for each phase at which a sequence begins.

    Args:
        symbols: Number of symbols, at least 2.
        hold: Steps that each is held, at least 1.
    """

    symbols: int = 3
    hold: int = 6

    def __post_init__(self) -> None:
        for name, least in (("symbols", 2), ("hold", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")

    @property
    def period(self) -> int:
        """Steps after which the sequence repeats."""
        return self.symbols * self.hold

    def window(self, phase: int, length: int) -> list[int]:
        """`length` symbols from a phase on, which counts from 0 at the first of the zeros."""
        return [(phase + step) // self.hold % self.symbols for step in range(length)]

    def windows(self, length: int) -> list[list[int]]:
        """The windows of a length at all phases, in their order."""
        return [self.window(phase, length) for phase in range(self.period)]

    def floor(self, block: int) -> float:
        """The least mean loss, in nats a symbol, of predicting symbols 2 to block + 1 of a window of unknown phase.

        It is the entropy of all of them given the first, a count of the phases that are still possible at each step;
        ln(hold) / block once `block` is at least `hold`.
        """
        windows = self.windows(block + 1)
        total = 0.0
        for window in windows:
            alike = [other for other in windows if other[0] == window[0]]
            for step in range(1, block + 1):
                before, alike = len(alike), [other for other in alike if other[step] == window[step]]
                total -= math.log(len(alike) / before)
        return total / (len(windows) * block)

    def forbidden(self, sequence: Sequence[int]) -> int:
        """How many steps of a sequence go to a symbol that never follows: neither the same nor the next one."""
        steps = itertools.pairwise(sequence)
        return sum(after not in (before, (before + 1) % self.symbols) for before, after in steps)

    def settled(self, sequence: Sequence[int]) -> int | None:
        """The first step from which a sequence is the exact cycle until its end; None when its last period is not."""
        length = len(sequence)
        if length < self.period or list(sequence[-self.period :]) not in self.windows(self.period):
            return None
        start = length - self.period
        while start > 0 and sequence[start - 1] == sequence[start - 1 + self.period]:
            start -= 1
        return start

    def corrupted(self, length: int, wrong: int) -> list[tuple[list[int], int]]:
        """Every window with exactly `wrong` symbols replaced by others, and the symbol that follows the true window.

        Contexts that are true windows of another phase are left out; a context that is as near to two phases comes once
        for each of the symbols that may follow.
        """
        if not 1 <= wrong <= length:
            raise ValueError(f"wrong must be from 1 to {length}, the length, not {wrong!r}")
        true = {tuple(window) for window in self.windows(length)}
        found: dict[tuple[tuple[int, ...], int], None] = {}
        for phase in range(self.period):
            *window, follows = self.window(phase, length + 1)
            for places in itertools.combinations(range(length), wrong):
                for shifts in itertools.product(range(1, self.symbols), repeat=wrong):
                    context = list(window)
                    for place, shift in zip(places, shifts, strict=True):
                        context[place] = (context[place] + shift) % self.symbols
                    if tuple(context) not in true:
                        found[tuple(context), follows] = None
        return [(list(context), follows) for context, follows in found]


def lorenz_trajectories(
    count: int, steps: int, *, every: float = 0.1, seed: int = 0, transient: float = 20.0
) -> NDArray[np.float64]:
    """Trajectories [count, steps, 3] of x' = 10 (y - x), y' = x (28 - z) - y, z' = x y - 8/3 z (Lorenz, 1963).

    Integrated by the classical Runge-Kutta method in steps of 0.01, from random points after a transient.

    Args:
        every: Time between two points of a trajectory, a multiple of 0.01.
        transient: Time until the trajectories are taken to be on the attractor.
    """
    step, stride = 0.01, round(every / 0.01)
    if count < 1 or steps < 1:
        raise ValueError(f"count={count!r} and steps={steps!r} were given, but both must be at least 1")
    if stride < 1 or not math.isclose(stride * step, every):
        raise ValueError(f"every={every!r} was given, but it must be a multiple of {step}")
    point = np.random.default_rng(seed).normal(size=(count, 3)) * [8, 8, 8] + [0, 0, 25]

    def velocity(at: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y, z = at.T
        return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=1)

    points = np.empty((count, steps, 3))
    settling = round(transient / step)
    for index in range(settling + (steps - 1) * stride + 1):
        if index >= settling and (index - settling) % stride == 0:
            points[:, (index - settling) // stride] = point
        a = velocity(point)
        b = velocity(point + step / 2 * a)
        c = velocity(point + step / 2 * b)
        d = velocity(point + step * c)
        point = point + step / 6 * (a + 2 * b + 2 * c + d)
    return points


def lorenz_symbols(
    count: int, steps: int, *, every: float = 0.1, seed: int = 0, middle: float = 5.0
) -> NDArray[np.int64]:
    """The Lorenz system as three symbols [count, steps]: x below -middle is 0, above middle 2, between them 1.

    0 and 2 are the two wings of the attractor, 1 is the passage near the saddle.
    """
    x = lorenz_trajectories(count, steps, every=every, seed=seed)[..., 0]
    return np.digitize(x, [-middle, middle]).astype(np.int64)


def autocorrelation(symbols: NDArray[np.int64], lags: int) -> NDArray[np.float64]:
    """Correlation of sequences [count, steps] with themselves, at lags 0 to `lags`, around the mean of all of them."""
    values = symbols.astype(np.float64) - symbols.mean()
    length = symbols.shape[1]
    if lags >= length:
        raise ValueError(f"lags={lags} was given, but the sequences have {length} steps only")
    products = [(values[:, : length - lag] * values[:, lag:]).mean() for lag in range(lags + 1)]
    return np.array(products) / products[0]
