"""Layers are divided as well as by brute force, and every stage fits into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn

from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, refine_stages, solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

seconds = st.floats(0.0, 10.0).map(lambda s: round(s, 3))


@st.composite
def costs(draw: st.DrawFn, same_layers: bool = False) -> LayerCosts:
    world_size = draw(st.integers(1, 4))
    num_layers = draw(st.integers(world_size, 8))
    if same_layers or draw(st.booleans()):
        layers = draw(st.lists(st.tuples(seconds, seconds), min_size=num_layers, max_size=num_layers))
        speeds = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=world_size, max_size=world_size))
        return LayerCosts.of_speeds(layers, speeds)

    def matrix() -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(draw(st.lists(seconds, min_size=num_layers, max_size=num_layers))) for _ in range(world_size)
        )

    return LayerCosts(matrix(), matrix())


def all_plans(num_layers: int, world_size: int) -> Iterator[StagePlan]:
    """Yield every division in every order in which rank 0 is last."""
    for ranks in itertools.permutations(range(1, world_size)):
        for ends in itertools.combinations(range(1, num_layers), world_size - 1):
            yield StagePlan((*ranks, 0), (*ends, num_layers))


@settings(max_examples=drawn(100, 600))
@given(costs())
def test_the_slowest_stage_is_as_fast_as_any_division_makes_it(problem: LayerCosts) -> None:
    best = min(problem.of_stages(plan).slowest_s for plan in all_plans(problem.num_layers, problem.world_size))
    assert problem.of_stages(solve_stages(problem)).slowest_s == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=drawn(100, 600))
@given(costs(), st.data())
def test_memory_is_respected_wherever_it_can_be(problem: LayerCosts, data: st.DataObject) -> None:
    def numbers(count: int, low: int, high: int) -> tuple[float, ...]:
        return tuple(float(n) for n in data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    schedule: Schedule = data.draw(st.sampled_from(["gpipe", "1f1b"]))
    memory = StageMemory(
        weights_bytes=numbers(problem.num_layers, 1, 5),
        activations_bytes=numbers(problem.num_layers, 0, 3),
        budgets_bytes=numbers(problem.world_size, 3, 60),
        micro_batches=data.draw(st.integers(1, 4)),
        schedule=schedule,
    )
    allowed = [plan for plan in all_plans(problem.num_layers, problem.world_size) if memory.allows(plan)]
    if not allowed:
        with pytest.raises(InfeasiblePlanError, match="layers must fit into the memory of"):
            solve_stages(problem, memory)
        return
    best = min(problem.of_stages(plan).slowest_s for plan in allowed)
    plan = solve_stages(problem, memory)
    assert memory.allows(plan)
    assert problem.of_stages(plan).slowest_s == pytest.approx(best, rel=1e-9, abs=1e-9)
    refined = refine_stages(problem, plan, 3, schedule, memory)
    assert memory.allows(refined)


@settings(max_examples=drawn(100, 600))
@given(costs(), st.data())
def test_what_is_received_takes_memory(problem: LayerCosts, data: st.DataObject) -> None:
    """Boundaries of one size are divided as well as by brute force; of any size, what is found fits."""
    n = problem.num_layers
    same = data.draw(st.booleans())
    sizes = (
        [data.draw(st.integers(0, 6))] * n if same else data.draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    )
    budgets = data.draw(st.lists(st.integers(3, 60), min_size=problem.world_size, max_size=problem.world_size))
    memory = StageMemory((2.0,) * n, (1.0,) * n, tuple(map(float, budgets)), 2, "gpipe", tuple(map(float, sizes)))
    plans = list(all_plans(n, problem.world_size))
    allowed = [plan for plan in plans if memory.allows(plan)]
    for plan in plans:
        ends = (0, *plan.ends)
        for stage, needed in enumerate(memory.needed_bytes(plan)):
            crossing = [sizes[end - 1] for end in ends[stage : stage + 2] if 0 < end < n]
            assert needed == 4.0 * len(plan.layers(stage)) + sum(crossing)
    try:
        plan = solve_stages(problem, memory)
    except InfeasiblePlanError:
        assert not allowed or not same
        return
    assert memory.allows(plan)
    assert memory.allows(refine_stages(problem, plan, 3, "gpipe", memory))
    if same:
        best = min(problem.of_stages(plan).slowest_s for plan in allowed)
        assert problem.of_stages(plan).slowest_s == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(costs(), st.integers(1, 8), st.sampled_from(["gpipe", "1f1b"]))
def test_refining_never_makes_a_step_longer(problem: LayerCosts, micro_batches: int, schedule: Schedule) -> None:
    plan = solve_stages(problem)
    refined = refine_stages(problem, plan, micro_batches, schedule)
    before, after = (simulate_pipeline(problem.of_stages(p), micro_batches, schedule).step_s for p in (plan, refined))
    assert after <= before
    assert refined.ranks[-1] == 0


def test_half_the_speed_is_a_third_of_the_layers() -> None:
    plan = solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * 12, speeds=[1, 2]))
    assert plan.layers_of_ranks == (4, 8)
    plan = solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * 14, speeds=[1, 2, 4]))
    assert plan.layers_of_ranks == (2, 4, 8)


def test_many_kinds_of_ranks_are_divided_too() -> None:
    """Even with more orders than can be tried, stages are within a layer of proportional."""
    speeds = [1 + rank / 40 for rank in range(40)]
    problem = LayerCosts.of_speeds([(1.0, 2.0)] * 400, speeds)
    bound_s = 3 * 400 / sum(speeds)
    assert problem.of_stages(solve_stages(problem)).slowest_s < 1.35 * bound_s


def test_uniform_stages_ignore_speeds() -> None:
    assert uniform_stages(7, 3) == StagePlan((1, 2, 0), (3, 5, 7))


@pytest.mark.parametrize("plan", [((1, 0), (0, 4)), ((0, 0), (2, 4)), ((1, 0), (4, 2)), ((0,), ())])
def test_a_stage_without_layers_is_refused(plan: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ConfigurationError, match="a stage of at least one layer on each rank"):
        StagePlan(*plan)


def test_fewer_layers_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at least one layer per rank \(3\), got 2"):
        solve_stages(LayerCosts.of_speeds([(1.0, 1.0)] * 2, [1, 1, 1]))


def test_plans_survive_json() -> None:
    plan = StagePlan((2, 1, 0), (3, 4, 9))
    assert StagePlan.from_dict(plan.to_dict()) == plan
    shared = StagePlan((1, 0), (2, 4), ((0, 3),))
    assert StagePlan.from_dict(shared.to_dict()) == shared


def test_a_shared_layer_is_run_by_either_stage_and_both_have_it() -> None:
    plan = StagePlan((0, 1, 0), (2, 3, 5), ((1, 2), (0, 1, 2)))
    assert [plan.layers(1, i) for i in range(4)] == [range(2, 4), range(3, 4), range(3, 4), range(2, 3)]
    assert plan.shared == (2, 3)
    assert (plan.layers_of(0), plan.layers_of(1)) == ((0, 1, 2, 3, 4), (2, 3))
    assert [*map(plan.layers, range(3))] == [range(2), range(2, 3), range(3, 5)], "of evaluation"
    assert StagePlan((0, 1), (2, 3), ((),)) == StagePlan((0, 1), (2, 3))
    memory = StageMemory((1.0,) * 5, (1.0,) * 5, (10.0, 10.0), received_bytes=(0.0, 1.0, 2.0, 5.0, 0.0))
    assert memory.left_bytes(plan) == (10 - 5 - 2 - 5, 10 - 2 - 2 - 5), "what crosses a border is the larger of two"


@pytest.mark.parametrize("lent", [((0,), ()), ((1, 0),), ((0, 1, 2),), ((-1,),)])
def test_a_stage_without_a_layer_for_a_micro_batch_is_refused(lent: Any) -> None:
    with pytest.raises(ConfigurationError, match="at least one layer for each micro-batch"):
        StagePlan((0, 1), (2, 3), lent)
