"""The values that layers exchange refuse nonsense and survive a checkpoint."""

from __future__ import annotations

import json

import pytest

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.types import BatchPlan, BatchSlice, PlanSchedule, StepTime, weight_in_mean
from lightning_hetero.exceptions import ConfigurationError


def test_schedule_knows_the_plan_of_each_step() -> None:
    a, b, c = BatchPlan((4, 4)), BatchPlan((2, 6)), BatchPlan((3, 5))
    schedule = PlanSchedule.constant(a).with_change(5, b).with_change(9, c)
    assert [schedule.at(step) for step in (0, 4, 5, 8, 9, 1000)] == [a, a, b, b, c, c]


def test_a_change_replaces_those_that_were_due_later() -> None:
    a, b, c = BatchPlan((4, 4)), BatchPlan((2, 6)), BatchPlan((3, 5))
    schedule = PlanSchedule.constant(a).with_change(9, b).with_change(5, c)
    assert schedule == PlanSchedule((0, 5), (a, c))
    assert PlanSchedule.constant(a).with_change(0, b) == PlanSchedule.constant(b)


def test_schedule_survives_json() -> None:
    schedule = PlanSchedule.constant(BatchPlan((4, 4))).with_change(5, BatchPlan((2, 6)))
    assert PlanSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_a_plan_with_an_idle_rank_can_be_divided_again() -> None:
    assert proportional_plan(BatchPlan((0, 6, 12)).shares, 36, min_samples=1).samples == (1, 12, 23)


@pytest.mark.parametrize(
    ("samples", "global_samples", "weight"), [(4, 8, 1.0), (2, 8, 0.5), (0, 3, 0.0), (1, 3, 2 / 3)]
)
def test_loss_weight(samples: int, global_samples: int, weight: float) -> None:
    assert BatchSlice(0, 1, BatchPlan((global_samples - samples, samples))).loss_weight == weight


def test_weights_of_equal_shares_are_exactly_one() -> None:
    """Weights of exactly one leave the loss untouched, so the run equals plain DDP to the last bit."""
    assert all(weight_in_mean(n, n * w, w) == 1.0 for n in range(1, 50) for w in range(1, 50))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchPlan(()), "`samples` must hold at least one sample"),
        (lambda: BatchPlan((0, 0)), "`samples` must hold at least one sample"),
        (lambda: BatchPlan((3, -1)), "no negative size"),
        (lambda: StepTime(-0.1, 1), "`overhead_s` must be finite and not negative"),
        (lambda: StepTime(float("nan"), 1), "`overhead_s` must be finite"),
        (lambda: StepTime(0, 0), "`seconds_per_sample` must be finite and positive"),
        (lambda: PlanSchedule((1,), (BatchPlan((1,)),)), "`first_steps` must start with 0"),
        (lambda: PlanSchedule((0, 0), (BatchPlan((1,)), BatchPlan((1,)))), "`first_steps` must increase"),
    ],
)
def test_refuses(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()  # type: ignore[operator]
