"""The search finds stages and orders whose times are close to what is possible, within each rank's memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.pipeline.orders import search
from lightning_hetero.balance.pipeline.orders.choice import choose_order
from lightning_hetero.balance.pipeline.orders.proof import most_held, verify_order
from lightning_hetero.balance.pipeline.orders.search import (
    OrderPlan,
    OrderProblem,
    plan_order,
    straight_shapes,
    v_shapes,
)
from lightning_hetero.balance.pipeline.simulation import simulate_order
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import InfeasiblePlanError


def costs_of(speeds: list[float], layers: int = 12) -> LayerCosts:
    """Return the costs of equal layers whose forward pass and parts of the backward pass take as long as each other."""
    whole = LayerCosts.of_speeds([(1.0, 2.0)] * layers, speeds)
    return replace(whole, input_s=whole.forward_s, weight_s=whole.forward_s)


def found(problem: OrderProblem, *, v: bool = True) -> OrderPlan:
    shapes = straight_shapes(problem.costs, problem.last_rank)
    plan = plan_order(problem, [*shapes, *(v_shapes(problem.costs, problem.last_rank) if v else [])])
    assert plan is not None
    return plan


# Fractions of the limit with 12 equal layers, 8 micro-batches and the fastest rank last: one stage per rank with whole
# backward passes, and the best, with at most four micro-batches held and with all; last with shared layers and four.
FRACTIONS: dict[tuple[int, ...], tuple[float, ...]] = {
    (2, 1): (0.889, 0.970, 0.990, 0.995, 0.990),
    (4, 1): (0.873, 0.960, 0.960, 0.960, 0.996),
    (4, 2, 1): (0.807, 0.857, 0.857, 0.857, 0.960),  # whole layers allow no more
    (2, 1, 1): (0.800, 0.852, 0.947, 0.954, 0.960),
}


@pytest.mark.parametrize("speeds", FRACTIONS)
def test_plans_reach_the_part_of_the_limit_that_is_known(speeds: tuple[int, ...]) -> None:
    problem = OrderProblem(costs_of([*speeds]), 8)
    four = replace(problem, most_held=4)
    plans = [
        found(problem, v=False),
        found(four),
        found(replace(four, split=True)),
        found(replace(problem, split=True)),
        found(replace(four, split=True, shared=tuple(range(12)))),
    ]
    for plan, fraction in zip(plans, FRACTIONS[speeds], strict=True):
        assert problem.limit_s / plan.step_s >= fraction - 1e-3


def test_many_layers_are_planned_close_to_the_bound_with_little_effort() -> None:
    random = Random(1)
    costs = costs_of([random.choice([1.0, 2.0, 3.0, 4.0]) for _ in range(8)], 200)
    problem = OrderProblem(costs, 32, split=True, most_held=16)
    plan = found(problem)
    assert plan.step_s <= 1.03 * plan.bound_s
    assert problem.limit_s / plan.step_s > 0.94


@settings(max_examples=drawn(10, 300), deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_plans_are_valid_and_keep_within_each_memory(
    seed: int, world_size: int, count: int, is_split: bool, v: bool, shares: bool
) -> None:
    random = Random(seed)
    layers = random.randint(world_size, 9)
    rows = [[tuple(random.uniform(0.1, 2.0) for _ in range(layers)) for _ in range(world_size)] for _ in range(2)]
    forward, backward = map(tuple, rows)
    half = tuple(tuple(b / 2 for b in row) for row in backward)
    more = tuple(tuple(random.choice((1.0, 1.2)) * b for b in row) for row in half)  # what splitting costs
    costs = LayerCosts(forward, backward, half, more)
    memory = StageMemory(
        weights_bytes=tuple(random.uniform(1, 9) for _ in range(layers)),
        activations_bytes=tuple(random.uniform(1, 9) for _ in range(layers)),
        budgets_bytes=tuple(random.uniform(20, 200) for _ in range(world_size)),
        received_bytes=tuple(random.uniform(0, 2) for _ in range(layers)),
    )
    last = random.randrange(world_size)
    shared = tuple(i for i in range(layers) if shares and random.random() < 0.7)
    problem = OrderProblem(costs, count, last, random.uniform(0, 0.2), memory, split=is_split, shared=shared)
    shapes = v_shapes(costs, last) if v else straight_shapes(costs, last)
    with mock.patch.object(search, "_EFFORT", 4_000):
        plan = plan_order(problem, shapes)
        assert plan_order(problem, shapes) == plan, "the same every time"
    if plan is None:
        return
    task = problem.task(plan.stages)
    assert task is not None
    assert plan.stages.ranks == plan.order.ranks
    assert plan.stages.ranks[-1] == last
    verify_order(plan.order)
    assert {*plan.stages.shared} <= {*shared}
    for i in range(count):
        assert [n for s in range(plan.stages.num_stages) for n in plan.stages.layers(s, i)] == list(range(layers))
        assert all({*plan.stages.layers(s, i)} <= {*plan.stages.held(s)} for s in range(plan.stages.num_stages))
    for rank, most in enumerate(most_held(plan.order, task.held)):
        weights = sum(memory.weights_bytes[i] for i in plan.stages.layers_of(rank))
        assert weights + most <= memory.budgets_bytes[rank]
    assert simulate_order(plan.order, task.times, problem.transfer_s).step_s == pytest.approx(plan.step_s)
    assert plan.bound_s <= plan.step_s * (1 + 1e-9)


def test_nothing_is_found_where_nothing_fits() -> None:
    memory = StageMemory((1.0,) * 12, (1.0,) * 12, (3.0, 3.0))
    assert plan_order(OrderProblem(costs_of([2, 1]), 8, memory=memory), [(1, 0)]) is None


def test_a_single_rank_and_too_few_layers_have_no_v() -> None:
    assert v_shapes(costs_of([1]), 0) == []
    assert v_shapes(costs_of([1, 2], 2), 0) == []
    assert v_shapes(costs_of([1, 2, 3], 4), 0) == [(0, 2, 1, 0), (0, 1, 2, 0)]


# ---- the choice ----------------------------------------------------------------------------------------------------


def seconds(costs: LayerCosts, factor: float) -> LayerCosts:
    return LayerCosts(
        *(
            tuple(tuple(factor * s for s in row) for row in rows)
            for rows in (costs.forward_s, costs.backward_s, costs.input_s, costs.weight_s)
        )
    )


def test_the_simplest_plan_that_is_nearly_the_best_is_taken() -> None:
    costs = seconds(costs_of([2, 1]), 0.01)
    choice = choose_order(OrderProblem(costs, 8))
    assert (choice.name, choice.stages) == ("v", StagePlan((0, 1, 0), (2, 6, 12)))
    assert choice.order is not None
    assert "97% of the limit of 960 ms" in choice.reason
    assert "1f1b 1080 ms, v 990 ms; a rank holds at most" in choice.reason
    two = choose_order(OrderProblem(costs, 4))
    assert two.reason.endswith("; 8 micro-batches would reach 97%")
    split = choose_order(OrderProblem(costs, 8, split=True))
    assert split.name == "split v", "2.6 % faster"
    assert "split v 965 ms; a rank" in split.reason
    assert split.reason.endswith("neither more micro-batches nor more memory would bring 2 %")
    many = choose_order(OrderProblem(costs, 256))
    assert (many.name, many.order) == ("1f1b", None), "what is filled and drained hardly matters"


@mock.patch.object(search, "_EFFORT", 12_000)
def most_shared(plan: StagePlan) -> int:
    """Return the largest number of shared layers of a rank."""
    return max(len({*plan.shared} & {*plan.layers_of(rank)}) for rank in range(plan.world_size))


def test_layers_are_shared_where_whole_ones_cannot_be_divided_well() -> None:
    costs = seconds(costs_of([4, 2, 1]), 0.01)
    problem = OrderProblem(costs, 8, most_held=4, split=True, shared=tuple(range(12)))
    choice = choose_order(problem)
    assert choice.name == "shared split v"
    assert choice.step_s < choose_order(replace(problem, shared=())).step_s / 1.1
    assert len(choice.stages.shared) in (2, 3)
    for layer in choice.stages.shared:
        assert f"share layer {layer} (" in choice.reason
    assert choose_order(replace(problem, shared=(0, 11))).stages.shared == (), "each rank has layers of its own"
    assert choose_order(problem, always_v=True).stages.shared == ()
    gained_s = choose_order(replace(problem, shared=())).step_s - choice.step_s
    for part in (0.1, 2.0):  # of what sharing saves, to keep a layer equal
        slower = choose_order(replace(problem, sharing_s=(part * gained_s,) * 12))
        assert bool(slower.stages.shared) == (part < 1)
        assert slower.step_s > choice.step_s
        if slower.stages.shared:
            assert slower.step_s == pytest.approx(choice.step_s + part * gained_s * most_shared(slower.stages))
    costly = tuple(gained_s if layer in choice.stages.shared else 0.0 for layer in range(12))
    others = choose_order(replace(problem, sharing_s=costly)).stages.shared
    assert others, "another layer can be shared"
    assert not {*others} & {*choice.stages.shared}
    pair = OrderProblem(seconds(costs_of([2, 1]), 0.01), 8, split=True, shared=tuple(range(12)))
    assert choose_order(pair).stages.shared == (), "2 % cannot be won any more"


def test_short_passes_run_as_before_unless_a_v_is_asked_for() -> None:
    problem = OrderProblem(seconds(costs_of([2, 1]), 1e-4), 8)
    choice = choose_order(problem)
    assert choice.name == "1f1b"
    assert "too short for others" in choice.reason
    assert choose_order(problem, always_v=True).name == "v"
    assert choose_order(OrderProblem(costs_of([2, 1], 2), 8), always_v=True).name == "1f1b", "too few layers for a V"


def test_a_v_is_no_way_around_memory() -> None:
    memory = StageMemory((1.0,) * 12, (1.0,) * 12, (3.0, 3.0), micro_batches=8)
    with pytest.raises(InfeasiblePlanError):
        choose_order(OrderProblem(costs_of([2, 1]), 8, memory=memory))
