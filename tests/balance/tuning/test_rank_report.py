"""Reports travel as numbers, and ranks that diverge are named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lightning_hetero.balance.tuning.rank_report import RankReport, check_agreement, fingerprint_of
from lightning_hetero.balance.types import BatchPlan, MemoryReading, PlanSchedule, WindowTiming
from lightning_hetero.exceptions import DivergedRanksError

SCHEDULE = PlanSchedule((0, 7), (BatchPlan((64, 64)), BatchPlan((85, 43))))
REPORT = RankReport(WindowTiming(8, 3, 0.5, 0.1, 0.2), MemoryReading(8, 1.0, 2.0, 3.0), 5, 12, 2**32 - 1, 0.25)


def test_a_report_travels_as_numbers() -> None:
    assert RankReport.from_numbers(REPORT.to_numbers()) == REPORT


def test_the_fingerprint_depends_on_plans_and_position_only() -> None:
    of = fingerprint_of(SCHEDULE, 9, 1)
    assert of == fingerprint_of(PlanSchedule(SCHEDULE.first_steps, SCHEDULE.plans), 9, 1)
    others = [
        fingerprint_of(SCHEDULE, 10, 1),
        fingerprint_of(SCHEDULE, 9, 2),
        fingerprint_of(PlanSchedule.constant(BatchPlan((85, 43))), 9, 1),
        fingerprint_of(SCHEDULE.with_change(8, BatchPlan((84, 44))), 9, 1),
        fingerprint_of(SCHEDULE.with_change(7, BatchPlan((84, 44))), 9, 1),
    ]
    assert of not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("fingerprints", "named"),
    [([1, 1, 2, 1], "rank 2 of 4"), ([3, 1, 2, 1], "rank 0, 2 of 4"), ([1, 2], "rank 1 of 2")],
)
def test_ranks_that_differ_are_named(fingerprints: list[int], named: str) -> None:
    with pytest.raises(DivergedRanksError, match=re.escape(named)):
        check_agreement([replace(REPORT, fingerprint=number) for number in fingerprints])


def test_ranks_that_agree_are_accepted() -> None:
    check_agreement([REPORT, REPORT, REPORT])
