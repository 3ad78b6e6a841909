from __future__ import annotations

import pytest

from lightning_hetero.balance.record.run_record import RunWindow
from lightning_hetero.balance.record.run_scalars import scalars_of

WINDOW = RunWindow(
    step=9, time_s=1.0, tuning=False, samples=(30, 10), own_s=(0.3, 0.2), waiting_s=(0.1, 0.2), deviation_s=(0.0, 0.0)
)


def test_what_is_logged_of_two_ranks() -> None:
    assert scalars_of(WINDOW) == pytest.approx(
        {
            "hetero/step_time_s": 0.4,
            "hetero/samples_per_s": 100.0,
            "hetero/efficiency": 100 / (30 / 0.3 + 10 / 0.2),
            "hetero/share/rank_0": 0.75,
            "hetero/share/rank_1": 0.25,
            "hetero/own_s/rank_0": 0.3,
            "hetero/own_s/rank_1": 0.2,
            "hetero/waiting_fraction/rank_0": 0.25,
            "hetero/waiting_fraction/rank_1": 0.5,
        }
    )


def test_of_many_ranks_extremes_and_mean_are_logged() -> None:
    n = 1000
    own = tuple(0.001 * (rank + 1) for rank in range(n))
    scalars = scalars_of(RunWindow(0, 0.0, False, (8,) * n, own, tuple(1 - s for s in own), (0.0,) * n))
    assert len(scalars) == 3 + 3 * 3
    assert scalars["hetero/own_s/min"] == pytest.approx(0.001)
    assert scalars["hetero/own_s/max"] == pytest.approx(1.0)
    assert scalars["hetero/share/mean"] == pytest.approx(1 / n)
