"""The batch solver against its laws, against brute force, and at scale."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from generators import step_times
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.batch.batch_solver import keeps_limits, predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[StepTime], int, BatchLimits, list[int]]:
    world_size = draw(st.integers(1, 4))
    times = draw(st.lists(step_times, min_size=world_size, max_size=world_size))
    if draw(st.booleans()):  # ranks that tie exactly
        times = [times[0]] * world_size
    batch = draw(st.integers(1, 14))
    caps = draw(st.none() | st.lists(st.integers(0, 14), min_size=world_size, max_size=world_size))
    least = draw(st.lists(st.integers(0, 3), min_size=world_size, max_size=world_size))
    limits = BatchLimits(None if caps is None else tuple(caps), draw(st.integers(1, 4)))
    return times, batch, limits, least


def allowed_plans(world_size: int, batch: int, limits: BatchLimits, least: list[int]) -> Iterator[BatchPlan]:
    """Yield every plan that keeps the limits, by brute force."""
    caps = limits.max_samples or [batch] * world_size
    multiple, rest = limits.batch_multiple, batch % limits.batch_multiple
    for units in itertools.product(range(batch // multiple + 1), repeat=world_size):
        if sum(units) != batch // multiple:
            continue
        for carrier in range(world_size) if rest else [-1]:
            sizes = tuple(u * multiple + (rest if r == carrier else 0) for r, u in enumerate(units))
            enough = all(u * multiple >= n for u, n in zip(units, least, strict=True))
            if enough and all(n <= cap for n, cap in zip(sizes, caps, strict=True)):
                yield BatchPlan(sizes)


@settings(max_examples=drawn(200, 1_200))
@given(problems())
def test_is_as_good_as_brute_force(problem: tuple[list[StepTime], int, BatchLimits, list[int]]) -> None:
    times, batch, limits, least = problem
    allowed = list(allowed_plans(len(times), batch, limits, least))
    if not allowed:
        with pytest.raises(InfeasiblePlanError):
            solve_batch(times, batch, limits, least)
        return
    plan = solve_batch(times, batch, limits, least)
    assert plan in allowed
    assert predicted_step_s(times, plan) == min(predicted_step_s(times, other) for other in allowed)


@given(st.lists(step_times, min_size=2, max_size=30), st.integers(30, 2000))
def test_no_sample_can_move_and_help(times: list[StepTime], batch: int) -> None:
    """A rank that takes one sample from any other finishes no earlier than the slowest does now."""
    plan = solve_batch(times, batch, min_samples=1)
    assert plan.global_batch_size == batch
    assert min(plan.samples) >= 1
    slowest = predicted_step_s(times, plan)
    bottlenecks = [r for r, n in enumerate(plan.samples) if times[r].seconds(n) == slowest and n > 1]
    if len(bottlenecks) == 1:
        for receiver, n in enumerate(plan.samples):
            if receiver not in bottlenecks:
                assert times[receiver].seconds(n + 1) >= slowest


@given(st.lists(step_times, min_size=2, max_size=8), st.integers(8, 200), st.data())
def test_a_faster_rank_never_makes_the_step_longer(times: list[StepTime], batch: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(times) - 1))
    faster = list(times)
    faster[rank] = StepTime(times[rank].overhead_s * 0.9, times[rank].seconds_per_sample * 0.8)
    before = predicted_step_s(times, solve_batch(times, batch))
    assert predicted_step_s(faster, solve_batch(faster, batch)) <= before


@given(st.lists(step_times, min_size=2, max_size=8), st.integers(8, 200), st.integers(1, 50))
def test_a_larger_cap_never_makes_the_step_longer(times: list[StepTime], batch: int, more: int) -> None:
    tight = batch // len(times) + 1
    steps = [
        predicted_step_s(times, solve_batch(times, batch, BatchLimits(tuple([cap] * len(times)))))
        for cap in (tight, tight + more)
    ]
    assert steps[1] <= steps[0]


def test_equal_ranks_get_equal_samples_and_the_first_the_remainder() -> None:
    times = [StepTime(0.01, 0.001)] * 4
    assert solve_batch(times, 64).samples == (16, 16, 16, 16)
    assert solve_batch(times, 66).samples == (17, 17, 16, 16)


def test_shares_are_kept_in_proportion() -> None:
    assert proportional_plan([1, 2], 96).samples == (32, 64)
    assert proportional_plan([5, 2], 14).samples == (10, 4)
    assert proportional_plan([1, 2, 4], 70).samples == (10, 20, 40)


def test_overhead_is_not_mistaken_for_cost() -> None:
    """20 ms of overhead at speeds 1:4: shares in proportion to the speeds at equal batches are worse."""
    times = [StepTime(0.020, 0.004), StepTime(0.020, 0.001)]
    naive = proportional_plan([1 / times[0].seconds(32), 1 / times[1].seconds(32)], 64)
    assert predicted_step_s(times, solve_batch(times, 64)) < 0.95 * predicted_step_s(times, naive)


def test_ten_thousand_ranks() -> None:
    times = [StepTime(0.001 * (rank % 7), 1e-3 * (1 + rank % 5)) for rank in range(10_000)]
    plan = solve_batch(times, 640_003, BatchLimits(batch_multiple=8), min_samples=1)
    assert plan.global_batch_size == 640_003
    assert sum(n % 8 != 0 for n in plan.samples) == 1
    lower_bound = (640_003 + sum(t.overhead_s / t.seconds_per_sample for t in times)) / sum(
        1 / t.seconds_per_sample for t in times
    )
    # at most one unit on the slowest rank above the continuous optimum
    assert lower_bound <= predicted_step_s(times, plan) <= lower_bound + 8 * 5e-3


@given(problems())
def test_the_plan_keeps_the_limits(problem: tuple[list[StepTime], int, BatchLimits, list[int]]) -> None:
    times, batch, limits, least = problem
    try:
        plan = solve_batch(times, batch, limits, least)
    except InfeasiblePlanError:
        return
    assert keeps_limits(plan, limits)


def test_a_plan_that_breaks_a_limit_is_recognised() -> None:
    assert not keeps_limits(BatchPlan((5, 3)), BatchLimits((4, 4)))
    assert not keeps_limits(BatchPlan((5, 3)), BatchLimits(batch_multiple=2))
    assert keeps_limits(BatchPlan((5, 4)), BatchLimits((5, 5), batch_multiple=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "`step_times` must have at least one rank"),
        (([StepTime(0, 1)], 0), "`global_batch_size` must be positive, got 0"),
        (([StepTime(0, 1)], 4, BatchLimits(batch_multiple=0)), "`batch_multiple` must be positive, got 0"),
        (([StepTime(0, 1)] * 2, 4, BatchLimits((1, 2))), "`max_batch_size` must together hold .* 1 too few"),
        (
            ([StepTime(0, 1)] * 2, 4, BatchLimits((1, 2, 3))),
            r"`max_batch_size` must be one integer, or one per rank \(2\)",
        ),
        (([StepTime(0, 1)] * 2, 4, BatchLimits((-1, 9))), "`max_batch_size` must be integers that are not negative"),
        (([StepTime(0, 1)] * 2, 4, BatchLimits((0, 9)), 1), "must leave every rank its minimum of 1 samples"),
        (([StepTime(0, 1)] * 2, 1, BatchLimits(), 1), "must cover the minimum of every rank, together 2 samples"),
    ],
)
def test_refuses(arguments: tuple[list[StepTime], int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        solve_batch(*arguments)
