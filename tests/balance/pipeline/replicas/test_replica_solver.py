"""Replicas are as good as brute force finds them, never worse than one pipeline or equal ones, and fit into memory."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn
from replica_problems import best_by_brute_force_s, best_with_averages_s, fits, problems, simulated_s

from lightning_hetero.balance.pipeline.orders.order import known_order
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import predict_replicas, solve_replicas
from lightning_hetero.balance.pipeline.replicas.timing import stage_ends_s
from lightning_hetero.balance.pipeline.simulation import PassTimes, simulate_order
from lightning_hetero.balance.pipeline.stages import Schedule, StageTimes
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError


def check_plan(problem: ReplicaProblem, solution: Any) -> None:
    plan = solution.plan
    assert plan.world_size == problem.world_size
    assert plan.num_layers == problem.num_layers
    assert sum(solution.samples) == problem.samples
    assert min(solution.samples) >= 1
    assert plan.samples(problem.samples) == solution.samples
    assert ReplicaPlan.from_dict(plan.to_dict()) == plan
    for replica, n, ends_s in zip(plan.replicas, solution.samples, solution.pipelines_s, strict=True):
        ranks = tuple(replica.ranks[own] for own in replica.stages.ranks)
        assert ranks == (*replica.ranks[1:], replica.ranks[0]), "the first rank has the last stage"
        assert fits(problem, ranks, replica.stages.ends, n)
        assert ends_s == pytest.approx(simulated_s(problem, ranks, replica.stages.ends, n))
    assert solution.step_s >= max(solution.pipelines_s) >= 0.999999 * solution.bound_s
    assert predict_replicas(problem, plan).step_s == pytest.approx(solution.step_s)


@settings(max_examples=drawn(60, 600), deadline=None)
@given(problems())
def test_it_equals_brute_force(problem: ReplicaProblem) -> None:
    best_s = best_by_brute_force_s(problem)
    if best_s == inf:
        with pytest.raises(InfeasiblePlanError, match="Each replica must hold all layers"):
            solve_replicas(problem)
        return
    solution = solve_replicas(problem)
    check_plan(problem, solution)
    assert solution.is_complete
    assert solution.step_s == pytest.approx(best_s, rel=1e-9)


@settings(max_examples=drawn(6, 60), deadline=None)
@given(problems(ranks=(5, 6), layers=6, samples=9), st.sampled_from([None, 1, 2, 3]))
def test_it_equals_brute_force_with_six_ranks(problem: ReplicaProblem, count: int | None) -> None:
    if count == 1 and problem.num_layers < problem.world_size:
        count = 2 if problem.num_layers * 2 >= problem.world_size else None
    if count is not None and -(-problem.world_size // count) > problem.num_layers:
        count = None
    problem = replace(problem, replicas=count)
    best_s = best_by_brute_force_s(problem)
    if best_s == inf:
        with pytest.raises(InfeasiblePlanError):
            solve_replicas(problem)
        return
    solution = solve_replicas(problem)
    check_plan(problem, solution)
    assert count in (None, len(solution.plan.replicas))
    assert solution.step_s == pytest.approx(best_s, rel=1e-9)


@settings(max_examples=drawn(40, 300), deadline=None)
@given(problems(ranks=(2, 5), gradients=True))
def test_no_number_of_replicas_is_better(problem: ReplicaProblem) -> None:
    """One pipeline of all ranks, and the best of any number, are among what is compared."""
    found = {}
    for count in range(1, problem.world_size + 1):
        try:
            found[count] = solve_replicas(replace(problem, replicas=count))
        except ConfigurationError:
            continue
        check_plan(problem, found[count])
        assert len(found[count].plan.replicas) == count
    if not found:
        with pytest.raises(ConfigurationError):
            solve_replicas(problem)
        return
    best = solve_replicas(problem)
    check_plan(problem, best)
    assert best.step_s <= min(one.step_s for one in found.values()) * (1 + 1e-9)


@settings(max_examples=drawn(40, 400), deadline=None, derandomize=True)
@given(problems(ranks=(2, 4), layers=4, samples=6, gradients=True))
def test_with_averages_it_is_nearly_as_good_as_brute_force(problem: ReplicaProblem) -> None:
    try:
        solution = solve_replicas(problem)
    except InfeasiblePlanError:
        return
    check_plan(problem, solution)
    best_s = best_with_averages_s(problem)
    assert best_s * (1 - 1e-9) <= solution.step_s <= best_s * 1.05


@settings(max_examples=drawn(60, 400), deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 140), st.sampled_from(["1f1b", "gpipe"]))
def test_many_stages_are_timed_as_in_the_simulation(
    data: st.DataObject, num_stages: int, micro_batches: int, schedule: Schedule
) -> None:
    seconds = st.floats(0.1, 4.0)

    def row(count: int) -> tuple[float, ...]:
        return tuple(data.draw(st.lists(seconds, min_size=count, max_size=count)))

    forward, backward, transfer = row(num_stages), row(num_stages), row(num_stages - 1)
    two = [np.array([values, values]) for values in (forward, backward, transfer)]
    found = stage_ends_s(two[0], two[1], two[2], micro_batches, schedule)
    order = known_order(range(num_stages), micro_batches, schedule)
    passes = simulate_order(order, PassTimes.of_stages(StageTimes(forward, backward), micro_batches), transfer).passes
    ends_s = [max(p.end_s for p in passes if p.stage == stage) for stage in range(num_stages)]
    assert found[1].tolist() == pytest.approx(ends_s, rel=1e-9 if micro_batches <= 64 else 0.02)
