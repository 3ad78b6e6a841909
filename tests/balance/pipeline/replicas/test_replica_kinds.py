"""Ranks that differ only a little are alike while groups are searched, and count as they are in what is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_hetero.balance.pipeline.replicas.kinds import with_fewer_kinds
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import predict_replicas, solve_replicas
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts

LAYERS = [(0.001, 0.002)] * 12


def problem_of(speeds: list[float], budgets: list[float]) -> ReplicaProblem:
    memory = StageMemory((1.0,) * 12, (0.0,) * 12, tuple(budgets))
    return ReplicaProblem(
        LayerCosts.of_speeds(LAYERS, speeds),
        96,
        8,
        parameter_bytes=(1e7,) * 12,
        output_bytes=(1e4,) * 12,
        memory=memory,
        within=Link(1e-5, 1e-10),
        between=Link(5e-5, 8e-9),
        nodes=tuple(rank % 2 for rank in range(len(speeds))),
    )


def test_ranks_of_a_kind_have_mean_times_and_the_least_budget() -> None:
    alike = with_fewer_kinds(problem_of([1.0, 2.0, 1.01, 1.99, 2.5], [7.0, 9.0, 6.9, 8.9, 9.0]))
    work = [sum(row) for row in alike.costs.total_s]
    assert work[0] == work[2] == pytest.approx(0.036 * (1 + 1 / 1.01) / 2)
    assert work[1] == work[3] != work[4] == pytest.approx(0.036 / 2.5)
    assert alike.memory is not None
    assert alike.memory.budgets_bytes == (6.9, 8.9, 6.9, 8.9, 9.0)


def test_ranks_with_other_layers_or_memory_are_not_alike() -> None:
    problem = problem_of([1.0, 1.0], [7.0, 9.0])
    assert with_fewer_kinds(problem) == problem
    costs = LayerCosts(((1.0, 3.0), (3.0, 1.0)), ((0.0, 0.0), (0.0, 0.0)))
    same_sums = ReplicaProblem(costs, 4)
    assert with_fewer_kinds(same_sums) == same_sums
    third = problem_of([3.0, 3.0, 3.0], [7.0] * 3)
    assert with_fewer_kinds(third) == third, "not even a last digit changes"


def test_a_search_with_noise_is_as_good_as_without() -> None:
    speeds, budgets = [3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], [4.0] * 12
    noise = [1.01, 0.99, 1.0, 1.004, 0.992, 1.008, 1.0, 0.996, 1.007, 0.993, 1.002, 0.998]
    noisy = [speed * factor for speed, factor in zip(speeds, noise, strict=True)]
    exact, measured = problem_of(speeds, budgets), problem_of(noisy, budgets)
    solution = solve_replicas(measured)
    assert solution.step_s <= 1.02 * solve_replicas(exact).step_s
    assert solution.step_s == pytest.approx(predict_replicas(measured, solution.plan).step_s)
    assert not solution.is_complete
    named = replace(measured, replicas=tuple(replica.ranks for replica in solution.plan.replicas))
    assert solution.step_s <= solve_replicas(named).step_s * (1 + 1e-9)
