"""Symbol sequences: the cycle, its floor, its errors; the Lorenz system."""

import itertools
import math

import numpy as np
import pytest

from senri_hf.tasks import CyclicSequence, autocorrelation, lorenz_symbols, lorenz_trajectories


TASK = CyclicSequence()


def test_windows_hold_every_symbol_and_there_is_one_for_each_phase() -> None:
    assert TASK.window(0, 19) == [0] * 6 + [1] * 6 + [2] * 6 + [0]
    assert TASK.window(4, 5) == [0, 0, 1, 1, 1]
    assert len({tuple(window) for window in TASK.windows(10)}) == TASK.period == 18


@pytest.mark.parametrize(("symbols", "hold", "block"), [(3, 6, 10), (3, 6, 6), (2, 4, 9), (5, 3, 4)])
def test_the_floor_is_the_entropy_of_the_phase_spread_over_the_block(symbols: int, hold: int, block: int) -> None:
    assert CyclicSequence(symbols, hold).floor(block) == pytest.approx(math.log(hold) / block)


def test_a_block_too_short_to_tell_the_phase_has_a_lower_floor() -> None:
    # Of six phases that start with 0, after one more symbol one is known and five are alike.
    expected = -(1 / 6 * math.log(1 / 6) + 5 / 6 * math.log(5 / 6))
    assert TASK.floor(1) == pytest.approx(expected)


def test_corrupted_windows_differ_in_so_many_symbols_and_are_no_windows() -> None:
    true = TASK.windows(10)
    for wrong, follows in ((1, 18 * 20), (2, 18 * 180)):
        found = TASK.corrupted(10, wrong)
        assert len(found) == len({(tuple(context), after) for context, after in found}) <= follows
        for context, after in found[:: 1 + len(found) // 60]:
            assert context not in true
            near = [
                window for window in TASK.windows(11) if window[-1] == after
                and sum(a != b for a, b in zip(context, window, strict=False)) == wrong
            ]  # fmt: skip
            assert near
    with pytest.raises(ValueError, match="wrong must be from 1 to 10"):
        TASK.corrupted(10, 11)


def test_settled_finds_where_the_exact_cycle_begins() -> None:
    cycle = TASK.window(3, 40)
    assert TASK.settled(cycle) == 0
    assert TASK.settled([1, 2, *cycle]) == 2
    # A zero too many: the cycle is exact again from the second zero of that run on.
    assert TASK.settled([*cycle[:20], 0, *cycle[20:]]) == 16
    assert TASK.settled([0] * 40) is None
    assert TASK.settled(cycle[:10]) is None
    for length, broken in itertools.product((25, 30), (3, 9)):
        sequence = TASK.window(0, length)
        sequence[broken - 1] = (sequence[broken - 1] + 1) % 3
        start = TASK.settled(sequence)
        assert start is None or (start >= broken and sequence[start:] == TASK.window(start, length - start))


def test_forbidden_steps_are_those_that_skip_a_symbol() -> None:
    assert TASK.forbidden(TASK.window(2, 60)) == 0
    assert TASK.forbidden([0, 2, 2, 1, 1, 2]) == 2
    assert TASK.forbidden([0]) == 0


@pytest.mark.parametrize("settings", [{"symbols": 1}, {"hold": 0}, {"hold": 2.5}, {"symbols": True}])
def test_an_impossible_cycle_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a whole number"):
        CyclicSequence(**settings)


def test_trajectories_solve_the_lorenz_system() -> None:
    points = lorenz_trajectories(4, 50, every=0.01)
    x, y, z = points[:, 10:40].transpose(2, 0, 1)
    velocity = np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)
    # Central differences of fourth order.
    measured = (points[:, 8:38] - 8 * points[:, 9:39] + 8 * points[:, 11:41] - points[:, 12:42]) / (12 * 0.01)
    assert np.abs(measured - velocity).max() < 0.02 * np.abs(velocity).max()
    assert np.allclose(lorenz_trajectories(4, 6, every=0.05), lorenz_trajectories(4, 26, every=0.01)[:, ::5])


def test_lorenz_symbols_name_the_wings_and_differ_by_seed() -> None:
    x = lorenz_trajectories(8, 200, seed=1)[..., 0]
    symbols = lorenz_symbols(8, 200, seed=1)
    assert ((symbols == 0) == (x < -5)).all() and ((symbols == 2) == (x >= 5)).all()
    assert set(np.unique(symbols)) == {0, 1, 2}
    assert not np.array_equal(symbols, lorenz_symbols(8, 200, seed=2))
    with pytest.raises(ValueError, match="a multiple of"):
        lorenz_symbols(1, 10, every=0.015)


def test_autocorrelation_is_one_at_no_lag_and_follows_the_period() -> None:
    cycle = np.array([TASK.window(0, 360)])
    correlation = autocorrelation(cycle, 36)
    assert correlation[0] == 1 and correlation[18] > 0.95 and correlation[9] < 0
    with pytest.raises(ValueError, match="lags=360"):
        autocorrelation(cycle, 360)
