from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.record.run_record import RunAdvice, RunChange, RunEnd, RunHeader, RunRecord, RunWindow
from lightning_hetero.balance.record.run_summary import (
    StepParts,
    bound_samples_per_s,
    compare,
    measured_efficiency,
    plans_over_steps,
    run_status,
    samples_per_s,
    scalars_of,
    slowest_and_fastest,
    step_parts,
    step_s,
    thinned,
    wait_fractions,
)
from lightning_hetero.balance.types import DeviceProfile

HEADER = RunHeader("hetero_ddp", "", 128, (DeviceProfile("a", "cpu", "x"), DeviceProfile("b", "cpu", "y")))


def window(
    samples: tuple[int, ...] = (64, 64),
    own_s: tuple[float, ...] = (0.25, 0.5),
    waiting_s: tuple[float, ...] = (0.375, 0.125),
    step: int = 5,
    tuning: bool = True,
    communication_s: float = 0.125,
) -> RunWindow:
    return RunWindow(
        step, 1.0, tuning, samples, own_s, waiting_s, (0.0,) * len(samples), communication_s=communication_s
    )


BEFORE = window()
AFTER = window((86, 42), (0.375, 0.375), (0.125, 0.125), 20, tuning=False)
UNMEASURED = window(own_s=(0.0, 0.5))


def test_a_window_by_hand() -> None:
    assert step_s(BEFORE) == 0.625
    assert samples_per_s(BEFORE) == 128 / 0.625
    assert bound_samples_per_s(BEFORE) == 64 / 0.25 + 64 / 0.5
    assert measured_efficiency(BEFORE) == pytest.approx((128 / 0.625) / (64 / 0.25 + 64 / 0.5))
    assert step_parts(BEFORE) == [StepParts(0.25, 0.125, 0.25), StepParts(0.5, 0.125, 0.0)]
    assert wait_fractions(BEFORE) == [0.6, 0.2]


def test_missing_measurements_are_not_made_up() -> None:
    assert measured_efficiency(UNMEASURED) is None
    assert bound_samples_per_s(UNMEASURED) is None
    assert wait_fractions(UNMEASURED) == [None, 0.2]
    nothing = window(own_s=(0.0, 0.0))
    assert [step_s(nothing), samples_per_s(nothing)] == [0.0, 0.0]
    # a rank without samples has nothing to measure
    assert bound_samples_per_s(window((128, 0), (0.5, 0.0))) == 256


SECONDS = st.floats(1e-6, 1e3)


@given(st.lists(st.tuples(st.integers(1, 1000), SECONDS, SECONDS), min_size=1, max_size=8))
def test_no_run_exceeds_the_bound(ranks: list[tuple[int, float, float]]) -> None:
    samples, own_s, waiting_s = zip(*ranks, strict=True)
    part = measured_efficiency(window(samples, own_s, waiting_s))
    assert part is not None
    assert 0 < part <= 1 + 1e-12


@given(st.lists(st.tuples(SECONDS, st.floats(0, 1e3)), min_size=1, max_size=8), st.floats(0, 10))
def test_the_parts_of_a_step_add_up(ranks: list[tuple[float, float]], communication_s: float) -> None:
    own_s, waiting_s = zip(*ranks, strict=True)
    parts = step_parts(window((1,) * len(ranks), own_s, waiting_s, communication_s=communication_s))
    for part, own, waiting in zip(parts, own_s, waiting_s, strict=True):
        assert min(part.communication_s, part.waiting_s) >= 0
        assert part.own_s + part.communication_s + part.waiting_s == pytest.approx(own + waiting)


def test_the_speed_up_is_that_of_the_tuning_whatever_happens_later() -> None:
    slowed = replace(AFTER, own_s=(0.75, 0.375), step=900)
    record = RunRecord(HEADER, (UNMEASURED, BEFORE, AFTER, replace(AFTER, step=30), slowed))
    found = compare(record)
    assert found is not None
    assert (found.before, found.after) == (BEFORE, slowed)
    assert found.speed_up == pytest.approx(0.625 / 0.5)
    assert found.from_equal_shares


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((), None),
        ((window(own_s=(0.0, 0.0)),), None),
        ((UNMEASURED,), (UNMEASURED, UNMEASURED)),
        ((BEFORE,), (BEFORE, BEFORE)),
        ((AFTER, replace(AFTER, step=30)), (AFTER, replace(AFTER, step=30))),
    ],
    ids=["none", "no times", "one rank measured", "still tuning", "never tuned"],
)
def test_without_a_tuning_there_is_no_speed_up(
    windows: tuple[RunWindow, ...], expected: tuple[RunWindow, RunWindow] | None
) -> None:
    found = compare(RunRecord(HEADER, windows))
    assert (None if found is None else (found.before, found.after)) == expected
    assert found is None or found.speed_up is None


