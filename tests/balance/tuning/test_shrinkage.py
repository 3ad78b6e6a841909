"""Estimates of similar ranks are shrunk towards their mean as far as the noise allows, and no further."""

from __future__ import annotations

import random

import pytest

from lightning_hetero.balance.tuning.shrinkage import shrink
from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import WindowTiming

DOUBT = 4.0


def measured(own_s: list[float], *, jitter: float, steps: int = 2, windows: int = 1, seed: int = 0) -> StepTimeModel:
    """Return the model of ranks that take ``own_s`` for 64 samples."""
    model, rng = StepTimeModel(len(own_s)), random.Random(seed)
    for _ in range(windows):
        model.observe([WindowTiming(64, steps, s * (1 + rng.gauss(0, jitter) / steps**0.5), jitter * s) for s in own_s])
    return model


def spread(times: list[float]) -> float:
    return max(times) / min(times) - 1


def test_noise_is_removed() -> None:
    model = measured([0.1] * 64, jitter=0.1)
    single = [time.seconds(64) for time in model.step_times()]
    times, deviations = shrink(model, 64, DOUBT)
    assert spread([time.seconds(64) for time in times]) < 0.3 * spread(single)
    assert max(deviations) < max(model.deviations())


def test_a_straggler_and_kinds_of_devices_keep_their_own_speed() -> None:
    truth = [0.1] * 30 + [0.2] * 30 + [0.5]
    times, _ = shrink(measured(truth, jitter=0.05), 64, DOUBT)
    for time, seconds in zip(times, truth, strict=True):
        assert time.seconds(64) == pytest.approx(seconds, rel=0.1)


def test_a_well_measured_rank_keeps_its_own_estimate() -> None:
    model = measured([0.1, 0.104, 0.096, 0.1], jitter=0.01, steps=10, windows=5)
    times, deviations = shrink(model, 64, DOUBT)
    for time, single in zip(times, model.step_times(), strict=True):
        assert time.seconds(64) == pytest.approx(single.seconds(64), rel=0.005)
    assert deviations == pytest.approx(model.deviations(), rel=0.2)


def test_a_single_rank_is_left_alone() -> None:
    model = measured([0.1], jitter=0.1)
    times, deviations = shrink(model, 64, DOUBT)
    assert times == model.step_times()
    assert deviations == pytest.approx(model.deviations())


def test_ranks_of_very_different_sizes_are_not_compared() -> None:
    """The time of one rank at the other's size is a guess, and no estimate is shrunk towards a guess."""
    model = StepTimeModel(2)
    model.observe([WindowTiming(16, 2, 0.016), WindowTiming(48, 2, 0.096)])
    times, deviations = shrink(model, 32, DOUBT)
    assert times == model.step_times()
    assert deviations == pytest.approx(model.deviations())
