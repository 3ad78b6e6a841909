"""The summary of a window is robust against outliers and a change of speed."""

from __future__ import annotations

import math
import random

import pytest

from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.types import StepTiming, WindowTiming


def steps(*seconds: float, samples: int = 8) -> list[StepTiming]:
    return [StepTiming(samples, s, 0.01) for s in seconds]


def test_steady_steps_are_averaged() -> None:
    window = summarise(steps(0.1, 0.2, 0.1, 0.2, 0.2))
    assert window is not None
    assert window.samples == 8
    assert window.waiting_s == pytest.approx(0.01)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 10, 30])
@pytest.mark.parametrize("position", [0, -1])
def test_one_disturbed_step_is_ignored(count: int, position: int) -> None:
    seconds = [0.1] * count
    seconds[position] = 5.0
    window = summarise(steps(*seconds))
    assert window is not None
    assert window.own_s == pytest.approx(0.1)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5])
@pytest.mark.parametrize("changed_steps", [3, 5, 7])
def test_only_the_steps_after_a_change_of_speed_count(factor: float, changed_steps: int) -> None:
    rng = random.Random(changed_steps)
    before = [0.1 * rng.gauss(1, 0.02) for _ in range(10 - changed_steps)]
    window = summarise(steps(*before, *[0.1 * factor * rng.gauss(1, 0.02) for _ in range(changed_steps)]))
    assert window is not None
    assert window.steps <= changed_steps
    assert window.own_s == pytest.approx(0.1 * factor, rel=0.05)


def test_two_slow_steps_are_no_change_yet() -> None:
    window = summarise(steps(*[0.1] * 8, 0.2, 0.2))
    assert window is not None
    assert window.own_s < 0.12


def test_noise_is_rarely_taken_for_a_change() -> None:
    rng = random.Random(0)
    windows = [summarise(steps(*[0.1 * max(0.2, rng.gauss(1, 0.1)) for _ in range(10)])) for _ in range(2000)]
    cut = sum(window is None or window.steps < 8 for window in windows)
    assert cut <= 10


def test_only_the_latest_size_counts() -> None:
    window = summarise([*steps(9.0, 9.0, samples=4), *steps(0.1, 0.1)])
    assert window == WindowTiming(8, 2, 0.1, 0.0, 0.01)


def test_unusable_steps_are_left_out() -> None:
    assert summarise([]) is None
    assert summarise([StepTiming(0, 0.1), StepTiming(8, 0.0), StepTiming(8, math.nan), StepTiming(8, math.inf)]) is None
    window = summarise(
        [StepTiming(8, math.nan), StepTiming(8, 0.1, math.nan), StepTiming(8, 0.1, math.inf), *steps(0.1)]
    )
    assert window is not None
    assert window.own_s == 0.1


def test_a_window_travels_as_numbers() -> None:
    window = WindowTiming(8, 3, 0.1, 0.01, 0.02)
    assert WindowTiming.from_numbers(window.to_numbers()) == window
