"""The all-reduce model against torch's own buckets and a bucket-by-bucket simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size

from lightning_hetero.command.plan.communication import AllReduce, bucket_bytes, bucket_bytes_of_parameters, ring_s
from lightning_hetero.exceptions import ConfigurationError

MIB = 1024**2
numbers_of_values = st.lists(st.integers(1, 8 * MIB), min_size=1, max_size=30)


def simulated_step_s(
    buckets: tuple[float, ...], own_s: float, world_size: int, bits_per_s: float, latency_s: float
) -> float:
    """Send one bucket after the other, each when it is ready and the link is free."""
    free_at, done = 0.0, 0.0
    for size in buckets:
        done += size
        ready_at = own_s / 3 + own_s * 2 / 3 * done / sum(buckets)
        free_at = max(free_at, ready_at) + ring_s(size, world_size, bits_per_s, latency_s)
    return max(free_at, own_s)


@given(numbers_of_values)
def test_buckets_are_those_of_torch(values: list[int]) -> None:
    tensors = [torch.empty(n, device="meta") for n in values]
    assigned, _ = _compute_bucket_assignment_by_size(tensors[::-1], [_DEFAULT_FIRST_BUCKET_BYTES, 25 * MIB])
    expected = [sum(4 * values[::-1][i] for i in bucket) for bucket in assigned]
    assert list(bucket_bytes_of_parameters([4 * n for n in values])) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(0, [0]), (MIB, [MIB]), (1.5 * MIB, [MIB, 0.5 * MIB]), (27 * MIB, [MIB, 25 * MIB, MIB])]
)
def test_buckets_of_small_parameters(size: float, expected: list[float]) -> None:
    assert list(bucket_bytes(size)) == expected


@given(
    st.lists(st.floats(1, 1e8), min_size=1, max_size=8).map(tuple),
    st.floats(1e-3, 10),
    st.integers(2, 100),
    st.floats(1e6, 1e11),
    st.floats(0, 1e-3),
)
def test_the_formula_is_the_simulation(
    buckets: tuple[float, ...], own_s: float, world_size: int, bits_per_s: float, latency_s: float
) -> None:
    model = AllReduce(buckets, bits_per_s, latency_s)
    expected = simulated_step_s(buckets, own_s, world_size, bits_per_s, latency_s)
    assert model.step_s(own_s, world_size) == pytest.approx(expected)
    total_s = model.total_s(world_size)
    assert total_s == pytest.approx(sum(ring_s(b, world_size, bits_per_s, latency_s) for b in buckets))
    # at least the last bucket shows, at most everything
    least_s = ring_s(buckets[-1], world_size, bits_per_s, latency_s)
    assert least_s * (1 - 1e-9) <= model.exposed_s(own_s, world_size) + 1e-12 <= total_s * (1 + 1e-9) + 2e-12
    assert model.step_s(2 * own_s, world_size) >= model.step_s(own_s, world_size)


def test_a_single_bucket_is_wholly_exposed() -> None:
    assert AllReduce((2.5e6,), 200e6).exposed_s(0.1, 2) == pytest.approx(0.1)


def test_an_early_bucket_hides_behind_the_backward_pass() -> None:
    assert AllReduce((1e6, 1e6), 1e9).exposed_s(3.0, 2) == pytest.approx(0.008)


def test_without_a_link_or_peers_nothing_is_exposed() -> None:
    assert AllReduce((1e9,)).step_s(1.5, 100) == 1.5
    assert AllReduce((1e9,), 1e9, 1.0).step_s(1.5, 1) == 1.5
    assert AllReduce((1e9,), 1e9, 1.0).total_s(1) == 0.0


def test_latency_alone_counts_for_every_bucket() -> None:
    assert AllReduce((1.0, 1.0), None, 0.01).step_s(0.003, 3) == pytest.approx(0.003 * 2 / 3 + 2 * 4 * 0.01)


@pytest.mark.parametrize("wrong", [{"buckets": ()}, {"buckets": (-1.0,)}, {"bits_per_s": 0.0}, {"latency_s": -1.0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        AllReduce(**wrong)  # type: ignore[arg-type]
