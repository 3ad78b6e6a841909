"""The fit recovers known parameters, survives outliers, and stays within its bounds."""

from __future__ import annotations

import random

import pytest
from generators import step_times
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_hetero.balance.step_time import fit_step_time, trimmed_mean
from lightning_hetero.balance.types import StepTime, StepTiming
from lightning_hetero.exceptions import ConfigurationError


def measured(truth: StepTime, sizes: list[int], jitter: float = 0.0, seed: int = 0) -> list[StepTiming]:
    rng = random.Random(seed)
    return [StepTiming(n, truth.seconds(n) * max(0.2, rng.gauss(1, jitter))) for n in sizes]


@given(step_times)
def test_recovers_what_noise_free_steps_were_made_of(truth: StepTime) -> None:
    # below a twentieth of the time the cost of samples is not believed, see test_times_that_fall_with_size
    assume(truth.seconds_per_sample * 30 > 0.06 * truth.seconds(30))
    fit = fit_step_time(measured(truth, [20] * 6 + [40] * 6))
    for size in (10, 20, 30, 40, 60):
        assert fit.seconds(size) == pytest.approx(truth.seconds(size), rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_recovers_under_jitter(seed: int) -> None:
    """10 % jitter on 6 + 6 + 6 steps: at the sizes measured the prediction is right within a few per cent."""
    truth = StepTime(0.020, 0.002)
    fit = fit_step_time(measured(truth, [32] * 6 + [20] * 6 + [16] * 6, jitter=0.1, seed=seed))
    for size in (16, 20, 32):
        assert fit.seconds(size) == pytest.approx(truth.seconds(size), rel=0.15)


@given(step_times, st.floats(3, 100))
def test_one_outlier_a_size_changes_little(truth: StepTime, factor: float) -> None:
    timings = measured(truth, [20] * 6 + [40] * 6)
    timings[2] = StepTiming(20, truth.seconds(20) * factor)
    timings[9] = StepTiming(40, truth.seconds(40) * factor)
    fit = fit_step_time(timings)
    assert fit.seconds(30) == pytest.approx(truth.seconds(30), rel=0.02)


def test_one_size_means_proportional() -> None:
    fit = fit_step_time(measured(StepTime(0.020, 0.001), [20] * 5))
    assert fit.overhead_s == pytest.approx(0, abs=1e-12)
    assert fit.seconds_per_sample == pytest.approx(0.040 / 20)


@given(
    st.lists(st.builds(StepTiming, samples=st.integers(1, 100), own_s=st.floats(1e-4, 1.0)), min_size=1, max_size=30)
)
def test_is_physical_whatever_was_measured(timings: list[StepTiming]) -> None:
    fit = fit_step_time(timings)
    assert fit.overhead_s >= 0
    assert fit.seconds_per_sample > 0


def test_times_that_fall_with_size_do_not_promise_endless_samples() -> None:
    fit = fit_step_time([StepTiming(10, 0.2)] * 5 + [StepTiming(20, 0.1)] * 5)
    assert fit.seconds(1000) > 2 * fit.seconds(10)


def test_unusable_steps_are_left_out() -> None:
    good = [StepTiming(10, 0.1)] * 4
    bad = [StepTiming(10, float("nan")), StepTiming(0, 0.1), StepTiming(10, 0.0), StepTiming(10, float("inf"))]
    assert fit_step_time(good + bad) == fit_step_time(good)
    with pytest.raises(ConfigurationError, match="`timings` must have a step"):
        fit_step_time(bad)


def test_trimmed_mean() -> None:
    assert trimmed_mean([1, 2, 3, 4, 100]) == 3
    assert trimmed_mean([5.0]) == 5.0
    with pytest.raises(ConfigurationError, match="at least one number"):
        trimmed_mean([])
    with pytest.raises(ConfigurationError, match="`trim` must be in"):
        trimmed_mean([1.0], trim=0.5)
