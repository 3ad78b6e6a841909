"""Drawn problems for replicas, and their solutions by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lightning_hetero.balance.pipeline.orders.order import known_order
from lightning_hetero.balance.pipeline.replicas.group_solver import GroupSolver
from lightning_hetero.balance.pipeline.replicas.plan import Replica
from lightning_hetero.balance.pipeline.replicas.problem import Link, ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.reduction import reduced_s
from lightning_hetero.balance.pipeline.replicas.timing import stage_ends_s
from lightning_hetero.balance.pipeline.simulation import PassTimes, simulate_order
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan, StageTimes

__all__ = [
    "best_by_brute_force_s",
    "best_with_averages_s",
    "fits",
    "problems",
    "simulated_s",
]

Groups = list[list[int]]


@st.composite
def problems(
    draw: st.DrawFn, ranks: tuple[int, int] = (1, 4), layers: int = 5, samples: int = 7, gradients: bool = False
) -> ReplicaProblem:
    world_size = draw(st.integers(*ranks))
    num_layers = draw(st.integers(2, layers))

    def rows(low: int, high: int) -> tuple[tuple[float, ...], ...]:
        if draw(st.booleans()):  # each rank has one speed, and several are alike
            work = [float(draw(st.integers(low, high))) for _ in range(num_layers)]
            speeds = [draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in range(world_size)]
            return tuple(tuple(w / s for w in work) for s in speeds)
        return tuple(tuple(float(draw(st.integers(low, high))) for _ in range(num_layers)) for _ in range(world_size))

    def sizes(low: int, high: int) -> tuple[float, ...]:
        return tuple(float(draw(st.integers(low, high))) for _ in range(num_layers))

    memory = None
    if draw(st.booleans()):
        budgets = tuple(float(draw(st.integers(6, 40))) for _ in range(world_size))
        memory = StageMemory(sizes(1, 4), sizes(0, 2), budgets, received_bytes=draw(st.sampled_from([(), sizes(0, 1)])))
    return ReplicaProblem(
        costs=LayerCosts(rows(1, 5), rows(1, 9)),
        samples=draw(st.integers(min(world_size, samples), samples)),
        micro_batches=draw(st.integers(1, 3)),
        micro_batch_size=draw(st.sampled_from([1.0, 2.5])),
        schedule=draw(st.sampled_from(["gpipe", "1f1b"])),
        overheads=LayerCosts(rows(0, 2), rows(0, 2)) if draw(st.booleans()) else None,
        parameter_bytes=sizes(0, 6) if gradients else (),
        output_bytes=sizes(0, 3) if draw(st.booleans()) else (),
        memory=memory,
        within=Link(draw(st.sampled_from([0.0, 0.5])), draw(st.sampled_from([0.0, 1.0]))),
        between=draw(st.sampled_from([None, Link(1.0, 2.0)])),
        nodes=tuple(draw(st.integers(0, 1)) for _ in range(world_size)) if draw(st.booleans()) else (),
    )


def groupings(ranks: list[int]) -> Iterator[Groups]:
    """Yield every way to group ranks."""
    if not ranks:
        yield []
        return
    first, *rest = ranks
    for others in groupings(rest):
        yield [[first], *others]
        for i, group in enumerate(others):
            yield [*others[:i], [first, *group], *others[i + 1 :]]


def all_stages(group: list[int], num_layers: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the ranks and the ends of all stages of a group in which rank 0, if any, is last."""
    for order in itertools.permutations(group):
        if 0 not in order[:-1]:
            for ends in itertools.combinations(range(1, num_layers), len(group) - 1):
                yield order, (*ends, num_layers)


def stage_seconds(problem: ReplicaProblem, ranks: tuple[int, ...], ends: tuple[int, ...], n: int) -> tuple[Any, ...]:
    """Return forward, backward and transfer seconds of stages, and the number of micro-batches; None without memory."""
    count = min(problem.micro_batches, n)
    part = n / count / problem.micro_batch_size
    zero = ((0.0,) * problem.num_layers,) * problem.world_size
    overheads = problem.overheads or LayerCosts(zero, zero)
    layers = [range(a, b) for a, b in zip((0, *ends), ends, strict=False)]

    def seconds(costs: Any, constant: Any) -> tuple[float, ...]:
        return tuple(
            sum(constant[r][i] + part * costs[r][i] for i in own) for r, own in zip(ranks, layers, strict=True)
        )

    links = [
        problem.between
        if problem.nodes and problem.nodes[a] != problem.nodes[b] and problem.between
        else problem.within
        for a, b in itertools.pairwise(ranks)
    ]
    sent = problem.output_bytes or (0.0,) * problem.num_layers
    transfer = tuple(
        link.latency_s + link.seconds_per_byte * part * sent[end - 1] for link, end in zip(links, ends, strict=False)
    )
    forward = seconds(problem.costs.forward_s, overheads.forward_s)
    return forward, seconds(problem.costs.backward_s, overheads.backward_s), transfer, count


