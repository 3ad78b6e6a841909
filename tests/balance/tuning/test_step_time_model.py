"""The model finds the overhead and the cost per sample, knows their uncertainty, and follows a device that changes."""

from __future__ import annotations

import json
import random

import pytest
from generators import step_times
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.tuning.step_time_model import StepTimeModel
from lightning_hetero.balance.types import StepTime, WindowTiming


def window(truth: StepTime, samples: int, rng: random.Random, jitter: float = 0.0, steps: int = 10) -> WindowTiming:
    mean = truth.seconds(samples) * (1 + rng.gauss(0, 1) * jitter / steps**0.5)
    return WindowTiming(samples, steps, mean, jitter * truth.seconds(samples))


@given(st.lists(step_times, min_size=1, max_size=4), st.integers(4, 64))
def test_one_size_gives_a_proportional_time(truths: list[StepTime], samples: int) -> None:
    model = StepTimeModel(len(truths))
    assert not model.ready
    model.observe([WindowTiming(samples, 4, t.seconds(samples)) for t in truths])
    assert model.ready
    for truth, found in zip(truths, model.step_times(), strict=True):
        assert found.seconds(samples) == pytest.approx(truth.seconds(samples), rel=1e-3)
        assert found.overhead_s == pytest.approx(0, abs=1e-3 * truth.seconds(samples))


@given(step_times)
def test_two_sizes_tell_overhead_from_cost(truth: StepTime) -> None:
    """Predictions hold at sizes that were never measured, between the measured ones and a little outside."""
    model, rng = StepTimeModel(1), random.Random(0)
    for samples in (64, 96, 96, 80, 64):
        model.observe([window(truth, samples, rng)])
    found = model.step_times()[0]
    for samples in (60, 72, 110):
        assert found.seconds(samples) == pytest.approx(truth.seconds(samples), rel=0.05)


def test_uncertainty_shrinks_with_evidence_and_covers_the_error() -> None:
    """At most one run in ten is off by more than two standard deviations."""
    truth, misses, last = StepTime(0.01, 0.001), 0, 1.0
    for seed in range(200):
        model, rng = StepTimeModel(1), random.Random(seed)
        model.observe([window(truth, 50, rng, 0.1)])
        first = model.deviations()[0]
        for _ in range(8):
            model.observe([window(truth, 50, rng, 0.1)])
        last = model.deviations()[0]
        assert last < first
        misses += abs(model.step_times()[0].seconds(50) / truth.seconds(50) - 1) > 2 * last
    assert misses <= 20
    assert last < 0.03


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.3])
@pytest.mark.parametrize("jitter", [0.01, 0.1])
def test_a_change_of_speed_is_learned_from_one_window_and_keeps_the_ratio(factor: float, jitter: float) -> None:
    truth, model, rng = StepTime(0.03, 0.001), StepTimeModel(1), random.Random(1)
    for samples in (40, 60, 50, 50, 50):
        model.observe([window(truth, samples, rng, jitter)])
    before = model.step_times()[0]
    changed = StepTime(truth.overhead_s * factor, truth.seconds_per_sample * factor)
    model.observe([window(changed, 50, rng, jitter)])
    after = model.step_times()[0]
    assert after.seconds(50) == pytest.approx(changed.seconds(50), rel=0.03 if jitter < 0.1 else 0.15)
    ratio = before.overhead_s / before.seconds_per_sample
    assert after.overhead_s / after.seconds_per_sample == pytest.approx(ratio, rel=0.1)


def test_a_rank_that_measured_nothing_keeps_its_estimate() -> None:
    model = StepTimeModel(2)
    model.observe([WindowTiming(8, 4, 0.1), None])
    assert not model.ready
    model.observe([None, WindowTiming(8, 4, 0.2)])
    assert [time.seconds(8) for time in model.step_times()] == pytest.approx([0.1, 0.2])


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-6, 100), st.floats(0, 10)), min_size=1, max_size=12))
def test_any_measurement_gives_usable_estimates(windows: list[tuple[int, float, float]]) -> None:
    model = StepTimeModel(1)
    for samples, own_s, deviation_s in windows:
        model.observe([WindowTiming(samples, 5, own_s, deviation_s)])
        found = model.step_times()[0]
        assert found.overhead_s >= 0
        assert found.seconds_per_sample > 0
        assert model.deviations()[0] >= 0


def test_a_model_survives_a_checkpoint() -> None:
    model, rng = StepTimeModel(2), random.Random(2)
    truths = [StepTime(0.01, 0.001), StepTime(0.0, 0.002)]
    for samples in (40, 60):
        model.observe([window(t, samples, rng, 0.05) for t in truths])
    copy = StepTimeModel.from_dict(json.loads(json.dumps(model.to_dict())))
    for each in (model, copy):
        each.observe([window(t, 50, random.Random(3), 0.05) for t in truths])
    assert copy.step_times() == model.step_times()
