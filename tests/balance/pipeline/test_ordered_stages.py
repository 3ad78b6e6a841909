"""Stages in a planned order follow devices that change, and stay where nothing is to be gained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
from profiles import drawn, thorough
from simulation.watched_stages import simulate

from lightning_hetero.balance.pipeline import ordered_stages
from lightning_hetero.balance.pipeline.moves import LayerMove, layer_moves
from lightning_hetero.balance.pipeline.ordered_stages import OrderedStageProblem
from lightning_hetero.balance.pipeline.orders.order import forward_order, known_order
from lightning_hetero.balance.pipeline.orders.proof import verify_order
from lightning_hetero.balance.pipeline.orders.search import (
    OrderPlan,
    OrderProblem,
    plan_order,
    straight_shapes,
    v_shapes,
)
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan


@cache
def problem_of(speeds: tuple[float, ...], *, v: bool, shares: bool, in_example: int = 8) -> OrderedStageProblem:
    costs = LayerCosts.of_speeds([(0.003, 0.006)] * 12, speeds)
    costs = replace(costs, input_s=costs.forward_s, weight_s=costs.forward_s)
    shared = tuple(range(12)) if shares else ()
    searched = OrderProblem(costs, 8, 0, 0.0001, None, 6, split=shares, shared=shared)
    found = plan_order(searched, (v_shapes if v else straight_shapes)(costs, 0), effort=12_000)
    assert found is not None
    known = (in_example, 32, "1f1b", 0.0001, None, (0.01,) * 12)
    return OrderedStageProblem(costs, *known, searched, {found.stages: found.order})  # type: ignore[arg-type]


def with_one_by_one(problem: OrderedStageProblem) -> OrderedStageProblem:
    """Return a problem that also knows the best stages for "1f1b"."""
    searched = problem.searched
    plan = plan_pipeline(searched.costs, searched.micro_batches, "1f1b", searched.transfer_s)
    order = known_order(plan.ranks, searched.micro_batches, "1f1b")
    return replace(problem, orders={**fresh(problem).orders, plan: order}, way="v")


def first_of(problem: OrderedStageProblem) -> StagePlan:
    first, *_ = problem.orders
    return first


def fresh(problem: OrderedStageProblem) -> OrderedStageProblem:
    first = first_of(problem)
    return replace(problem, orders={first: problem.orders[first]})


WAYS = [
    pytest.param((2.0, 1.0), True, False),
    pytest.param((2.0, 1.0, 1.0), True, True),
    pytest.param((2.0, 1.0, 1.0), False, True, marks=thorough),
]


@pytest.mark.parametrize(("speeds", "v", "shares"), WAYS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_slows_down_is_relieved_and_gets_its_layers_back(
    speeds: tuple[float, ...], v: bool, shares: bool, asynchronous: bool
) -> None:
    problem = fresh(problem_of(speeds, v=v, shares=shares))
    first, usual = first_of(problem), [1.0] * len(speeds)
    slowed = [*usual[:-1], 2.0]
    run = simulate(
        problem, first, lambda step: slowed if 60 <= step < 160 else usual, 400, 0.02, asynchronous=asynchronous
    )
    assert {*run.plans[:60]} == {first}
    relieved, last = run.plans[120], run.plans[-1]
    assert "takes 2.0" in run.reasons[0][1] or "takes 1.9" in run.reasons[0][1]
    again = plan_order(replace(problem.searched, costs=problem.costs.times(slowed)), [first.ranks], effort=12_000)
    assert again is not None
    assert problem.step_s(relieved, slowed) <= 1.10 * again.step_s < problem.step_s(first, slowed)
    assert problem.step_s(last, usual) <= 1.10 * problem.step_s(first, usual)
    assert len(run.reasons) <= 4
    for plan in {*run.plans}:
        order = problem.order_of(plan)
        assert order is not None
        assert order.ranks == plan.ranks == first.ranks
        verify_order(order)


@pytest.mark.parametrize(("speeds", "v", "shares"), WAYS)
def test_chance_moves_nothing_and_costs_no_search(speeds: tuple[float, ...], v: bool, shares: bool) -> None:
    problem = fresh(problem_of(speeds, v=v, shares=shares))
    for seed in range(drawn(2, 50)):
        run = simulate(problem, first_of(problem), lambda _: [1.0] * len(speeds), 600, 0.03, seed=seed)
        assert not run.reasons
    assert len(problem.orders) <= 2


def test_times_are_those_of_the_passes_in_their_order() -> None:
    problem = problem_of((2.0, 1.0), v=True, shares=False)
    first = first_of(problem)
    layers = [sum(len(first.layers(stage)) for stage in first.stages_of(rank)) for rank in range(2)]
    each = [8 * count * 0.009 / speed for count, speed in zip(layers, (2.0, 1.0), strict=True)]
    assert problem.own_s(first) == pytest.approx(each)
    assert max(each) <= problem.step_s(first, (1.0, 1.0)) <= 1.1 * max(each)
    few = problem_of((2.0, 1.0), v=True, shares=False, in_example=4)
    assert few.own_s(first) == pytest.approx([seconds / 2 for seconds in each]), "of a step with fewer micro-batches"


def test_a_layer_that_a_second_rank_gets_too_moves() -> None:
    before = StagePlan((0, 1, 0), (2, 4, 6))
    after = StagePlan((0, 1, 0), (2, 4, 6), ((0,), ()))
    assert layer_moves(before, after) == (LayerMove(2, 1, 0),)
    assert layer_moves(after, before) == (), "whoever has it keeps it"
    assert layer_moves(after, StagePlan((0, 1, 0), (3, 4, 6))) == ()
    assert layer_moves(before, StagePlan((0, 1, 0), (1, 4, 6), ((), (0,)))) == (LayerMove(1, 0, 1), LayerMove(4, 0, 1))


def test_what_shared_layers_cost_counts_also_when_devices_change() -> None:
    free = problem_of((2.0, 1.0, 1.0), v=True, shares=True)
    shared, slowed = first_of(free), (1.0, 1.0, 2.0)
    searched = replace(free.searched, sharing_s=(1.0,) * 12)
    found = plan_order(searched, v_shapes(searched.costs, 0), effort=12_000)
    assert found is not None
    costly = replace(free, searched=searched, orders={found.stages: found.order, **free.orders})
    assert costly.step_s(shared, slowed) == pytest.approx(free.step_s(shared, slowed) + searched.sharing_of(shared))
    alone = replace(costly, orders={found.stages: found.order})
    others = alone.candidates(found.stages, slowed, 0.05, {})
    assert len(others) == 2, "stages without shared layers, which follow the slow device"
    assert all(plan.shared == () for plan in others)


# ---- steps that take longer than predicted ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Delays:
    """How many times as long as predicted the steps of each way take."""

    problem: OrderedStageProblem
    planned: float
    one_by_one: float

    def __call__(self, plan: StagePlan) -> float:
        return self.one_by_one if self.problem.way_of(plan) == "1f1b" else self.planned


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("speeds", [(2.0, 1.0), pytest.param((2.0, 1.0, 1.0), marks=thorough)])
def test_one_forward_one_backward_takes_over_where_a_planned_order_is_slower_than_it_would_be(
    speeds: tuple[float, ...], asynchronous: bool
) -> None:
    for seed in range(drawn(1, 20)):
        problem = with_one_by_one(problem_of(speeds, v=True, shares=False))
        first = first_of(problem)
        run = simulate(
            problem,
            first,
            lambda _: [1.0] * len(speeds),
            400,
            seed=seed,
            asynchronous=asynchronous,
            delay=Delays(problem, 1.5, 1.05),
        )
        assert [problem.way_of(plan) for plan in dict.fromkeys(run.plans)] == ["v", "1f1b"]
        assert run.plans[60] == run.plans[-1]
        ((_, reason),) = run.reasons
        assert reason.startswith(("steps take 1.4", "steps take 1.5"))
        assert problem.order_of(run.plans[-1]) == known_order(run.plans[-1].ranks, 8, "1f1b")


@pytest.mark.parametrize(("planned", "one_by_one", "most_changes"), [(1.5, 1.6, 2), (1.04, 1.0, 0), (1.3, 1.28, 2)])
def test_the_faster_way_is_kept_after_one_trial(planned: float, one_by_one: float, most_changes: int) -> None:
    for seed in range(drawn(2, 20)):
        problem = with_one_by_one(problem_of((2.0, 1.0), v=True, shares=False))
        delays = Delays(problem, planned, one_by_one)
        run = simulate(problem, first_of(problem), lambda _: (1.0, 1.0), 800, seed=seed, delay=delays)
        assert len(run.reasons) <= most_changes
        steps_s = {plan: delays(plan) * problem.step_s(plan, (1.0, 1.0)) for plan in {*run.plans}}
        assert steps_s[run.plans[-1]] <= 1.06 * min(steps_s.values())


def test_a_way_is_left_only_for_one_that_is_known() -> None:
    problem = fresh(problem_of((2.0, 1.0), v=True, shares=False))
    run = simulate(problem, first_of(problem), lambda _: (1.0, 1.0), 200, delay=lambda _: 1.5)
    assert not run.reasons


def test_both_ways_follow_a_device_that_changes() -> None:
    problem = with_one_by_one(problem_of((2.0, 1.0), v=True, shares=False))
    delays = Delays(problem, 1.5, 1.0)
    slowed = lambda step: (1.0, 2.0) if step >= 200 else (1.0, 1.0)  # noqa: E731
    run = simulate(problem, first_of(problem), slowed, 500, delay=delays)
    last = run.plans[-1]
    assert problem.way_of(last) == problem.way_of(run.plans[190]) == "1f1b"
    best = plan_pipeline(problem.costs.times((1.0, 2.0)), 8, "1f1b", problem.transfer_s)
    assert problem.own_s(last) == pytest.approx(problem.own_s(best), rel=0.15)
    assert last != run.plans[190]


def test_stages_of_one_forward_one_backward_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search may find the same stages, for which only one order can be known."""
    problem = with_one_by_one(problem_of((2.0, 1.0), v=True, shares=False))
    first, other = problem.orders
    order = problem.orders[other]
    found = OrderPlan(other, forward_order(other.ranks, 8), 0.1, 0.1)
    monkeypatch.setattr(ordered_stages, "plan_order", lambda *_, **__: found)
    assert other in problem.candidates(first, (1.0, 3.0), 0.05, {})
    assert problem.order_of(other) == order
    assert problem.way_of(other) == "1f1b"
