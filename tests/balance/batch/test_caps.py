"""Memory limits become mini-batches and micro-batches."""

from __future__ import annotations

import itertools

import pytest
from generators import step_times
from hypothesis import given
from hypothesis import strategies as st

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.batch.caps import halved, limits_of_micro_batches, micro_batch_sizes
from lightning_hetero.balance.tuning.memory_model import MemoryModel
from lightning_hetero.balance.types import BatchLimits, MemoryReading, StepTime

GB = 1e9


@given(st.integers(1, 500), st.none() | st.integers(1, 500))
def test_micro_batches_are_few_and_equal(samples: int, most: int | None) -> None:
    sizes = micro_batch_sizes(samples, most)
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert most is None or max(sizes) <= most
    assert len(sizes) == (1 if most is None else -(-samples // most))


@given(st.integers(2, 10_000))
def test_halving_ends_at_one_sample(size: int) -> None:
    assert 1 <= halved(size) < size


@given(
    st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=6),
    st.integers(6, 200),
    st.integers(1, 4),
    st.data(),
)
def test_memory_limits_the_shares_as_far_as_the_batch_allows(
    micro_batches: list[int | None], batch: int, multiple: int, data: st.DataObject
) -> None:
    limits = limits_of_micro_batches(BatchLimits(None, multiple), micro_batches, batch)
    times = data.draw(st.lists(step_times, min_size=len(micro_batches), max_size=len(micro_batches)))
    plan = solve_batch(times, batch, limits)  # never an error, because the user sets no limits
    if sum(batch if n is None else n // multiple * multiple for n in micro_batches) >= batch:
        assert all(n is None or size <= max(n, multiple) for n, size in zip(micro_batches, plan.samples, strict=True))


def test_limits_of_the_user_stay() -> None:
    assert limits_of_micro_batches(BatchLimits((10, 20)), [None, None], 30).max_samples == (10, 20)
    assert limits_of_micro_batches(BatchLimits((10, 20)), [4, 30], 24).max_samples == (4, 20)
    assert limits_of_micro_batches(BatchLimits((10, 20)), [4, 5], 30).max_samples == (10, 20)


def reading(samples: int, memory: float, resident: float = 2.0, per_sample: float = 0.1) -> MemoryReading:
    return MemoryReading(samples, resident * GB, (resident + per_sample * samples) * GB, 0.92 * memory * GB)


def test_one_size_is_enough_for_a_line_and_two_measure_it() -> None:
    model = MemoryModel(1)
    assert (model.most_samples(0), model.peak_bytes(0, 10)) == (None, None)
    model.observe([reading(16, 12.0)])
    assert model.peak_bytes(0, 64) == pytest.approx(8.4 * GB)
    assert model.most_samples(0) == int((0.92 * 12 - 2) / 0.1)
    # a workspace of 1 GB that is not resident between steps
    model.observe([MemoryReading(16, 2 * GB, 4.6 * GB, 11 * GB)])
    model.observe([MemoryReading(32, 2 * GB, 6.2 * GB, 11 * GB)])
    assert model.peak_bytes(0, 48) == pytest.approx(7.8 * GB)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1, 20)), min_size=1, max_size=30))
def test_no_prediction_is_below_a_reading(readings: list[tuple[int, float]]) -> None:
    model = MemoryModel(1)
    for samples, peak in readings:
        model.observe([MemoryReading(samples, GB, peak * GB, 10 * GB)])
    kept = readings[-16:]
    for samples, peak in kept:
        predicted = model.peak_bytes(0, samples)
        assert predicted is not None
        assert predicted >= peak * GB * (1 - 1e-9)


def test_the_fast_device_with_little_memory_gets_what_fits() -> None:
    """With 24 GB and 12 GB, the smaller device twice as fast, the plan is the optimum found by brute force."""
    times, batch = [StepTime(0.0, 0.002), StepTime(0.0, 0.001)], 128
    model = MemoryModel(2)
    model.observe([reading(64, 24.0, per_sample=0.15), reading(64, 12.0, per_sample=0.15)])
    fit = [model.most_samples(rank) for rank in range(2)]
    assert fit == [int((0.92 * 24 - 2) / 0.15), int((0.92 * 12 - 2) / 0.15)]  # 64 ran, but beyond the budget
    model = MemoryModel(2)
    model.observe([reading(40, 24.0, per_sample=0.15), reading(40, 12.0, per_sample=0.15)])
    fit = [model.most_samples(rank) for rank in range(2)]
    plan = solve_batch(times, batch, limits_of_micro_batches(BatchLimits(), fit, batch))
    allowed = [
        pair
        for pair in itertools.product(range(batch + 1), repeat=2)
        if sum(pair) == batch and all(n <= most for n, most in zip(pair, fit, strict=True) if most is not None)
    ]
    best = min(max(t.seconds(n) for t, n in zip(times, pair, strict=True)) for pair in allowed)
    assert predicted_step_s(times, plan) == best
    for rank, n in enumerate(plan.samples):
        predicted = model.peak_bytes(rank, n)
        assert predicted is not None
        assert predicted <= 0.92 * (24.0, 12.0)[rank] * GB
