"""The reason of a change names the ranks whose speed changed."""

from __future__ import annotations

import pytest

from lightning_hetero.balance.tuning.change_reason import change_reason
from lightning_hetero.balance.types import BatchPlan, StepTime

FAST, SLOW = StepTime(0.01, 0.001), StepTime(0.02, 0.002)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [FAST, FAST], "predicted: 1.50x as many samples/s"),
        ([FAST, SLOW], [FAST, SLOW], "predicted: 1.50x as many samples/s"),
        ([FAST, SLOW], [SLOW, SLOW], "rank 0 takes 2.00 times as long as before; predicted: 1.50x as many samples/s"),
        ([FAST, SLOW], [FAST, FAST], "rank 1 takes 0.50 times as long as before; predicted: 1.50x as many samples/s"),
        ([FAST] * 5, [SLOW] * 5, "5 ranks became slower and 0 faster; predicted: 1.50x as many samples/s"),
    ],
)
def test_the_reason_names_the_ranks_that_changed(before: list[StepTime], after: list[StepTime], expected: str) -> None:
    assert change_reason(0.5, BatchPlan((10,) * len(after)), before, after) == expected