def fits(problem: ReplicaProblem, ranks: tuple[int, ...], ends: tuple[int, ...], n: int) -> bool:
    if problem.memory is None:
        return True
    count = min(problem.micro_batches, n)
    size = -(-n // count) / problem.micro_batch_size
    memory = replace(
        problem.memory,
        activations_bytes=tuple(size * a for a in problem.memory.activations_bytes),
        received_bytes=tuple(size * a for a in problem.memory.received_bytes),
        micro_batches=count,
        schedule=problem.schedule,
    )
    for rank, needed in zip(ranks, memory.needed_bytes(StagePlan(tuple(range(len(ranks))), ends)), strict=True):
        if needed > memory.budgets_bytes[rank]:
            return False
    return True


def simulated_s(problem: ReplicaProblem, ranks: tuple[int, ...], ends: tuple[int, ...], n: int) -> float:
    """Return the seconds of one pipeline by the simulation that shows all passes."""
    forward, backward, transfer, count = stage_seconds(problem, ranks, ends, n)
    order = known_order(range(len(ranks)), count, problem.schedule)
    return simulate_order(order, PassTimes.of_stages(StageTimes(forward, backward), count), transfer).step_s


def fastest_s(problem: ReplicaProblem, group: list[int], n: int) -> float:
    """Return the seconds of the best stages of a group; infinity if none fit."""
    found = [
        stage_seconds(problem, ranks, ends, n)
        for ranks, ends in all_stages(group, problem.num_layers)
        if fits(problem, ranks, ends, n)
    ]
    if not found:
        return inf
    forward, backward, transfer = (np.array([one[i] for one in found]).reshape(len(found), -1) for i in range(3))
    return float(stage_ends_s(forward, backward, transfer, found[0][3], problem.schedule).max(axis=1).min())


def best_by_brute_force_s(problem: ReplicaProblem) -> float:
    """Return the shortest time to the last pass of all groupings, stages and divisions of the batch."""
    times: dict[tuple[int, ...], list[float]] = {}
    best = inf
    for groups in groupings(list(range(problem.world_size))):
        if isinstance(problem.replicas, int) and len(groups) != problem.replicas:
            continue
        for group in groups:
            if tuple(group) not in times:
                times[tuple(group)] = [fastest_s(problem, group, n) for n in range(1, problem.samples + 1)]
        rows = [times[tuple(group)] for group in groups]
        for limit in sorted({t for row in rows for t in row if t < best}):
            within = [sum(t <= limit for t in row) for row in rows]
            if min(within) > 0 and sum(within) >= problem.samples:
                best = limit
                break
    return best


def best_with_averages_s(problem: ReplicaProblem) -> float:
    """Return the shortest step, with averages of gradients, of all groupings, stages and divisions of the batch."""
    groups, known = GroupSolver(problem), dict[tuple[tuple[int, ...], int], list[Any]]()

    def options(group: list[int], n: int) -> list[Any]:
        key = tuple(group), n
        if key not in known:
            known[key] = [
                (Replica(ranks, (plan := StagePlan(tuple(range(len(ranks))), ends)), n), groups.ends_s(ranks, plan, n))
                for ranks, ends in all_stages(group, problem.num_layers)
                if fits(problem, ranks, ends, n)
            ]
        return known[key]

    best = inf
    for grouping in groupings(list(range(problem.world_size))):
        for cuts in itertools.combinations(range(1, problem.samples), len(grouping) - 1):
            samples = [b - a for a, b in itertools.pairwise((0, *cuts, problem.samples))]
            for chosen in itertools.product(*map(options, grouping, samples)):
                if max(max(ends_s) for _, ends_s in chosen) < best:
                    replicas, ends = zip(*chosen, strict=True)
                    best = min(best, reduced_s(problem, replicas, ends))
    return best
