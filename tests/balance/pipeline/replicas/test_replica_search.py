"""Many ranks, several nodes, memory, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, combinations, pairwise
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import drawn, thorough

from lightning_hetero.balance.pipeline.replicas.division import divide_samples
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.balance.pipeline.replicas.solver import ReplicaSolution, predict_replicas, solve_replicas
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

SLOW = Link(latency_s=5e-5, seconds_per_byte=8e-9)
FAST = Link(latency_s=1e-5, seconds_per_byte=1e-10)


def problem_of(
    speeds: Sequence[float], budgets: Sequence[float] | None = None, layers: int = 12, **changed: Any
) -> ReplicaProblem:
    """Return a problem with equal layers of a unit of memory and of 3 ms on a device of speed 1."""
    memory = None if budgets is None else StageMemory((1.0,) * layers, (0.0,) * layers, tuple(budgets))
    arguments: dict[str, Any] = {"samples": 96, "micro_batches": 8, "memory": memory, **changed}
    return ReplicaProblem(LayerCosts.of_speeds([(0.001, 0.002)] * layers, speeds), **arguments)


def ranks_of(solution: ReplicaSolution) -> list[list[int]]:
    return sorted(sorted(replica.ranks) for replica in solution.plan.replicas)


def test_without_limits_each_rank_is_a_replica() -> None:
    solution = solve_replicas(problem_of([2, 2, 1, 1]))
    assert solution.samples == (32, 32, 16, 16)
    assert solution.of_bound == pytest.approx(1.0)
    assert solution.reduction_s == 0.0


def test_a_model_that_fits_on_no_rank_gets_unequal_replicas() -> None:
    problem = problem_of([2, 2, 1, 1], [6.0] * 4)
    solution = solve_replicas(problem)
    assert ranks_of(solution) == [[0, 1], [2, 3]]
    assert solution.samples == (64, 32)
    alone, equal = (solve_replicas(replace(problem, replicas=groups)) for groups in (1, ((0, 2), (1, 3))))
    assert solution.step_s <= 0.85 * min(alone.step_s, equal.step_s)


def test_replicas_may_have_different_lengths() -> None:
    solution = solve_replicas(problem_of([3, 1, 1, 1], [12.0, 4.0, 4.0, 4.0]))
    assert ranks_of(solution) == [[0], [1, 2, 3]]
    assert solution.plan.replicas[1].stages.ends == (4, 8, 12)


def test_groups_that_the_user_names_are_kept() -> None:
    solution = solve_replicas(problem_of([3, 1, 1, 1], replicas=((3, 1), (0, 2))))
    assert [replica.ranks for replica in solution.plan.replicas] == [(0, 2), (3, 1)]
    assert solution.plan.last_ranks == (0, 3)
    assert [replica.stages.ranks for replica in solution.plan.replicas] == [(1, 0), (1, 0)]


def test_memory_limits_the_samples_of_a_replica() -> None:
    memory = StageMemory((1.0,) * 4, (1.0,) * 4, (100.0, 12.0))
    solution = solve_replicas(replace(problem_of([1, 1], layers=4, replicas=2), memory=memory, micro_batches=4))
    # of the second rank: 4 of parameters, and 4 for each sample of the one micro-batch that it holds
    assert solution.samples == (88, 8)


def test_stages_stay_within_a_node_if_activations_are_large() -> None:
    arguments: dict[str, Any] = {"nodes": (0, 1, 0, 1), "within": FAST, "between": SLOW, "output_bytes": (1e6,) * 12}
    problem = problem_of([1, 1, 1, 1], [7.0] * 4, parameter_bytes=(1e3,) * 12, **arguments)
    solution = solve_replicas(problem)
    assert ranks_of(solution) == [[0, 2], [1, 3]]
    across = solve_replicas(replace(problem, replicas=((0, 1), (2, 3))))
    assert solution.step_s < 0.95 * across.step_s


def test_layers_are_averaged_within_a_node_if_gradients_are_large() -> None:
    arguments: dict[str, Any] = {"nodes": (0, 0, 1, 1), "within": FAST, "between": SLOW, "output_bytes": (1e3,) * 12}
    solution = solve_replicas(problem_of([1, 1, 1, 1], [7.0] * 4, parameter_bytes=(1e8,) * 12, **arguments))
    assert [len(replica.ranks) for replica in solution.plan.replicas] == [2, 2]
    for layer in range(12):
        assert {*solution.plan.owners_of(layer)} in ({0, 1}, {2, 3})


def test_borders_move_so_that_averages_end_earlier() -> None:
    costs = LayerCosts.of_speeds([(0.5, 1.0), (0.05, 0.1), (0.55, 1.1)], [1, 1, 1, 1])
    memory = StageMemory((1.0,) * 3, (0.0,) * 3, (2.0,) * 4)
    problem = ReplicaProblem(costs, 8, 4, memory=memory, replicas=2)
    sent: dict[str, Any] = {"parameter_bytes": (4.0, 8.0, 0.5), "within": Link(seconds_per_byte=1.0)}
    solution, without = solve_replicas(replace(problem, **sent)), solve_replicas(problem)
    assert {replica.stages.ends for replica in without.plan.replicas} == {(2, 3)}
    assert {replica.stages.ends for replica in solution.plan.replicas} == {(1, 3)}
    assert solution.step_s < 0.9 * predict_replicas(replace(problem, **sent), without.plan).step_s


def test_rings_wait_for_passes_ranks_and_the_link_of_a_node() -> None:
    """Three replicas of one or two stages: layers 0 and 1 are of the same ranks, and layer 2 of others."""
    stages = StagePlan((1, 0), (2, 3))
    replicas = (
        Replica((0, 1), stages, 1.0),
        Replica((2, 3), stages, 1.0),
        Replica((4,), StagePlan((0,), (3,)), 1.0),
    )
    ends_s = ((10.0, 7.0), (9.0, 6.0), (8.0,))
    problem = problem_of([1] * 5, layers=3, parameter_bytes=(1.0, 2.0, 3.0), within=Link(0.5, 1.0))
    # layer 2 from 8.0, when the whole model of rank 4 is done, for 4 messages of 1 byte; layers 0 and 1 after it
    assert reduced_s(problem, replicas, ends_s) == 8.0 + 4 * 1.5 + 4 * 1.5
    apart = (*replicas[:2], Replica((4, 5), stages, 1.0))
    six = problem_of([1] * 6, layers=3, parameter_bytes=(1.0, 2.0, 3.0), within=Link(0.5, 1.0))
    # layers 0 and 1 from 12.0, of ranks that are in no other ring
    assert reduced_s(six, apart, (*ends_s[:2], (12.0, 8.0))) == 12.0 + 4 * 1.5
    slow = replace(six, nodes=(0, 0, 0, 0, 1, 1), between=Link(1.0, 2.0))
    # layer 2 from 8.0 through the link between the nodes, for 4 messages of 3 seconds, and the others after it
    assert reduced_s(slow, apart, (*ends_s[:2], (12.0, 8.0))) == 8.0 + 4 * 3.0 + 4 * 3.0
    assert reduced_s(six, apart[:1], ends_s[:1]) == 10.0
    assert reduced_s(replace(six, parameter_bytes=()), apart, (*ends_s[:2], (12.0, 8.0))) == 12.0


@settings(max_examples=drawn(200, 2000))
@given(st.data(), st.integers(2, 4), st.integers(4, 9))
def test_batches_are_divided_as_by_brute_force(data: st.DataObject, count: int, samples: int) -> None:
    """Times that grow in any way, some of them without end because no more samples fit."""
    rows = []
    for _ in range(count):
        steps = data.draw(st.lists(st.integers(0, 5), min_size=samples, max_size=samples))
        row = [float(t) for t in accumulate(steps, initial=1)][1:]
        most = data.draw(st.sampled_from([samples, samples, 3, 1, 0]))
        rows.append([t if n < most else inf for n, t in enumerate(row)])
    cuts = combinations(range(1, samples), count - 1)
    all_divisions = ([b - a for a, b in pairwise((0, *cut, samples))] for cut in cuts)
    best = min(max(row[n - 1] for row, n in zip(rows, ns, strict=True)) for ns in all_divisions)
    found = divide_samples([partial(_time_of, row) for row in rows], samples, [1.0] * count)
    if found is None:
        assert best == inf
    else:
        assert sum(found) == samples
        assert max(row[n - 1] for row, n in zip(rows, found, strict=True)) == best


def _time_of(row: list[float], samples: int) -> float:
    return row[samples - 1]


def test_averages_overlap_with_the_last_passes() -> None:
    problem = problem_of([1, 1, 1, 1], [7.0] * 4, parameter_bytes=(1e7,) * 12, within=SLOW, replicas=2)
    solution = solve_replicas(problem)
    of_stage = SLOW.ring_s(6e7, 2)
    assert 0 < solution.reduction_s <= of_stage * (1 + 1e-9)
    # the ring of the last stages runs during backward passes of the first ones
    pipelines = solve_replicas(replace(problem, parameter_bytes=()))
    assert solution.step_s < pipelines.step_s + 2 * of_stage


@pytest.mark.parametrize("nodes", [(), pytest.param(tuple(rank // 8 for rank in range(64)), marks=thorough)])
def test_64_ranks_of_four_kinds(nodes: tuple[int, ...]) -> None:
    speeds, sizes = ([value for value in kinds for _ in range(16)] for kinds in ([4, 3, 2, 1], [24, 12, 16, 8]))
    arguments: dict[str, Any] = {"nodes": nodes, "within": FAST, "between": SLOW, "output_bytes": (1e4,) * 32}
    problem = problem_of(speeds, sizes, 32, samples=1024, parameter_bytes=(1e6,) * 32, **arguments)
    solution = solve_replicas(problem)
    assert sum(solution.samples) == 1024
    for replica, n in zip(solution.plan.replicas, solution.samples, strict=True):
        memory = problem.memory_of(replica.ranks, n)
        assert memory is not None
        assert memory.allows(replica.stages)
    mixed = tuple(tuple(range(first, 64, 8)) for first in range(8))
    assert solution.step_s <= solve_replicas(replace(problem, replicas=mixed)).step_s
    assert solution.of_bound > 0.5


def test_the_same_problem_has_the_same_solution() -> None:
    problem = problem_of([1 + rank % 4 for rank in range(12)], [2.0 + rank % 3 for rank in range(12)])
    assert solve_replicas(problem) == solve_replicas(problem)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problem_of([1, 1], samples=0), "`samples` must be a positive whole number, got 0"),
        (lambda: problem_of([1, 1], micro_batches=True), "`micro_batches` must be a positive whole number"),
        (lambda: problem_of([1, 1], micro_batch_size=0.0), "`micro_batch_size` must be positive"),
        (lambda: problem_of([1, 1], schedule="v"), "`schedule` must be"),
        (lambda: problem_of([1, 1], parameter_bytes=(1.0,)), r"`parameter_bytes` must be one number per layer \(12\)"),
        (lambda: problem_of([1, 1], output_bytes=(-1.0,) * 12), "`output_bytes` must be"),
        (lambda: problem_of([1, 1], nodes=(0,)), r"`nodes` must be one number per rank \(2\), got 1"),
        (lambda: problem_of([1, 1], [9.0]), r"`memory.budgets_bytes` must be one number per rank"),
        (lambda: problem_of([1, 1], overheads=LayerCosts.of_speeds([(0, 0)], [1, 1])), "`overheads` must be"),
        (lambda: problem_of([1, 1], replicas=3), "`replicas` must be at least 1 and at most the number of ranks, 2"),
        (lambda: problem_of([1, 1], replicas=((0,), (0, 1))), "`replicas` must have each of 2 ranks once"),
        (
            lambda: problem_of([1, 1], replicas=((1, 0),)),
            "`replicas` must have rank 0, which has a last stage, as the f",
        ),
        (lambda: problem_of([1, 1], replicas=((0, 1), ())), "`replicas` must have each of 2 ranks once"),
        (lambda: problem_of([1, 1], samples=1, replicas=2), r"at least one per replica \(2\), got 1"),
        (lambda: problem_of([1] * 5, layers=2, replicas=2), r"as many ranks as there are layers \(2\), got one with 3"),
        (lambda: Link(latency_s=-1.0), "times of a link must be finite and not negative"),
        (lambda: solve_replicas(problem_of([1] * 9, layers=2, samples=2)), "are at least 5; got 2"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_is_not_simulated_is_refused() -> None:
    problem = problem_of([1, 1])
    both_ends = ReplicaPlan((Replica((0, 1), StagePlan((0, 1, 0), (2, 6, 12)), 1.0),))
    with pytest.raises(ConfigurationError, match="one stage per rank"):
        predict_replicas(problem, both_ends)
    other = ReplicaPlan((Replica((0,), StagePlan((0,), (12,)), 1.0),))
    with pytest.raises(ConfigurationError, match="of the 2 ranks and 12 layers of the problem, got 1 ranks"):
        predict_replicas(problem, other)


@pytest.mark.parametrize("count", [4, 12])
def test_layers_that_fit_nowhere_are_refused(count: int) -> None:
    with pytest.raises(InfeasiblePlanError, match="Each replica must hold all layers"):
        solve_replicas(problem_of([1 + rank / 10 for rank in range(count)], [0.5] * count))
