"""Layers move when devices change, soon and to the best stages, and never because of chance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from profiles import drawn, thorough
from simulation.watched_stages import simulate

from lightning_hetero.balance.pipeline.moves import LayerMove, layer_moves, moving_s
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.stage_rebalancer import StageProblem
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.balance.types import StepTiming, WindowTiming


def problem_of(
    speeds: Sequence[float],
    layers: Sequence[float] = (0.01,) * 12,
    micro_batches: int = 8,
    memory: StageMemory | None = None,
    moving_s: float = 0.01,
) -> StageProblem:
    costs = LayerCosts.of_speeds([(s / 3, s * 2 / 3) for s in layers], speeds)
    return StageProblem(costs, micro_batches, 32, "1f1b", 0.0001, memory, (moving_s,) * len(layers))


def optimum_s(problem: StageProblem, factors: Sequence[float]) -> float:
    """Return the seconds of a step under the best of all plans."""
    plans = [
        StagePlan((*ranks, 0), (*ends, problem.costs.num_layers))
        for ranks in itertools.permutations(range(1, problem.costs.world_size))
        for ends in itertools.combinations(range(1, problem.costs.num_layers), problem.costs.world_size - 1)
    ]
    return min(problem.step_s(plan, factors) for plan in plans)


def best_plan(problem: StageProblem) -> StagePlan:
    return plan_pipeline(problem.costs, problem.micro_batches, problem.schedule, problem.transfer_s, problem.memory)


SPEEDS = [[1.0, 1.0], [2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 4.0], [3.0, 2.0, 1.0, 1.0]]


@pytest.mark.parametrize("speeds", SPEEDS)
@pytest.mark.parametrize("slow", [0, 1, -1])
@pytest.mark.parametrize("jitter", [0.0, pytest.param(0.02, marks=thorough), 0.05])
def test_a_rank_that_slows_down_is_relieved_within_40_steps_and_gets_its_layers_back(
    speeds: list[float], slow: int, jitter: float
) -> None:
    problem = problem_of(speeds)
    slowed = [1.0] * len(speeds)
    slowed[slow] = 2.0

    def factors(step: int) -> list[float]:
        return slowed if 60 <= step < 160 else [1.0] * len(speeds)

    run = simulate(problem, best_plan(problem), factors, 240, jitter)
    assert len(set(run.plans[:60])) == 1
    assert problem.step_s(run.plans[100], slowed) <= 1.10 * optimum_s(problem, slowed)
    assert problem.step_s(run.plans[200], [1.0] * len(speeds)) <= 1.10 * optimum_s(problem, [1.0] * len(speeds))
    assert len(run.reasons) <= 4
    if run.reasons:
        assert f"rank {slow % len(speeds)} takes" in run.reasons[0][1]


@pytest.mark.parametrize("speeds", SPEEDS)
@pytest.mark.parametrize("jitter", [*(pytest.param(few, marks=thorough) for few in (0.01, 0.03)), 0.05])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_chance_moves_nothing(speeds: list[float], jitter: float, asynchronous: bool) -> None:
    problem = problem_of(speeds)
    for seed in range(drawn(2, 100)):
        run = simulate(
            problem, best_plan(problem), lambda _: [1.0] * len(speeds), 1200, jitter, seed=seed,
            asynchronous=asynchronous,
        )  # fmt: skip
        assert len(set(run.plans)) == 1, run.reasons


def test_layers_do_not_move_to_and_fro_where_they_cost_more_in_a_stage_than_alone() -> None:
    """Each of two plans seems better from the other: layers of the first stage take longer than they took alone."""
    problem = problem_of([1.0, 1.0])

    def bias(plan: StagePlan, rank: int) -> float:
        return 1.4 if (rank == 1) == (plan.ends[0] >= 6) else 1.0

    for seed in range(3):
        run = simulate(problem, best_plan(problem), lambda _: [1.0, 1.0], 1200, 0.02, seed=seed, bias=bias)
        assert len(run.reasons) <= 3, run.reasons
        assert run.plans[-1] == run.plans[0]  # the best of them


def test_what_hosts_hide_moves_nothing() -> None:
    """A rank with slack seems faster while its host does not wait for its device."""
    problem = problem_of([1.0, 1.0], layers=[0.01] * 9)
    run = simulate(problem, best_plan(problem), lambda _: [1.0, 1.0], 1200, asynchronous=True, slack=0.4)
    assert len(set(run.plans)) == 1
    drifted = simulate(
        problem, best_plan(problem), lambda step: [1.0, 2.0 if step >= 60 else 1.0], 400, asynchronous=True, slack=0.4
    )
    assert problem.step_s(drifted.plans[120], [1.0, 2.0]) <= 1.10 * optimum_s(problem, [1.0, 2.0])


def test_a_move_that_does_not_pay_is_only_advised_and_only_once() -> None:
    problem = problem_of([1.0, 1.0], moving_s=30.0)
    plan = best_plan(problem)
    run = simulate(problem, plan, lambda step: [1.0, 2.0 if step >= 60 else 1.0], remaining=200)
    assert set(run.plans) == {plan}
    assert len(run.reasons) == 1
    endless = simulate(problem, plan, lambda step: [1.0, 2.0 if step >= 60 else 1.0])
    assert endless.plans[-1] != plan


def test_a_move_respects_the_memory_of_every_rank() -> None:
    memory = StageMemory((1.0,) * 12, (0.0,) * 12, (7.0, 12.0), 8)
    problem = problem_of([1.0, 1.0], memory=memory)
    run = simulate(problem, best_plan(problem), lambda step: [1.0, 3.0 if step >= 60 else 1.0])
    assert run.plans[-1].layers_of_ranks == (7, 5)


def test_exchanges_take_no_more_than_a_hundredth_of_the_time() -> None:
    problem = problem_of([1.0, 1.0], layers=[1e-5] * 12)
    run = simulate(problem, best_plan(problem), lambda _: [1.0, 1.0], 5000, exchange_s=0.001)
    step_s = problem.step_s(run.plans[0], [1.0, 1.0])
    assert run.exchanges * 0.001 <= 0.02 * 5000 * step_s  # the first ones are made before it is known
    assert run.measured < 1500


def test_ragged_batches_do_not_count() -> None:
    problem = problem_of([1.0, 1.0])
    watch = StageWatch(problem, best_plan(problem), 0.05, 10, asynchronous=False)
    whole = [StepTiming(32, 0.5) for _ in range(9)]
    assert watch.summary([*whole, StepTiming(4, 0.1)]) == WindowTiming(32, 7, 0.5, 0.0, 0.0)
    assert watch.summary([StepTiming(4, 0.1)]).samples == 4
    assert watch.summary([]).steps == 0


def test_moves_are_those_between_two_plans() -> None:
    before, after = StagePlan((1, 2, 0), (2, 4, 6)), StagePlan((1, 2, 0), (3, 5, 6))
    assert layer_moves(before, after) == (LayerMove(2, 2, 1), LayerMove(4, 0, 2))
    assert moving_s(before, after, [1, 2, 4, 8, 16, 32]) == 20
    assert not layer_moves(before, before)
