"""The advice agrees with a trial of every alternative."""

from __future__ import annotations

from itertools import combinations

import pytest
from generators import step_times
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.tuning.advice import advise, predicted_efficiency
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime, WindowTiming

NO_LIMITS = BatchLimits()


def test_proportional_devices_are_fully_used() -> None:
    advice = advise([StepTime(0, 0.001), StepTime(0, 0.002)], BatchPlan((64, 32)), NO_LIMITS)
    assert advice.speed_up == pytest.approx(1.5)
    assert advice.efficiency == pytest.approx(1.0)
    assert advice.sentences() == []


@pytest.mark.parametrize(
    ("times_before", "times_after", "constant"),
    [
        ((0.06, 0.02), (0.06, 0.02), True),  # as where a step draws a fixed number of samples by itself
        ((0.06, 0.02), (0.063, 0.0198), True),  # a little noise
        ((0.06, 0.02), (0.08, 0.015), True),  # much noise, the other way round
        ((0.06, 0.02), (0.02, 0.03), False),  # proportional
        ((0.06, 0.02), (0.06, 0.025), False),  # one rank has a high overhead, the other has not
        ((0.06, 0.02), (0.05, 0.02), False),
        ((0.06, 0.02), (0.05, 0.016), True),  # all devices have become faster
    ],
)
def test_times_that_do_not_depend_on_the_mini_batch_are_named(
    times_before: tuple[float, ...], times_after: tuple[float, ...], constant: bool
) -> None:
    first, found = BatchPlan((32, 32)), BatchPlan((8, 56))
    before, after = (
        [WindowTiming(n, 5, time) for n, time in zip(plan.samples, times, strict=True)]
        for plan, times in ((first, times_before), (found, times_after))
    )
    step_times = [StepTime(time, 1e-5) for time in times_after]
    advice = advise(step_times, found, NO_LIMITS, before=before, after=after)
    assert advice.constant == constant
    assert any("no shares make it faster" in sentence for sentence in advice.sentences()) == constant
    assert not advise(step_times, found, NO_LIMITS, before=before).constant  # the plan was kept
    assert not advise(step_times, found, NO_LIMITS, before=before, after=before).constant  # of the same size


def test_a_rank_without_samples_adds_nothing_to_the_bound() -> None:
    times = [StepTime(0.0, 0.001), StepTime(0.0, 0.002), StepTime(0.0, 0.003)]
    assert predicted_efficiency(times, BatchPlan((20, 10, 0))) == pytest.approx(1.0)


def test_communication_counts_against_efficiency() -> None:
    advice = advise([StepTime(0, 0.001), StepTime(0, 0.002)], BatchPlan((64, 32)), NO_LIMITS, communication_s=0.016)
    assert advice.step_s == pytest.approx(0.080)
    assert advice.efficiency == pytest.approx(0.8)
    assert advice.speed_up == pytest.approx((0.096 + 0.016) / 0.080)


@settings(max_examples=drawn(50, 200))
@given(st.lists(step_times, min_size=2, max_size=5), st.integers(8, 64), st.floats(0, 0.05))
def test_ranks_to_drop_are_those_of_the_best_of_all_subsets(
    times: list[StepTime], batch: int, communication_s: float
) -> None:
    plan = solve_batch(times, batch, min_samples=1)
    advice = advise(times, plan, NO_LIMITS, communication_s, min_gain=0.01)
    best_s = min(
        predicted_step_s(kept, solve_batch(kept, batch, min_samples=1))
        for size in range(1, len(times) + 1)
        for kept in combinations(times, size)
    )
    now_s = predicted_step_s(times, plan)
    gain = (now_s + communication_s) / (best_s + communication_s) - 1
    if gain > 0.011:
        assert advice.speed_up_without - 1 == pytest.approx(gain, rel=1e-6)
        kept = [time for rank, time in enumerate(times) if rank not in advice.ranks_to_drop]
        assert predicted_step_s(kept, solve_batch(kept, batch)) == pytest.approx(best_s)
    elif gain < 0.009:
        assert advice.ranks_to_drop == ()
        assert advice.speed_up_without == 1.0


def test_a_rank_that_only_delays_is_named() -> None:
    times = [StepTime(0.01, 0.001)] * 2 + [StepTime(0.2, 0.01)]
    advice = advise(times, solve_batch(times, 60, min_samples=1), NO_LIMITS)
    assert advice.ranks_to_drop == (2,)
    assert "without rank 2 a step would be 4" in advice.sentences()[0]


def test_a_rank_that_the_caps_of_the_others_need_is_kept() -> None:
    times = [StepTime(0.01, 0.001)] * 2 + [StepTime(0.2, 0.01)]
    limits = BatchLimits(max_samples=(29, 29, 60))
    assert advise(times, solve_batch(times, 60, limits, min_samples=1), limits).ranks_to_drop == ()


def test_a_global_batch_that_is_too_small_for_the_ratio_is_reported() -> None:
    times = [StepTime(0, 0.010), StepTime(0, 0.015)]
    advice = advise(times, BatchPlan((2, 2)), NO_LIMITS)
    assert advice.rounding == pytest.approx(1 - 0.024 / 0.030, abs=1e-3)
    enough = advice.enough_global_batch_size
    assert enough is not None
    better = solve_batch(times, enough)
    assert predicted_step_s(times, better) <= enough * 0.006 / 0.95
    assert "too small" in advice.sentences()[0]
    assert advise(times, better, NO_LIMITS).enough_global_batch_size is None
