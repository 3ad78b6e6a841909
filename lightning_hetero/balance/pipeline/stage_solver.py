"""Divide layers among ranks so that the slowest stage is as fast as possible.

Given the time of each layer on each rank, find an order of the ranks and a division of the layers into as many
consecutive ranges of at least one layer.  They minimise the largest time of a range on its rank, and each range must
fit into the memory of its rank.

The solver bisects a bound on the time of the slowest stage.  For one bound, it finds the layers before which the first
stages can end, for each set of ranks, from the sets with one rank fewer.  This is exact.  With many micro-batches only
the slowest stage matters.  With few, the waiting at the beginning and at the end of a step matters too, so
:func:`refine_stages` tries single moves in a simulation of the schedule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, product
from math import inf, prod

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.balance.pipeline.orders.order import micro_batches_in_flight
from lightning_hetero.balance.pipeline.simulation import least_step_s, pipeline_step_s
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = ["StageMemory", "refine_stages", "solve_stages", "uniform_stages"]

_MAX_SETS = 20_000
_BISECTIONS = 60

_Set = tuple[int, ...]


@dataclass(frozen=True)
class StageMemory:
    """The memory needs of layers and the budgets of ranks.

    Attributes:
        weights_bytes: Memory of each layer for parameters, gradients and the state of the optimiser.
        activations_bytes: Memory of each layer for the activations of one micro-batch, kept for its backward pass.
        budgets_bytes: Memory that each rank may use.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule, which determines for how many micro-batches a stage holds activations.
        received_bytes: Memory into which a stage receives the output of each layer, if the layer is the last one of the
            stage before, and into which it receives the gradient of that output, if the layer is its own last one; of
            the model's last layer it receives nothing. Empty if it is unknown.
    """

    weights_bytes: tuple[float, ...]
    activations_bytes: tuple[float, ...]
    budgets_bytes: tuple[float, ...]
    micro_batches: int = 1
    schedule: Schedule = "1f1b"
    received_bytes: tuple[float, ...] = ()

    def needed_bytes(self, plan: StagePlan) -> tuple[float, ...]:
        """Return the memory that each stage of a plan needs."""
        ends = (0, *plan.ends)
        return tuple(
            sum(self.weights_bytes[i] + held * self.activations_bytes[i] for i in plan.layers(stage))
            + self._received(ends[stage])
            + self._received(ends[stage + 1])
            for stage, held in enumerate(self.held(plan.num_stages))
        )

    def _received(self, boundary: int) -> float:
        """Return the memory into which a stage receives what crosses the boundary before a layer, in one direction."""
        return self.received_bytes[boundary - 1] if 0 < boundary < len(self.received_bytes) else 0.0

    def allows(self, plan: StagePlan) -> bool:
        """Return whether every stage fits into the memory of its rank."""
        needed = self.needed_bytes(plan)
        return all(n <= self.budgets_bytes[rank] for n, rank in zip(needed, plan.ranks, strict=True))

    def left_bytes(self, plan: StagePlan) -> tuple[float, ...]:
        """Return the memory that each rank has left for activations."""
        ends = (0, *plan.ends)
        # across the border within a shared layer goes what is before it or what is after it
        more = {end: self._received(end + 1) for end in plan.shared}
        crossed = [max(self._received(end), more.get(end, 0.0)) for end in ends]
        return tuple(
            budget
            - sum(self.weights_bytes[i] for i in plan.layers_of(rank))
            - sum(crossed[stage] + crossed[stage + 1] for stage in plan.stages_of(rank))
            for rank, budget in enumerate(self.budgets_bytes)
        )

    def fits_alone(self, rank: int) -> bool:
        """Return whether a rank could hold the whole model and the activations of all micro-batches."""
        needed = sum(self.weights_bytes) + self.micro_batches * sum(self.activations_bytes)
        return needed <= self.budgets_bytes[rank]

    def held(self, num_stages: int) -> list[int]:
        """Return the number of micro-batches whose activations each of ``num_stages`` stages holds at a time."""
        return [micro_batches_in_flight(s, num_stages, self.micro_batches, self.schedule) for s in range(num_stages)]

    def furthest_ends(self, num_stages: int, stage: int, budget_bytes: float) -> list[int]:
        """Return, for each layer, how far a stage that begins with it can go without exceeding ``budget_bytes``.

        The stage ends before the layer returned. It could go further where the memory for what it receives falls
        faster than that for its layers grows, which is not considered.
        """
        held = self.held(num_stages)[stage]
        layers = zip(self.weights_bytes, self.activations_bytes, strict=True)
        prefix = np.array([0.0, *accumulate(w + held * a for w, a in layers)])
        received = np.array([self._received(boundary) for boundary in range(len(prefix))])
        ends = prefix if stage == num_stages - 1 else prefix + received  # the last one ends with the last layer
        found = []
        for start, before in enumerate(prefix - received):
            # a little slack, because the difference of two rounded sums is not exactly the sum in between
            too_far = np.flatnonzero(ends[start + 1 :] > (before + budget_bytes) + 1e-13 * abs(prefix[-1]))
            found.append(start + int(too_far[0]) if len(too_far) else len(prefix) - 1)
        return found


def uniform_stages(num_layers: int, world_size: int, last_rank: int = 0) -> StagePlan:
    """Return stages with equal numbers of layers, whatever the speeds; the first ones take the remainder.

    Example:
        >>> uniform_stages(5, 2)
        StagePlan(ranks=(1, 0), ends=(3, 5), lent=())
    """
    _check_layers(num_layers, world_size)
    size, larger = divmod(num_layers, world_size)
    sizes = [size + (stage < larger) for stage in range(world_size)]
    return StagePlan(_default_order(world_size, last_rank), tuple(accumulate(sizes)))


def solve_stages(
    costs: LayerCosts, memory: StageMemory | None = None, last_rank: int = 0, order: Sequence[int] | None = None
) -> StagePlan:
    """Return the plan whose slowest stage is fastest.

    Args:
        costs: Time of every layer on every rank.
        memory: Memory needs and budgets that the plan must respect; None if unknown.
        last_rank: Rank of the last stage.
        order: Rank of each stage, ``last_rank`` last; None for the best order.

    Raises:
        ConfigurationError: There are fewer layers than ranks.
        InfeasiblePlanError: The layers do not fit into the memory of the ranks.

    Example:
        >>> solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * 12, speeds=[2, 1]))
        StagePlan(ranks=(1, 0), ends=(4, 12), lent=())
    """
    _check_layers(costs.num_layers, costs.world_size)
    problem = _Problem(costs, memory, last_rank, order)
    best = problem.quick_plan(inf) or problem.plan(inf)
    if best is None:
        raise InfeasiblePlanError(_does_not_fit(memory, costs.world_size))
    best = _bisect(problem.quick_plan, costs, best)
    # usually there is nothing better
    better = problem.plan(costs.of_stages(best).slowest_s * (1 - 1e-9))
    return best if better is None else _bisect(problem.plan, costs, better)


def _bisect(plan_within: Callable[[float], StagePlan | None], costs: LayerCosts, best: StagePlan) -> StagePlan:
    low, high = 0.0, costs.of_stages(best).slowest_s
    for _ in range(_BISECTIONS):
        if high - low <= 1e-12 * high:
            break
        bound_s = (low + high) / 2
        plan = plan_within(bound_s)
        if plan is None:
            low = bound_s
        else:
            best, high = plan, min(costs.of_stages(plan).slowest_s, bound_s)
    return best


def refine_stages(
    costs: LayerCosts,
    plan: StagePlan,
    micro_batches: int,
    schedule: Schedule = "1f1b",
    memory: StageMemory | None = None,
    transfer_s: float = 0.0,
    *,
    swaps: bool = True,
) -> StagePlan:
    """Shorten the simulated step of a plan by moves of single layers and swaps of neighbouring ranks.

    Args:
        costs: Time of every layer on every rank.
        plan: Plan to start from.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule.
        memory: Memory needs and budgets that a plan must respect; None if unknown.
        transfer_s: Seconds that a transfer between two stages takes.
        swaps: Whether ranks may be swapped.

    Returns:
        The improved plan; ``plan`` itself if no move helps.
    """

    def step_s(candidate: StagePlan, faster_than_s: float = inf) -> float:
        times = costs.of_stages(candidate)
        if least_step_s(times, micro_batches, transfer_s) >= faster_than_s:
            return inf
        return pipeline_step_s(times, micro_batches, schedule, transfer_s)

    best, best_s = plan, step_s(plan)
    improved = True
    while improved:
        improved = False
        for candidate in _neighbours(best, swaps=swaps):
            if memory is not None and not memory.allows(candidate):
                continue
            candidate_s = step_s(candidate, best_s)
            if candidate_s < best_s * (1 - 1e-9):
                best, best_s, improved = candidate, candidate_s, True
    return best


def _neighbours(plan: StagePlan, *, swaps: bool) -> Iterator[StagePlan]:
    ends = plan.ends
    for stage, step in product(range(len(ends) - 1), (-1, 1)):
        moved = ends[stage] + step
        if (ends[stage - 1] if stage else 0) < moved < ends[stage + 1]:
            yield StagePlan(plan.ranks, (*ends[:stage], moved, *ends[stage + 1 :]))
    for stage in range(len(ends) - 2 if swaps else 0):  # the last stage keeps its rank
        ranks = list(plan.ranks)
        ranks[stage], ranks[stage + 1] = ranks[stage + 1], ranks[stage]
        yield StagePlan(tuple(ranks), ends)


def _check_layers(num_layers: int, world_size: int) -> None:
    if num_layers < world_size:
        raise ConfigurationError(
            f"A pipeline must have at least one layer per rank ({world_size}), got {num_layers}. Use fewer devices, or"
            f" divide the model into more layers."
        )


def _default_order(world_size: int, last_rank: int) -> tuple[int, ...]:
    return (*(rank for rank in range(world_size) if rank != last_rank), last_rank)


def _does_not_fit(memory: StageMemory | None, world_size: int) -> str:
    assert memory is not None
    held = sum(memory.weights_bytes)
    ranks = "1 rank" if world_size == 1 else f"the {world_size} ranks"
    return (
        f"The layers must fit into the memory of {ranks}, got {held / 1e9:.3g} GB of parameters,"
        f" gradients and optimiser state, in addition to activations, and budgets of"
        f" {[float(f'{b / 1e9:.3g}') for b in memory.budgets_bytes]} GB. Use smaller micro-batches, hold fewer at a"
        f' time (`schedule="1f1b"`), or use more devices.'
    )


class _Problem:
    """The layers, and the ranks of all stages but the last.

    Interchangeable ranks form a kind, and a set of ranks is given by the number of ranks of each kind. If there are too
    many sets, all ranks form one kind and are taken in a fixed order.
    """

    def __init__(
        self, costs: LayerCosts, memory: StageMemory | None, last_rank: int, order: Sequence[int] | None
    ) -> None:
        self._world_size, self._num_layers = costs.world_size, costs.num_layers
        self._last_rank = last_rank
        self._prefixes = [[0.0, *accumulate(row)] for row in costs.total_s]
        self._memory = memory
        self._furthest: dict[tuple[int, float], list[int]] = {}
        self._budgets = () if memory is None else memory.budgets_bytes
        others = [rank for rank in range(costs.world_size) if rank != last_rank]
        kinds: dict[tuple[object, ...], list[int]] = {}
        for rank in others:
            kinds.setdefault((costs.total_s[rank], self._budgets[rank : rank + 1]), []).append(rank)
        self._kinds = list(kinds.values())
        if prod(len(ranks) + 1 for ranks in self._kinds) > _MAX_SETS:
            self._kinds = [sorted(others, key=lambda rank: -sum(costs.total_s[rank]))]  # the slowest first
        if order is not None:
            self._kinds = [list(order[:-1])]
        self._all = tuple(len(ranks) for ranks in self._kinds)
        self._none = (0,) * len(self._kinds)

    def quick_plan(self, bound_s: float) -> StagePlan | None:
        """Return a plan whose stages take at most ``bound_s`` each; None if none was found.

        Each set of ranks takes as many layers as it can. This misses plans in which a stage takes fewer, so that the
        next stage can have a layer at all.
        """
        ends: dict[_Set, tuple[int, int]] = {self._none: (0, -1)}
        for ranks in product(*(range(count + 1) for count in self._all)):
            best = (0, -1)
            for kind, rank, before in self._predecessors(ranks):
                if before in ends:
                    start = ends[before][0]
                    end = self._reach(start, rank, sum(ranks) - 1, bound_s)
                    if end > start:
                        best = max(best, (end, kind))
            if best[0]:
                ends[ranks] = best
        if self._all not in ends or not self._finishes(ends[self._all][0], bound_s):
            return None
        found: list[tuple[int, int]] = []
        ranks = self._all
        while any(ranks):
            end, kind = ends[ranks]
            found.append((self._kinds[kind][ranks[kind] - 1], end))
            ranks = _without(ranks, kind)
        return self._plan(found)

    def plan(self, bound_s: float) -> StagePlan | None:
        """Return a plan whose stages take at most ``bound_s`` each; None if there is none."""
        ends: dict[_Set, NDArray[np.bool_]] = {self._none: np.arange(self._num_layers + 1) == 0}
        reaches = cache(partial(self._reaches, bound_s))
        for ranks in product(*(range(count + 1) for count in self._all)):
            if not any(ranks):
                continue
            change = np.zeros(self._num_layers + 2, dtype=np.int64)
            for _, rank, before in self._predecessors(ranks):
                if before in ends:
                    (starts,) = np.nonzero(ends[before])
                    np.add.at(change, starts + 1, 1)
                    np.add.at(change, reaches(rank, sum(ranks) - 1)[starts] + 1, -1)
            ends[ranks] = np.cumsum(change)[:-1] > 0
        finishing = [int(end) for end in np.nonzero(ends[self._all])[0] if self._finishes(int(end), bound_s)]
        if not finishing:
            return None
        found: list[tuple[int, int]] = []
        ranks, end = self._all, finishing[-1]
        while any(ranks):
            kind, start = self._step_back(ends, ranks, end, bound_s)
            found.append((self._kinds[kind][ranks[kind] - 1], end))
            ranks, end = _without(ranks, kind), start
        return self._plan(found)

    def _step_back(self, ends: dict[_Set, NDArray[np.bool_]], ranks: _Set, end: int, bound_s: float) -> tuple[int, int]:
        """Return the kind of a last stage that ends before ``end``, and its first layer."""
        for kind, rank, before in self._predecessors(ranks):
            for start in np.nonzero(ends[before][:end])[0]:
                if self._reach(int(start), rank, sum(ranks) - 1, bound_s) >= end:
                    return kind, int(start)
        raise AssertionError("every end that was reached has a start")

    def _plan(self, found: list[tuple[int, int]]) -> StagePlan:
        """Return the plan of stages that were found in order from the last but one to the first."""
        ranks, ends = zip(*found[::-1], strict=True) if found else ((), ())
        return StagePlan((*ranks, self._last_rank), (*ends, self._num_layers))

    def _predecessors(self, ranks: _Set) -> Iterator[tuple[int, int, _Set]]:
        for kind, count in enumerate(ranks):
            if count:
                yield kind, self._kinds[kind][count - 1], _without(ranks, kind)

    def _finishes(self, start: int, bound_s: float) -> bool:
        """Return whether the last rank can take all layers from ``start`` on."""
        return self._reach(start, self._last_rank, self._world_size - 1, bound_s) >= self._num_layers

    def _reaches(self, bound_s: float, rank: int, stage: int) -> NDArray[np.int64]:
        return np.array([max(self._reach(i, rank, stage, bound_s), i) for i in range(self._num_layers + 1)])

    def _reach(self, start: int, rank: int, stage: int, bound_s: float) -> int:
        """Return the layer after the last one that a stage can take from ``start`` on; at most ``start`` if none."""
        prefix = self._prefixes[rank]
        # a little slack, because the difference of two rounded sums is not exactly the sum in between
        end = bisect_right(prefix, (prefix[start] + bound_s) * (1 + 1e-13)) - 1
        if self._memory is not None:
            key = stage, self._budgets[rank]
            if key not in self._furthest:
                self._furthest[key] = self._memory.furthest_ends(self._world_size, *key)
            end = min(end, self._furthest[key][start])
        # each later stage needs a layer
        return min(end, self._num_layers - (self._world_size - 1 - stage))


def _without(ranks: _Set, kind: int) -> _Set:
    return (*ranks[:kind], ranks[kind] - 1, *ranks[kind + 1 :])
