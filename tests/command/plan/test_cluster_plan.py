"""The prediction for a cluster against the solver on expanded ranks, and the device search against brute force."""

from __future__ import annotations

from itertools import product

import pytest
from generators import step_times
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.tuning.advice import advise
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime
from lightning_hetero.command.plan.cluster import Cluster, DeviceKind, SampleMemory
from lightning_hetero.command.plan.cluster_plan import plan_cluster
from lightning_hetero.command.plan.communication import AllReduce
from lightning_hetero.command.plan.device_search import DeviceSearch
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

kinds = st.builds(
    DeviceKind,
    name=st.just("device"),
    count=st.integers(1, 3),
    step_time=step_times,
    max_batch_size=st.none() | st.integers(8, 40),
    price_per_hour=st.floats(0.1, 10),
)
all_reduces = st.builds(
    AllReduce,
    buckets=st.lists(st.floats(1e3, 1e7), min_size=1, max_size=3).map(tuple),
    bits_per_s=st.none() | st.floats(1e8, 1e11),
    latency_s=st.sampled_from([0.0, 1e-4, 1e-2]),
)


@st.composite
def clusters(draw: st.DrawFn, most_multiple: int = 1) -> Cluster:
    found = tuple(draw(st.lists(kinds, min_size=1, max_size=3)))
    multiple, size = draw(st.integers(1, most_multiple)), sum(kind.count for kind in found)
    held = sum(kind.count * (kind.max_batch_size or 64) // multiple * multiple for kind in found)
    batch = draw(st.integers(size * multiple, max(min(held, 64), size * multiple)))
    return Cluster(found, batch, draw(all_reduces), multiple)


def step_s_of(cluster: Cluster, counts: tuple[int, ...]) -> float | None:
    """Return the seconds per step of some devices, by the solver for ranks; None if they cannot hold the batch."""
    times = [kind.step_time for kind, n in zip(cluster.kinds, counts, strict=True) for _ in range(n)]
    caps = [
        cluster.global_batch_size if kind.max_batch_size is None else kind.max_batch_size
        for kind, n in zip(cluster.kinds, counts, strict=True)
        for _ in range(n)
    ]
    limits = BatchLimits(tuple(caps), cluster.batch_multiple)
    try:
        plan = solve_batch(times, cluster.global_batch_size, limits, min_samples=1)
    except ConfigurationError:
        return None
    return cluster.all_reduce.step_s(predicted_step_s(times, plan), len(times))


def all_sets(cluster: Cluster) -> dict[tuple[int, ...], float]:
    found = {n: step_s_of(cluster, n) for n in product(*(range(kind.count + 1) for kind in cluster.kinds)) if any(n)}
    return {counts: step_s for counts, step_s in found.items() if step_s is not None}


@settings(max_examples=drawn(20, 120), deadline=None)
@given(clusters(most_multiple=3))
def test_the_prediction_is_that_of_expanded_ranks(cluster: Cluster) -> None:
    counts = tuple(kind.count for kind in cluster.kinds)
    expected = step_s_of(cluster, counts)
    if expected is None:
        with pytest.raises(InfeasiblePlanError):
            plan_cluster(cluster)
        return
    plan = plan_cluster(cluster, min_gain=0.0)
    assert plan.whole.step_s == expected
    assert plan.whole.samples_per_s == pytest.approx(cluster.global_batch_size / expected)
    assert 0 < plan.efficiency <= 1 + 1e-9
    assert max(one.max_own_s for one in plan.kinds) + plan.exposed_communication_s == pytest.approx(expected)
    least, most = (
        sum(getattr(one, name) * one.kind.count for one in plan.kinds) for name in ("min_samples", "max_samples")
    )
    assert least <= cluster.global_batch_size <= most
    for one in plan.kinds:
        assert one.min_waiting_s >= -1e-12
        assert one.max_waiting_s == pytest.approx(one.step_s - one.min_own_s)
    if plan.fastest is not None:
        assert plan.fastest.step_s < plan.whole.step_s
    if plan.cheapest is not None:
        assert plan.cheapest.cost_per_million_samples is not None
        assert plan.whole.cost_per_million_samples is not None
        assert plan.cheapest.cost_per_million_samples < plan.whole.cost_per_million_samples


@settings(max_examples=drawn(20, 120), deadline=None)
@given(clusters())
def test_the_sets_are_the_best_of_all(cluster: Cluster) -> None:
    found = all_sets(cluster)
    whole = tuple(kind.count for kind in cluster.kinds)
    if whole not in found:
        return
    plan = plan_cluster(cluster, min_gain=0.0)
    assert found[DeviceSearch(cluster).fastest()] == pytest.approx(min(found.values()))
    fastest = plan.fastest or plan.whole
    assert fastest.step_s <= min(found.values()) * (1 + 0.005 + 1e-9)
    assert found[fastest.counts] == pytest.approx(fastest.step_s)
    costs = {counts: step_s * cluster.price_per_hour(counts) for counts, step_s in found.items()}
    cheapest = plan.cheapest or plan.whole
    # this search is a heuristic
    assert costs[cheapest.counts] <= min(costs.values()) * 1.03
    assert cheapest.cost_per_million_samples == pytest.approx(
        costs[cheapest.counts] / 3600 / cluster.global_batch_size * 1e6
    )


def test_numbers_agree_with_the_advice_of_a_running_training() -> None:
    fast, slow = StepTime(0.002, 0.001), StepTime(0.004, 0.003)
    plan = plan_cluster(Cluster((DeviceKind("fast", 2, fast), DeviceKind("slow", 1, slow)), 96))
    times = [fast, fast, slow]
    advice = advise(times, solve_batch(times, 96, min_samples=1), BatchLimits())
    assert plan.speed_up == pytest.approx(advice.speed_up)
    assert plan.efficiency == pytest.approx(advice.efficiency)
    assert plan.rounding == advice.rounding
    assert plan.fastest is None
    assert plan.cheapest is None


def test_kinds_that_only_delay_are_left_out() -> None:
    quick, useless = DeviceKind("quick", 2, StepTime(0.01, 0.001)), DeviceKind("useless", 3, StepTime(0.2, 0.01))
    plan = plan_cluster(Cluster((quick, useless), 60))
    assert plan.fastest is not None
    assert plan.fastest.counts == (2, 0)
    assert plan.fastest.step_s == pytest.approx(0.04)


def test_a_long_ring_is_worth_less_than_a_short_one() -> None:
    cluster = Cluster((DeviceKind("one", 1000, StepTime(0.0, 0.001)),), 10_000, AllReduce((1e6,), 1e10, 1e-3))
    plan = plan_cluster(cluster)
    assert plan.fastest is not None
    # seconds are 10 / W + 2 (W - 1) / 1000, and a little for the bytes
    step_s = {n: cluster.all_reduce.step_s(0.001 * -(-10_000 // n), n) for n in range(1, 1001)}
    assert plan.fastest.counts[0] == min(step_s, key=lambda n: step_s[n]) == pytest.approx(71, abs=2)


def test_an_expensive_kind_is_left_out_for_cost() -> None:
    cheap = DeviceKind("cheap", 4, StepTime(0.0, 0.002), price_per_hour=1.0)  # any number of them costs the same
    dear = DeviceKind("dear", 4, StepTime(0.0, 0.001), price_per_hour=9.0)
    plan = plan_cluster(Cluster((cheap, dear), 240))
    assert plan.cheapest is not None
    assert plan.cheapest.counts == (4, 0)
    assert plan.cheapest.cost_per_million_samples == pytest.approx(1e6 * 0.002 / 3600)


def test_single_moves_find_cheaper_devices() -> None:
    """Found among random clusters: without the moves, the set would cost 3 % more than the best one."""
    described = [(4, 0.05, 0.018, 16, 3.3), (1, 0.044, 0.023, 8, 5.4), (3, 0.078, 0.034, 8, 1.2)]
    devices = tuple(DeviceKind("one", n, StepTime(a, c), most, None, price) for n, a, c, most, price in described)
    cluster = Cluster(devices, 64, AllReduce((9e6,), 1e9))
    costs = {counts: step_s * cluster.price_per_hour(counts) for counts, step_s in all_sets(cluster).items()}
    assert costs[DeviceSearch(cluster).cheapest()] == pytest.approx(min(costs.values()))


def test_equal_shares_that_do_not_fit_are_no_comparison() -> None:
    small, large = (
        DeviceKind("small", 1, StepTime(0, 0.002), memory_bytes=1e9),
        DeviceKind("large", 1, StepTime(0, 0.001)),
    )
    plan = plan_cluster(Cluster((small, large), 128, memory=SampleMemory(20e6, 100e6)))
    assert plan.kinds[0].max_samples == 41  # (920 - 100) / 20
    assert plan.ddp_step_s is None
    assert plan.speed_up is None
    assert plan.ddp_does_not_fit == "small can hold 41 samples, but an equal share is 64"


def test_rounding_is_reported_with_a_better_batch() -> None:
    plan = plan_cluster(Cluster((DeviceKind("a", 1, StepTime(0, 0.010)), DeviceKind("b", 1, StepTime(0, 0.015))), 4))
    assert plan.rounding == pytest.approx(0.2, abs=1e-3)
    assert plan.enough_global_batch_size is not None
    times = [StepTime(0, 0.010), StepTime(0, 0.015)]
    assert advise(times, BatchPlan((2, 2)), BatchLimits()).enough_global_batch_size == plan.enough_global_batch_size


def test_impossible_clusters_are_refused() -> None:
    one = DeviceKind("one", 1, StepTime(0, 1), max_batch_size=3)
    with pytest.raises(ConfigurationError, match="at least one kind"):
        Cluster((), 8)
    with pytest.raises(ConfigurationError, match="`count` must be at least 1, got 0 of none"):
        DeviceKind("none", 0, StepTime(0, 1))
    with pytest.raises(InfeasiblePlanError, match=r"one must hold at least `batch_multiple` samples \(4\)"):
        Cluster((one,), 8, batch_multiple=4)
    with pytest.raises(ConfigurationError, match="`price_per_hour` must be given for all"):
        Cluster((one, DeviceKind("two", 1, StepTime(0, 1), price_per_hour=1.0)), 8)
    with pytest.raises(InfeasiblePlanError, match="global batch of 8 samples, got 1 devices that hold 3"):
        plan_cluster(Cluster((one,), 8))
    with pytest.raises(
        InfeasiblePlanError, match=r"each of the 5 devices at least `batch_multiple` samples \(1\), got 4"
    ):
        plan_cluster(Cluster((DeviceKind("five", 5, StepTime(0, 1)),), 4))


def test_ten_thousand_devices_of_six_kinds() -> None:
    """It is not timed here; the search must be at least as good as leaving out entire kinds."""
    speeds = (4.0, 3.0, 2.0, 1.0, 0.5, 0.01)
    devices = tuple(
        DeviceKind(f"kind {i}", 10_000 // 6, StepTime(0.002, 0.001 / speed), price_per_hour=0.5 + speed)
        for i, speed in enumerate(speeds)
    )
    cluster = Cluster(devices, 640_000, AllReduce((1e6, 25e6, 5e6), 100e9, 1e-6))
    plan = plan_cluster(cluster, min_gain=0.0)
    prefixes = [tuple(10_000 // 6 * (i < kept) for i in range(6)) for kept in range(1, 7)]
    step_s = {counts: step_s_of(cluster, counts) for counts in prefixes}
    best_s = min(seconds for seconds in step_s.values() if seconds is not None)
    assert (plan.fastest or plan.whole).step_s <= best_s * (1 + 1e-9)
    costs = [seconds * cluster.price_per_hour(counts) for counts, seconds in step_s.items() if seconds is not None]
    cost = (plan.cheapest or plan.whole).cost_per_million_samples
    assert cost is not None
    assert cost <= min(costs) / 3600 / 640_000 * 1e6 * (1 + 1e-9)
