"""The fit of a line through repeated timings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.line_fit import fit_line, relative_spread
from lightning_hetero.exceptions import ConfigurationError

SIZES = (4, 8, 16, 32)
overheads = st.floats(1e-5, 1.0)
costs = st.floats(1e-5, 1.0)


@given(overheads, costs, st.lists(st.integers(1, 5000), min_size=3, max_size=6, unique=True))
def test_an_exact_line_is_found(overhead: float, cost: float, sizes: list[int]) -> None:
    line = fit_line({n: [overhead + cost * n] * 3 for n in sizes})
    # where the overhead dominates, the slope is bounded from below and the line still goes through the level
    level = overhead + cost * max(sizes)
    assert line.seconds(max(sizes)) == pytest.approx(level, rel=0.06)
    if cost * max(sizes) > 0.06 * level:
        assert line.seconds_per_sample == pytest.approx(cost, rel=1e-3)
        assert line.overhead_s == pytest.approx(overhead, abs=1e-4 * level)


@given(overheads, costs, st.sampled_from(SIZES), st.integers(0, 2), st.floats(1.0, 1e6))
def test_one_spike_changes_nothing(overhead: float, cost: float, at: int, which: int, factor: float) -> None:
    timings = {n: [overhead + cost * n] * 3 for n in SIZES}
    calm = fit_line(timings)
    timings[at][which] *= factor
    assert fit_line(timings) == calm


@given(st.lists(st.floats(1e-4, 10.0), min_size=4, max_size=4))
def test_no_feasible_line_is_closer(seconds: list[float]) -> None:
    def error(overhead: float, cost: float) -> float:
        return sum(((overhead + cost * n) / s - 1) ** 2 for n, s in zip(SIZES, seconds, strict=True))

    line = fit_line({n: [s] for n, s in zip(SIZES, seconds, strict=True)})
    assert line.overhead_s >= 0
    least_cost = 0.05 * seconds[-1] / SIZES[-1]
    assert line.seconds_per_sample >= least_cost * (1 - 1e-5)
    found = error(line.overhead_s, line.seconds_per_sample)
    for overhead in np.linspace(0, max(seconds), 15):
        for cost in np.linspace(least_cost, max(s / n for n, s in zip(SIZES, seconds, strict=True)), 15):
            assert found <= error(float(overhead), float(cost)) * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize(
    "timings",
    [{}, {4: [1.0], 8: [2.0]}, {4: [1.0], 8: [], 16: [3.0]}, {4: [1.0], 8: [0.0], 16: [3.0]}, {0: [1], 1: [1], 2: [1]}],
)
def test_too_little_is_refused(timings: dict[int, list[float]]) -> None:
    with pytest.raises(ConfigurationError, match="timings"):
        fit_line(timings)


def test_spread_is_the_interquartile_range() -> None:
    assert relative_spread([3.0]) == 0
    assert relative_spread([1.0, 2.0, 3.0, 4.0, 1000.0]) == pytest.approx(2 / 3)
    assert math.isclose(relative_spread([2.0] * 5), 0.0)