def test_unequal_first_shares_are_recognised() -> None:
    found = compare(RunRecord(HEADER, (window((65, 63)), AFTER)))
    assert found is not None
    assert not found.from_equal_shares


@pytest.mark.parametrize(
    ("record", "is_running", "expected"),
    [
        (RunRecord(HEADER), False, "no end recorded"),
        (RunRecord(HEADER), True, "tuning"),
        (RunRecord(HEADER, (BEFORE,)), True, "tuning"),
        (RunRecord(HEADER, (BEFORE, AFTER)), True, "watching"),
        (RunRecord(HEADER, advice=RunAdvice(1, 1.0, 1.0, 1.0, 1.0, ())), True, "watching"),
        (RunRecord(HEADER, end=RunEnd(1, 1.0, "finished")), True, "finished"),
        (RunRecord(HEADER, end=RunEnd(1, 1.0, "ValueError: x")), True, "failed"),
    ],
)
def test_state(record: RunRecord, is_running: bool, expected: str) -> None:
    assert run_status(record, is_running) == expected


def test_plans_follow_the_changes() -> None:
    changes = tuple(RunChange(step, 1.0, plan, "") for step, plan in ((10, (80, 48)), (30, (90, 38)), (20, (86, 42))))
    # the change at 20 was decided last and replaces the one that was due at 30
    assert plans_over_steps(RunRecord(HEADER, (BEFORE,), changes)) == [(0, (64, 64)), (10, (80, 48)), (20, (86, 42))]
    # the plan before the first change is unknown
    assert plans_over_steps(RunRecord(HEADER, (AFTER,), changes[:1])) == [(10, (80, 48))]
    assert plans_over_steps(RunRecord(HEADER)) == []


def test_the_slowest_and_the_fastest_of_many_ranks() -> None:
    own_s = (5.0, 1.0, 4.0, 0.0, 2.0, 3.0)
    many = window((10,) * 6, own_s, (0.0,) * 6)
    assert slowest_and_fastest(many, 6) == ((0, 1, 2, 3, 4, 5), ())
    assert slowest_and_fastest(many, 4) == ((0, 2), (1, 4))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=5, max_size=12))
def test_no_rank_is_both_slow_and_fast(own_s: list[float]) -> None:
    slow, fast = slowest_and_fastest(window((1,) * len(own_s), tuple(own_s), (0.0,) * len(own_s)), 4)
    assert len(slow) == 2
    assert len({*slow, *fast}) == len(slow) + len(fast) <= 4


@given(st.integers(0, 500), st.integers(2, 50))
def test_thinning_keeps_the_ends_and_the_order(length: int, most: int) -> None:
    kept = thinned(range(length), most)
    assert kept == sorted(set(kept))
    assert len(kept) == min(length, most)
    assert not length or [kept[0], kept[-1]] == [0, length - 1]


LOGGED = RunWindow(
    step=9, time_s=1.0, tuning=False, samples=(30, 10), own_s=(0.3, 0.2), waiting_s=(0.1, 0.2), deviation_s=(0.0, 0.0)
)


def test_two_ranks_are_logged_one_by_one() -> None:
    assert scalars_of(LOGGED) == pytest.approx(
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


def test_many_ranks_are_logged_as_extremes_and_mean() -> None:
    n = 1000
    own = tuple(0.001 * (rank + 1) for rank in range(n))
    scalars = scalars_of(RunWindow(0, 0.0, False, (8,) * n, own, tuple(1 - s for s in own), (0.0,) * n))
    assert len(scalars) == 3 + 3 * 3
    assert scalars["hetero/own_s/min"] == pytest.approx(0.001)
    assert scalars["hetero/own_s/max"] == pytest.approx(1.0)
    assert scalars["hetero/share/mean"] == pytest.approx(1 / n)
