"""Estimate quickly how fast a group of ranks is as a pipeline, to compare thousands of groups.

All layers count as equal. They go one by one to the rank that then has the least time for all of its layers and has
memory for one more. A step takes the slowest rank's time for every micro-batch but one, and that of all ranks and
transfers for this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace

import numpy as np

from lightning_hetero.balance.pipeline.orders.order import micro_batches_in_flight
from lightning_hetero.balance.pipeline.replicas.group_solver import GroupKey, GroupSolver
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem

__all__ = ["Estimate"]

_PLACES = (np.arange(32) + 0.5) / 32  # in a model, as parts of its work


class Estimate:
    """Estimates groups, each kind of group only once.

    Args:
        problem: The problem that the groups belong to.
        groups: What knows which ranks are alike.
    """

    def __init__(self, problem: ReplicaProblem, groups: GroupSolver) -> None:
        self._problem, self._groups = problem, groups
        zero = (0.0,) * problem.num_layers
        overheads = [zero] * problem.world_size if problem.overheads is None else problem.overheads.total_s
        # of an average layer: seconds per sample, and of its two passes
        layers = problem.num_layers
        self._cost_s = [max(sum(row), 1e-12) / layers / problem.micro_batch_size for row in problem.costs.total_s]
        self._overhead_s = [sum(row) / layers for row in overheads]
        self._speed = sum(1 / cost for cost in self._cost_s)
        self._sent = sum(problem.output_bytes) / layers / problem.micro_batch_size
        self.label = groups.label
        memory = problem.memory
        of_layers = [] if memory is None else [memory.weights_bytes, memory.activations_bytes, memory.received_bytes]
        self._weights, self._activations, self._received = (sum(sizes) / layers for sizes in of_layers or [()] * 3)
        self._average_held: dict[tuple[int, int], float] = {}
        self._rates: dict[GroupKey, tuple[float, float]] = {}

    def rate(self, ranks: Sequence[int]) -> float:
        """Return samples per second; negative if a group has too little memory, the more so the more is missing."""
        return self._found(ranks)[0]

    def key(self, groups: Sequence[Sequence[int]]) -> tuple[GroupKey, ...]:
        """Return the same key for groupings that differ only in ranks or nodes that are alike, as far as is easy."""
        return tuple(sorted(map(self._groups.key, groups)))

    def step_s(self, groups: Sequence[Sequence[int]]) -> float:
        """Return the seconds of a step of some groups, with the average of gradients, which overlaps with nothing."""
        problem = self._problem
        rates, parts = zip(*(self._found(group) for group in groups), strict=True)
        if min(rates) <= 0:
            return float("inf")
        passes_s: float = problem.samples / sum(rates)
        size_bytes = sum(problem.parameter_bytes)
        if len(groups) == 1 or not size_bytes:
            return passes_s
        crossing = self._crossing(groups)
        across_s = (problem.between or problem.within).ring_s(crossing * size_bytes, len(groups)) if crossing else 0.0
        return passes_s + across_s + problem.within.ring_s((1 - crossing) * max(parts) * size_bytes, len(groups))

    def _crossing(self, groups: Sequence[Sequence[int]]) -> float:
        """Return the part of the layers that are in different nodes in different groups, with nodes in one order."""
        if not self._problem.nodes:
            return 0.0
        rows = []
        for group in groups:
            ranks = sorted(group, key=self._problem.node_of)
            reached = np.cumsum([1 / self._cost_s[rank] for rank in ranks])
            at = np.searchsorted(reached, _PLACES * reached[-1])
            rows.append(np.array([self._problem.node_of(rank) for rank in ranks])[at])
        return float(np.mean(np.ptp(np.stack(rows), axis=0) > 0))

    def _found(self, ranks: Sequence[int]) -> tuple[float, float]:
        key = self._groups.key(ranks)
        if key not in self._rates:
            self._rates[key] = self._estimated(ranks)
        return self._rates[key]

    def _estimated(self, ranks: Sequence[int]) -> tuple[float, float]:
        """Return samples per second, and the largest part of the layers that a rank has."""
        problem, size, layers = self._problem, len(ranks), self._problem.num_layers
        samples = max(round(problem.samples * sum(1 / self._cost_s[r] for r in ranks) / self._speed), 1)
        count = min(problem.micro_batches, samples)
        if size > layers:
            return -2.0 * size, 1.0
        pass_s = [self._overhead_s[r] + samples / count * self._cost_s[r] for r in ranks]
        most = self._most_layers(ranks, samples)
        if sum(most) >= layers and min(most) > 0:
            step_s, part = self._step_s(pass_s, most, count, samples / count, ranks)
            return samples / step_s, part
        # fewer samples may fit; then the group has time left
        fits, too_many = 0, samples
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            found = self._most_layers(ranks, middle)
            if sum(found) >= layers and min(found) > 0:
                fits, most = middle, found
            else:
                too_many = middle
        if not fits:
            return sum(min(n, layers) for n in most) / layers - size - 1, 1.0
        step_s, part = self._step_s(pass_s, most, count, samples / count, ranks)
        return fits / step_s, part

    def _step_s(
        self, pass_s: Sequence[float], most: Sequence[int], count: int, samples: float, ranks: Sequence[int]
    ) -> tuple[float, float]:
        """Return the seconds of a step, and the largest part of the layers that a rank has."""
        size, layers = len(ranks), self._problem.num_layers
        taken = [1] * size
        heap = [(2 * pass_s[i], i) for i in range(size)]
        heapify(heap)
        for _ in range(layers - size):
            while taken[heap[0][1]] >= most[heap[0][1]]:
                heappop(heap)
            i = heap[0][1]
            taken[i] += 1
            heapreplace(heap, ((taken[i] + 1) * pass_s[i], i))
        stages_s = [n * s for n, s in zip(taken, pass_s, strict=True)]
        step_s = (count - 1) * max(stages_s) + sum(stages_s) + 2 * self._transfers_s(ranks, samples)
        return step_s, max(taken) / layers

    def _transfers_s(self, ranks: Sequence[int], samples: float) -> float:
        """Return the seconds of all transfers of a micro-batch in one direction, with nodes one after another."""
        problem, nodes = self._problem, {self._problem.node_of(rank) for rank in ranks}
        within_s, between_s = (
            link.transfer_s(samples * self._sent) for link in (problem.within, problem.between or problem.within)
        )
        return (len(ranks) - len(nodes)) * within_s + (len(nodes) - 1) * between_s

    def _most_layers(self, ranks: Sequence[int], samples: int) -> list[int]:
        """Return how many layers each rank has memory for, with activations for an average place in the pipeline."""
        problem, memory, layers = self._problem, self._problem.memory, self._problem.num_layers
        if memory is None:
            return [layers] * len(ranks)
        count = min(problem.micro_batches, samples)
        factor = -(-samples // count) / problem.micro_batch_size
        layer = self._weights + factor * self._held(len(ranks), count) * self._activations
        received = 2 * factor * self._received if len(ranks) > 1 else 0.0
        if layer <= 0:
            return [layers] * len(ranks)
        return [int(min(max(memory.budgets_bytes[r] - received, 0) / layer, layers)) for r in ranks]

    def _held(self, num_stages: int, count: int) -> float:
        """Return the micro-batches of which a stage holds activations, on average."""
        key = num_stages, count
        if key not in self._average_held:
            held = (micro_batches_in_flight(s, num_stages, count, self._problem.schedule) for s in range(num_stages))
            self._average_held[key] = sum(held) / num_stages
        return self._average_held[key]
