"""Samples and layers of replicas move when devices change, soon and to the best, and never because of chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import drawn, thorough
from replica_problems import fits, problems, stage_seconds
from simulation.watched_stages import simulate

from lightning_hetero.balance.pipeline.moves import LayerMove, layer_moves
from lightning_hetero.balance.pipeline.replicas.given import uniform_replicas
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.solver import predict_replicas, solve_replicas
from lightning_hetero.balance.pipeline.replicas.watching import search
from lightning_hetero.balance.pipeline.replicas.watching.problem import WatchedReplicas, on_devices
from lightning_hetero.balance.pipeline.replicas.watching.search import PlanSearch
from lightning_hetero.balance.pipeline.replicas.watching.wording import changed_replicas
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stage_watch import StageWatch
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.balance.types import StepTiming

Groups = tuple[tuple[int, ...], ...]


def problem_of(groups: Groups, speeds: Sequence[float], layers: int = 12, **others: Any) -> ReplicaProblem:
    costs = LayerCosts.of_speeds([(0.01 / 3, 0.02 / 3)] * layers, speeds)
    zero = LayerCosts.of_speeds([(1e-4, 1e-4)] * layers, speeds)
    known: dict[str, Any] = {"samples": 48, "micro_batches": 8, "micro_batch_size": 3.0, "overheads": zero} | others
    return ReplicaProblem(costs=costs, within=Link(0.0001, 1e-9), replicas=groups, **known)


def watched(problem: ReplicaProblem, moving_s: float = 0.01) -> tuple[WatchedReplicas, ReplicaPlan]:
    return WatchedReplicas(problem, (moving_s,) * problem.num_layers), solve_replicas(problem).plan


def optimum_s(problem: ReplicaProblem, plan: ReplicaPlan, factors: Sequence[float]) -> float:
    """Return the seconds of a step under the best of all plans with these ranks in this order."""
    slowed = on_devices(problem, factors)
    timed = PlanSearch(slowed)
    best = float("inf")
    borders = [list(combinations(range(1, slowed.num_layers), len(one.ranks) - 1)) for one in plan.replicas]
    for samples in combinations(range(1, slowed.samples), len(plan.replicas) - 1):
        sizes = [b - a for a, b in zip((0, *samples), (*samples, slowed.samples), strict=True)]
        each = []
        for one, inner, n in zip(plan.replicas, borders, sizes, strict=True):
            found = [Replica(one.ranks, StagePlan(one.stages.ranks, (*e, slowed.num_layers)), float(n)) for e in inner]
            allowed = [one for one in found if timed._fits(one, n)]
            each.append(sorted(allowed, key=lambda one: max(timed._passes_s(one, round(one.share))))[:1])
        for chosen in product(*each):
            best = min(best, timed.step_s(ReplicaPlan(chosen)))
    return best


def layers_of(plan: ReplicaPlan) -> list[tuple[int, ...]]:
    return [one.stages.ends for one in plan.replicas]


SCENARIOS: list[tuple[Groups, list[float]]] = [
    (((0,), (1,)), [1.0, 1.0]),
    (((0, 2), (1,)), [1.0, 2.0, 1.0]),
    (((0, 2), (1, 3)), [1.0, 1.0, 1.0, 1.0]),
    (((0, 2), (1, 3)), [2.0, 2.0, 1.0, 1.0]),
    (((0, 1, 3), (2,)), [1.0, 1.0, 3.0, 1.0]),
]


@pytest.mark.parametrize(("groups", "speeds"), SCENARIOS)
@pytest.mark.parametrize("slow", [0, -1])
@pytest.mark.parametrize("jitter", [*(pytest.param(few, marks=thorough) for few in (0.0, 0.02)), 0.05])
def test_a_rank_that_slows_down_is_relieved_within_40_steps_and_gets_its_work_back(
    groups: Groups, speeds: list[float], slow: int, jitter: float
) -> None:
    problem, plan = watched(problem_of(groups, speeds))
    steady, slowed = [1.0] * len(speeds), [1.0] * len(speeds)
    slowed[slow] = 2.0
    run = simulate(problem, plan, lambda step: slowed if 60 <= step < 160 else steady, 260, jitter)
    assert len(set(run.plans[:60])) == 1
    assert problem.step_s(run.plans[100], slowed) <= 1.10 * optimum_s(problem.measured, plan, slowed)
    assert problem.step_s(run.plans[210], steady) <= 1.10 * optimum_s(problem.measured, plan, steady)
    assert 1 <= len(run.reasons) <= 5
    assert f"rank {slow % len(speeds)} takes" in run.reasons[0][1]
    assert all([r.ranks for r in now.replicas] == [r.ranks for r in plan.replicas] for now in run.plans)


@pytest.mark.parametrize(("groups", "speeds"), SCENARIOS)
@pytest.mark.parametrize("jitter", [*(pytest.param(few, marks=thorough) for few in (0.01, 0.03)), 0.05])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_chance_moves_nothing(groups: Groups, speeds: list[float], jitter: float, asynchronous: bool) -> None:
    problem, plan = watched(problem_of(groups, speeds))
    for seed in range(drawn(1, 20)):
        run = simulate(problem, plan, lambda _: [1.0] * len(speeds), 1200, jitter, seed=seed, asynchronous=asynchronous)
        assert len(set(run.plans)) == 1, run.reasons


def test_samples_move_where_that_is_enough_and_layers_where_it_is_not() -> None:
    """A whole replica that is slow needs fewer samples; one of two ranks that is slow needs fewer layers."""
    problem, plan = watched(problem_of(((0, 2), (1, 3)), [1.0] * 4))
    whole = simulate(problem, plan, lambda step: [1.0, 2.0, 1.0, 2.0] if step >= 60 else [1.0] * 4, 200)
    assert layers_of(whole.plans[-1]) == layers_of(plan)
    assert abs(whole.plans[-1].samples(48)[0] - 32) <= 1
    one = simulate(problem, plan, lambda step: [1.0, 1.0, 1.0, 3.0] if step >= 60 else [1.0] * 4, 200)
    assert layers_of(one.plans[-1])[0] == layers_of(plan)[0]
    assert layers_of(one.plans[-1])[1] != layers_of(plan)[1]


def test_layers_stay_where_other_shares_do_nearly_as_much() -> None:
    problem, plan = watched(problem_of(((0, 2), (1,)), [1.0, 2.0, 1.0]))
    slowed = [2.0, 1.0, 1.6]
    found = {now: problem.step_s(now, slowed) for now in problem.candidates(plan, slowed, 0.05, {})}
    shares_s = min(step_s for now, step_s in found.items() if now.is_redivision_of(plan))
    assert 1.01 * min(found.values()) < shares_s < 1.04 * min(found.values())
    run = simulate(problem, plan, lambda step: slowed if step >= 60 else [1.0] * 3, 300)
    assert {tuple(layers_of(now)) for now in run.plans} == {tuple(layers_of(plan))}
    assert problem.step_s(run.plans[-1], slowed) < 1.02 * shares_s


def test_what_was_measured_wrongly_before_the_first_step_is_put_right() -> None:
    problem, plan = watched(problem_of(((0,), (1,)), [1.0, 1.0]))
    run = simulate(problem, plan, lambda _: [1.0, 1.6], 200, 0.0)
    assert run.plans[0].samples(48) == (24, 24)
    assert abs(run.plans[30].samples(48)[0] - 48 * 1.6 / 2.6) <= 1


def test_shares_move_where_moving_layers_does_not_pay() -> None:
    problem, plan = watched(problem_of(((0, 2), (1, 3)), [1.0] * 4), moving_s=1000.0)
    run = simulate(problem, plan, lambda step: [1.0, 1.0, 1.0, 3.0] if step >= 60 else [1.0] * 4, 200, remaining=200)
    assert {tuple(layers_of(now)) for now in run.plans} == {tuple(layers_of(plan))}
    assert run.plans[-1].samples(48)[1] < 20


def test_layers_that_cannot_move_stay_and_shares_follow() -> None:
    problem, plan = watched(problem_of(((0, 2), (1, 3)), [1.0] * 4))
    kept = problem.without_moves(plan)
    assert kept is not None
    run = simulate(kept, plan, lambda step: [1.0, 1.0, 1.0, 3.0] if step >= 60 else [1.0] * 4, 200)
    assert {tuple(layers_of(now)) for now in run.plans} == {tuple(layers_of(plan))}
    assert run.plans[-1].samples(48)[1] < 20
    alone = uniform_replicas(12, [(0, 1, 2, 3)])
    assert problem.without_moves(alone) is None


def test_a_refused_move_is_not_followed() -> None:
    problem, plan = watched(problem_of(((0, 2), (1, 3)), [1.0] * 4))
    other = ReplicaPlan((plan.replicas[0], replace(plan.replicas[1], stages=StagePlan((1, 0), (2, 12)))))
    watch: StageWatch[ReplicaPlan] = StageWatch(problem, plan, 0.05, 10, asynchronous=False)
    decision = replace(watch._rebalancer._kept(()), plan=other)
    watch._rebalancer.current = other
    assert watch.follow(decision, refused=True) is not None
    assert watch.plan == watch._rebalancer.current == plan
    assert watch.keep_layers()
    assert not watch._rebalancer.problem.allows(other, plan)


def test_memory_limits_samples_and_borders() -> None:
    memory = StageMemory((1.0,) * 12, (0.1,) * 12, (8.0, 20.0, 8.0, 20.0))
    problem, plan = watched(problem_of(((0, 2), (1, 3)), [1.0] * 4, memory=memory, micro_batch_size=1.0))
    run = simulate(problem, plan, lambda step: [1.0, 3.0, 1.0, 3.0] if step >= 60 else [1.0] * 4, 200)
    for now in {*run.plans}:
        for one, n in zip(now.replicas, now.samples(48), strict=True):
            ranks = tuple(one.ranks[own] for own in one.stages.ranks)
            assert fits(problem.measured, ranks, one.stages.ends, n)


def test_batches_of_other_sizes_do_not_look_like_other_devices() -> None:
    """All batches are smaller than the one with which layers were timed; or only the last one of a few."""
    problem, plan = watched(problem_of(((0, 2), (1,)), [1.0, 2.0, 1.0]))
    for samples in (lambda _: 20, lambda step: 5 if step % 7 == 6 else 48):
        run = simulate(problem, plan, lambda _: [1.0] * 3, 400, samples=samples)
        assert set(run.plans) == {plan}, run.reasons


def test_a_window_of_batches_in_which_a_replica_has_no_samples() -> None:
    problem, plan = watched(problem_of(((0,), (1,)), [1.0, 9.0]))
    watch: StageWatch[ReplicaPlan] = StageWatch(problem, plan, 0.05, 10, asynchronous=False)
    assert plan.trained_samples(1) == (1, 0)
    assert problem.own_s(plan, 1)[1] == 1e-9
    assert watch.summary([StepTiming(1, 0.0)] * 10).steps == 0


@given(problems(ranks=(2, 4)), st.data())
def test_own_times_are_those_of_the_passes(problem: ReplicaProblem, data: st.DataObject) -> None:
    count = data.draw(st.integers(-(-problem.world_size // problem.num_layers), problem.world_size))
    if count > problem.samples:
        return
    groups = [tuple(range(i, problem.world_size, count)) for i in range(count)]
    plan = uniform_replicas(problem.num_layers, groups)
    own_s = WatchedReplicas(problem, (0.0,) * problem.num_layers).own_s(plan)
    for one, n in zip(plan.replicas, plan.trained_samples(problem.samples), strict=True):
        order = tuple(one.ranks[own] for own in one.stages.ranks)
        if n:
            forward, backward, _, passes = stage_seconds(problem, order, one.stages.ends, n)
            for rank, f, b in zip(order, forward, backward, strict=True):
                assert own_s[rank] == pytest.approx(max(passes * (f + b), 1e-9))


@given(problems(ranks=(2, 4), gradients=True), st.lists(st.sampled_from([1.0, 1.5, 2.0, 4.0]), min_size=4, max_size=4))
def test_plans_that_are_found_fit_and_are_predicted_like_all_others(
    problem: ReplicaProblem, factors: list[float]
) -> None:
    groups = tuple(tuple(range(i, problem.world_size, 2)) for i in range(2))
    if problem.samples < 2 or len(groups[0]) > problem.num_layers:
        return
    plan = uniform_replicas(problem.num_layers, groups)
    factors = factors[: problem.world_size]
    wanted = WatchedReplicas(problem, (0.0,) * problem.num_layers)
    slowed = on_devices(problem, factors)
    for found in wanted.candidates(plan, factors, 0.0, {}):
        expected, solution = predict_replicas(slowed, found), wanted.solution(found, factors)
        assert wanted.step_s(found, factors) == solution.step_s == pytest.approx(expected.step_s)
        assert solution.pipelines_s == pytest.approx(expected.pipelines_s)
        assert solution.samples == expected.samples
        assert solution.bound_s == pytest.approx(expected.bound_s)
        for one, before, n in zip(found.replicas, plan.replicas, found.samples(problem.samples), strict=True):
            assert (one.ranks, one.stages.ranks) == (before.ranks, before.stages.ranks)
            ranks = tuple(one.ranks[own] for own in one.stages.ranks)
            assert found == plan or fits(problem, ranks, one.stages.ends, n)


def test_borders_that_are_too_many_to_list_are_found_as_well() -> None:
    problem = problem_of(((0, 2, 4), (1, 3)), [1.0, 2.0, 1.0, 1.0, 3.0], layers=24)
    _, plan = watched(problem)
    slowed = on_devices(problem, [1.0, 1.0, 2.0, 1.0, 1.0])
    listed = PlanSearch(slowed).plans(plan, layers_move=True)
    with mock.patch.object(search, "_MAX_LISTED", 0):
        climbed = PlanSearch(slowed).plans(plan, layers_move=True)
    best, near = (min(map(PlanSearch(slowed).step_s, found)) for found in (listed, climbed))
    assert near <= 1.02 * best


def test_layers_come_from_the_own_replica() -> None:
    plan = uniform_replicas(6, [(0, 2), (1, 3)])
    first, second = plan.replicas
    after = ReplicaPlan((first, replace(second, stages=StagePlan(second.stages.ranks, (4, 6)))))
    assert [(one.ranks, one.stages.ranks, one.stages.ends) for one in plan.replicas] == [
        ((0, 2), (1, 0), (3, 6)),
        ((1, 3), (1, 0), (3, 6)),
    ]
    assert layer_moves(plan, after) == (LayerMove(3, 1, 3),), "and not from rank 0, which has it too"
    assert after.is_redivision_of(plan) is False
    shares = ReplicaPlan((first, replace(second, share=5.0)))
    assert shares.is_redivision_of(plan)
    assert not plan.is_redivision_of(plan)
    assert layer_moves(plan, shares) == ()


def test_changes_are_said_in_words() -> None:
    plan = uniform_replicas(6, [(0, 2), (1, 3), (4,)])
    first, second, third = plan.replicas
    shares = ReplicaPlan((first, second, replace(third, share=2.0)))
    assert changed_replicas(plan, shares) == "33%, 33% and 33% of the samples in replicas 0, 1 and 2"
    layers = ReplicaPlan((first, replace(second, stages=StagePlan(second.stages.ranks, (4, 6))), third))
    assert changed_replicas(plan, layers).endswith(", [4, 2] layers on ranks [3, 1] of replica 1")
    alone = uniform_replicas(6, [(0, 1)])
    other = ReplicaPlan((replace(alone.replicas[0], stages=StagePlan(alone.replicas[0].stages.ranks, (1, 6))),))
    assert changed_replicas(alone, other) == "[1, 5] layers on ranks [1, 0] of replica 0"
