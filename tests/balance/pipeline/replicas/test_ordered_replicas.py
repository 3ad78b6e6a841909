"""Replicas with planned orders end, fit into memory, and are never slower than what is simpler by more than 2 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn, thorough
from replica_problems import problems

from lightning_hetero.balance.pipeline.orders.proof import most_held, verify_order
from lightning_hetero.balance.pipeline.orders.search import plan_order
from lightning_hetero.balance.pipeline.replicas.orders import group_planner
from lightning_hetero.balance.pipeline.replicas.orders.group_orders import GroupOrder, OrderTimes
from lightning_hetero.balance.pipeline.replicas.orders.ordered_solver import OrderedReplicas, solve_ordered_replicas
from lightning_hetero.balance.pipeline.replicas.orders.watched_orders import WatchedOrders
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import good_solutions, predict_replicas, solve_replicas
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts
from lightning_hetero.exceptions import InfeasiblePlanError


def with_parts(problem: ReplicaProblem) -> ReplicaProblem:
    """Return a problem whose backward passes can be split into two parts that take as long together."""
    costs = problem.costs
    half = tuple(tuple(s / 2 for s in row) for row in costs.backward_s)
    return replace(problem, costs=replace(costs, input_s=half, weight_s=half))


def problem_of(speeds: Sequence[float], layers: int = 12, **changed: Any) -> ReplicaProblem:
    """Return a problem with equal layers of 30 ms on a device of speed 1 for a micro-batch of two samples."""
    arguments: dict[str, Any] = {"samples": 32, "micro_batches": 8, "micro_batch_size": 2.0, **changed}
    return with_parts(ReplicaProblem(LayerCosts.of_speeds([(0.01, 0.02)] * layers, speeds), **arguments))


def check(problem: ReplicaProblem, found: OrderedReplicas) -> None:
    """Each order ends, is for all micro-batches that there may be, and fits into memory."""
    solution, plan = found.solution, found.solution.plan
    assert sum(solution.samples) == problem.samples
    assert plan.samples(problem.samples) == solution.samples
    assert ReplicaPlan.from_dict(plan.to_dict()) == plan
    assert solution.step_s >= max(solution.pipelines_s) >= 0.999999 * solution.bound_s
    assert len(found.orders) == len(found.names) == len(plan.replicas)
    for replica, order, name, samples in zip(plan.replicas, found.orders, found.names, solution.samples, strict=True):
        assert replica.stages.ranks[-1] == 0, "the first rank has the last stage"
        assert (replica.stages.num_stages > len(replica.ranks)) == ("v" in name.split())
        assert not replica.stages.shared
        if order is None:
            assert name == "1f1b"
            continue
        verify_order(order)
        assert order.ranks == replica.stages.ranks
        assert order.micro_batches == problem.micro_batches
        memory = problem.memory_of(replica.ranks, samples)
        if memory is not None:
            held = [sum(memory.activations_bytes[i] for i in replica.stages.layers(s)) for s in range(order.num_stages)]
            most = most_held(order.first(min(problem.micro_batches, samples)), held)
            assert all(a <= b + 1e-6 for a, b in zip(most, memory.left_bytes(replica.stages), strict=True))


@settings(max_examples=drawn(12, 300), deadline=None)
@given(problems(ranks=(1, 4), layers=6, gradients=True), st.booleans(), st.booleans())
def test_drawn_problems(problem: ReplicaProblem, always_v: bool, parts: bool) -> None:
    problem = replace(with_parts(problem) if parts else problem, schedule="1f1b")
    try:
        known = solve_replicas(problem)
    except InfeasiblePlanError:
        with pytest.raises(InfeasiblePlanError):
            solve_ordered_replicas(problem, always_v=always_v)
        return
    found = solve_ordered_replicas(problem, always_v=always_v)
    check(problem, found)
    if not always_v:
        assert found.solution.step_s <= 1.02 * known.step_s * (1 + 1e-9)
    if not parts:
        assert not any("split" in name for name in found.names)


@settings(max_examples=drawn(30, 300), deadline=None)
@given(problems(gradients=True))
def test_known_orders_are_timed_as_they_are_found(problem: ReplicaProblem) -> None:
    problem = replace(problem, schedule="1f1b")
    try:
        solutions = good_solutions(problem, 2)
    except InfeasiblePlanError:
        return
    times = OrderTimes(problem)
    for solution in solutions:
        for replica, samples, ends_s in zip(
            solution.plan.replicas, solution.samples, solution.pipelines_s, strict=True
        ):
            one = GroupOrder(replica.ranks, replica.stages)
            assert times.step_s(one, samples) == pytest.approx(ends_s)
        assert predict_replicas(problem, solution.plan).step_s == pytest.approx(solution.step_s)


def test_planned_replicas_beat_both_of_which_they_consist() -> None:
    memory = StageMemory((1.0,) * 12, (0.01,) * 12, (9.0,) * 4)
    problem = problem_of([2, 2, 1, 1], memory=memory)
    found, known = solve_ordered_replicas(problem), solve_replicas(problem)
    alone = solve_ordered_replicas(replace(problem, replicas=1))
    check(problem, found)
    assert found.solution.step_s < 0.95 * min(known.step_s, alone.solution.step_s)
    assert found.solution.of_bound > 0.94
    assert "one pipeline 1f1b" in found.reason
    assert "2 replicas 1f1b" in found.reason


def test_one_pipeline_is_taken_if_gradients_would_take_long() -> None:
    problem = problem_of([2, 2, 1, 1], parameter_bytes=(1e8,) * 12, within=Link(seconds_per_byte=1e-9))
    found = solve_ordered_replicas(problem)
    check(problem, found)
    assert len(found.solution.plan.replicas) == 1
    assert found.names != ("1f1b",)


def test_the_simplest_is_taken_if_nothing_is_gained() -> None:
    found = solve_ordered_replicas(problem_of([1, 1], replicas=2))
    assert found.names == ("1f1b", "1f1b")
    short = problem_of([2, 2, 1, 1], micro_batch_size=400.0, memory=StageMemory((1.0,) * 12, (0.0,) * 12, (9.0,) * 4))
    assert {*solve_ordered_replicas(short).names} == {"1f1b"}
    assert {*solve_ordered_replicas(short, always_v=True).names} <= {"v", "split v"}


def test_groups_that_the_user_names_are_kept() -> None:
    found = solve_ordered_replicas(problem_of([1, 2, 3, 1], replicas=((3, 1), (0, 2))), always_v=True)
    assert [replica.ranks for replica in found.solution.plan.replicas] == [(0, 2), (3, 1)]
    assert [replica.stages.ranks for replica in found.solution.plan.replicas] == [(0, 1, 0), (0, 1, 0)]


def test_samples_follow_the_planned_times() -> None:
    """Of an unequal pair and one rank, the pair gains by its order, and gets samples for it."""
    problem = problem_of([3, 1, 2], replicas=((0, 1), (2,)), samples=60, micro_batches=4, micro_batch_size=7.5)
    found, known = solve_ordered_replicas(problem), solve_replicas(problem)
    assert found.names[0] != "1f1b"
    assert found.solution.samples[0] > known.samples[0]
    assert max(found.solution.pipelines_s) < 1.05 * min(found.solution.pipelines_s)


def test_stages_of_a_node_follow_each_other() -> None:
    slow, fast = Link(latency_s=0.002, seconds_per_byte=1e-8), Link(latency_s=1e-5, seconds_per_byte=1e-10)
    problem = problem_of(
        [2, 1, 2, 1], nodes=(0, 1, 0, 1), within=fast, between=slow, output_bytes=(1e5,) * 12, replicas=1
    )
    found = solve_ordered_replicas(problem, always_v=True)
    check(problem, found)
    replica = found.solution.plan.replicas[0]
    nodes = [problem.node_of(replica.ranks[own]) for own in replica.stages.ranks]
    assert sum(a != b for a, b in pairwise(nodes)) == 2


def test_alike_groups_are_planned_once() -> None:
    speeds = [2, 2, 2, 1, 1, 1]
    problem = problem_of(speeds, replicas=((0, 3), (1, 4), (2, 5)))
    planner = group_planner.GroupPlanner(problem)
    with mock.patch.object(group_planner, "plan_order", wraps=plan_order) as searched:
        for replica in solve_replicas(problem).plan.replicas:
            planner.ways(GroupOrder(replica.ranks, replica.stages), 10, 2_000, names=["v"])
    # ranks that must have a last stage are in the same place of their groups
    assert searched.call_count == 1


@pytest.mark.parametrize("speeds", [[4, 3, 2, 1] * 4, pytest.param([1 + 0.01 * i for i in range(16)], marks=thorough)])
def test_many_ranks(speeds: list[float]) -> None:
    memory = StageMemory((1.0,) * 24, (0.01,) * 24, (9.0,) * 16)
    problem = problem_of(speeds, layers=24, samples=128, memory=memory)
    found, known = solve_ordered_replicas(problem), solve_replicas(problem)
    check(problem, found)
    assert found.solution.step_s <= 1.02 * known.step_s


def test_shares_follow_devices_that_become_slower() -> None:
    memory = StageMemory((1.0,) * 12, (0.01,) * 12, (9.0,) * 4)
    problem = problem_of([2, 2, 1, 1], memory=memory, parameter_bytes=(1e3,) * 12, samples=96)
    ordered = solve_ordered_replicas(problem)
    watched, plan, ones = WatchedOrders(problem, (0.01,) * 12, ordered), ordered.solution.plan, (1.0,) * 4
    assert watched.step_s(plan, ones) == pytest.approx(ordered.solution.step_s)
    assert watched.solution(plan, ones).pipelines_s == pytest.approx(ordered.solution.pipelines_s)
    assert watched.candidates(plan, ones, 0.1, {}) == ()
    slow = plan.replicas[1].ranks
    factors = tuple(2.0 if rank in slow else 1.0 for rank in range(4))
    before, after, *_ = watched.candidates(plan, factors, 0.05, {})
    assert before == plan
    assert after.is_redivision_of(plan)
    assert watched.step_s(after, factors) < 0.8 * watched.step_s(plan, factors)
    assert watched.allows(plan, after)
    assert not watched.allows(solve_replicas(problem).plan, plan)
    assert watched.changing_s(plan, after) == 0.0
    kept = watched.without_moves(plan)
    assert kept is not None
    assert all(one == plan or one.is_redivision_of(plan) for one in kept.candidates(plan, factors, 0.05, {}))


def test_layers_of_a_replica_follow_a_rank_that_becomes_slower() -> None:
    problem = problem_of([1, 1, 1, 1], replicas=((0, 2), (1, 3)), samples=96)
    ordered = solve_ordered_replicas(problem, always_v=True)
    watched, plan, factors = WatchedOrders(problem, (0.01,) * 12, ordered), ordered.solution.plan, (1.0, 1.0, 1.0, 3.0)
    found = watched.candidates(plan, factors, 0.05, {})
    best = min(found, key=lambda one: watched.step_s(one, factors))
    shares = min((one for one in found if one.is_redivision_of(plan)), key=lambda one: watched.step_s(one, factors))
    assert watched.step_s(best, factors) < 0.95 * watched.step_s(shares, factors)
    assert len(best.layers_of(3)) < len(plan.layers_of(3))
    assert [one.stages.ranks for one in best.replicas] == [one.stages.ranks for one in plan.replicas]
    assert watched.changing_s(plan, best) > 0
    orders = watched.order_of(best)
    for order, replica in zip(orders, best.replicas, strict=True):
        assert order is not None
        verify_order(order)
        assert (order.ranks, order.micro_batches) == (replica.stages.ranks, problem.micro_batches)
    # other ranks learn of the plan and its orders
    other = WatchedOrders(problem, (0.01,) * 12, ordered)
    other.use(best, orders)
    assert other.step_s(best, factors) == watched.step_s(best, factors)
    assert other.own_s(best) == watched.own_s(best)
    # and it comes back
    assert (
        plan.replicas[0].stages
        == min(watched.candidates(best, (1.0,) * 4, 0.05, {}), key=lambda one: watched.step_s(one, (1.0,) * 4))
        .replicas[0]
        .stages
    )


def test_the_work_of_ranks_is_that_of_their_passes() -> None:
    problem = problem_of([2, 1, 1], replicas=((0, 1), (2,)))
    ordered = solve_ordered_replicas(problem, always_v=True)
    watched, plan = WatchedOrders(problem, (0.01,) * 12, ordered), ordered.solution.plan
    own_s = watched.own_s(plan)
    for replica, n in zip(plan.replicas, ordered.solution.samples, strict=True):
        for own, rank in enumerate(replica.ranks):
            layer_s = 0.03 / [2, 1, 1][rank]
            assert own_s[rank] == pytest.approx(layer_s * len(replica.stages.layers_of(own)) * n / 2.0)
    assert watched.own_s(plan, 1)[2] < 1e-6, "a replica without samples does nothing"
