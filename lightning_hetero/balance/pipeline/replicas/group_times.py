"""Time many stages of a group of ranks at once, say which of them fit into memory, and balance borders in an order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.timing import Floats, stage_ends_s
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts

__all__ = ["GroupTimes", "Ints"]

Ints = NDArray[np.int64]

_SLACK = 1e-12  # of sums of bytes that are taken in different orders
_BOUNDS = 32  # on the time of the slowest stage, that are tried at a time
_ROUNDS = 4


class GroupTimes:
    """The times and the memory needs of stages, which are given as the rank and the end of each, one row per plan.

    Args:
        problem: The problem that the ranks belong to.
    """

    def __init__(self, problem: ReplicaProblem) -> None:
        self._problem = problem
        zero = ((0.0,) * problem.num_layers,) * problem.world_size
        overheads = problem.overheads or LayerCosts(zero, zero)
        rows = (problem.costs.forward_s, problem.costs.backward_s, overheads.forward_s, overheads.backward_s)
        # sums over the layers before each one, of each rank
        sums = [np.concatenate([np.zeros((problem.world_size, 1)), np.cumsum(row, axis=1)], axis=1) for row in rows]
        self._forward, self._backward, self._forward_overhead, self._backward_overhead = sums
        self._outputs = np.array([0.0, *(problem.output_bytes or (0.0,) * problem.num_layers)])
        self._nodes = np.array([problem.node_of(rank) for rank in range(problem.world_size)])

    def ends_s(self, orders: Ints, ends: Ints, samples: int) -> Floats:
        """Return when the last pass of each stage ends, with some samples per step."""
        problem, factor = self._problem, self._factor(samples)
        starts = _starts(ends)
        forward, backward, forward_overhead, backward_overhead = (
            sums[orders, ends] - sums[orders, starts]
            for sums in (self._forward, self._backward, self._forward_overhead, self._backward_overhead)
        )
        sent, nodes = factor * self._outputs[ends[:, :-1]], self._nodes[orders]
        slow = problem.between or problem.within
        transfer_s = np.where(
            nodes[:, 1:] == nodes[:, :-1],
            problem.within.latency_s + problem.within.seconds_per_byte * sent,
            slow.latency_s + slow.seconds_per_byte * sent,
        )
        forward_s, backward_s = factor * forward + forward_overhead, factor * backward + backward_overhead
        return stage_ends_s(forward_s, backward_s, transfer_s, min(problem.micro_batches, samples), problem.schedule)

    def fits(self, orders: Ints, ends: Ints, samples: int) -> NDArray[np.bool_]:
        """Return whether each row fits into memory, up to rounding."""
        memory = self._memory(samples)
        if memory is None:
            return np.ones(len(orders), dtype=np.bool_)
        weights, activations, received = self._sums(memory)
        starts = _starts(ends)
        needed = weights[ends] - weights[starts] + received[starts] + received[ends]
        needed += np.array(memory.held(ends.shape[1])) * (activations[ends] - activations[starts])
        budgets = np.array(memory.budgets_bytes)[orders]
        return np.asarray((needed <= budgets + _SLACK * (weights[-1] + activations[-1])).all(axis=1))

    def balanced_ends(self, order: Sequence[int], samples: int) -> Ints | None:
        """Return ends with which the slowest stage is as fast as it can be in an order; None if none fit into memory.

        Each stage takes as many layers as a bound on its time, and memory, allow.
        """
        layers, size = self._problem.num_layers, len(order)
        factor, memory = self._factor(samples), self._memory(samples)
        sums = [
            factor * (self._forward[r] + self._backward[r]) + self._forward_overhead[r] + self._backward_overhead[r]
            for r in order
        ]
        furthest = None if memory is None else [self._furthest(memory, order, stage) for stage in range(size)]
        low, high = 0.0, max(float(one[-1]) for one in sums)
        best: Ints | None = None
        for _ in range(_ROUNDS):
            bounds = np.linspace(low, high, _BOUNDS)[1:]
            starts, found = np.zeros(len(bounds), dtype=np.int64), []
            valid = np.ones(len(bounds), dtype=np.bool_)
            for stage, one in enumerate(sums):
                ends = np.searchsorted(one, (one[starts] + bounds) * (1 + 1e-13), side="right") - 1
                ends = np.minimum(ends, layers - (size - 1 - stage))
                if furthest is not None:
                    ends = np.minimum(ends, furthest[stage][starts])
                valid &= ends > starts
                found.append(ends)
                starts = np.maximum(ends, 0)
            (reached,) = np.nonzero(valid & (starts == layers))
            if not len(reached):
                break
            first = int(reached[0])
            best = np.array([one[first] for one in found])
            low, high = (float(bounds[first - 1]) if first else low), float(bounds[first])
        return best

    def _furthest(self, memory: StageMemory, order: Sequence[int], stage: int) -> Ints:
        """Return how far a stage that begins with each layer can go within the memory of its rank."""
        weights, activations, received = self._sums(memory)
        needed = weights + memory.held(len(order))[stage] * activations
        ends = np.maximum.accumulate(needed + received)
        ends[-1] = max(ends[-1], needed[-1])
        if stage == len(order) - 1:
            ends = needed
        within = needed - received + memory.budgets_bytes[order[stage]] + _SLACK * needed[-1]
        return np.asarray(np.searchsorted(ends, within, side="right") - 1)

    def _sums(self, memory: StageMemory) -> tuple[Floats, Floats, Floats]:
        """Return the bytes before each layer, of weights and of activations, and those received at each border."""
        received = np.zeros(self._problem.num_layers + 1)
        received[1 : len(memory.received_bytes)] = memory.received_bytes[:-1]
        weights, activations = (
            np.array([0.0, *np.cumsum(sizes)]) for sizes in (memory.weights_bytes, memory.activations_bytes)
        )
        return weights, activations, received

    def _memory(self, samples: int) -> StageMemory | None:
        return self._problem.memory_of(range(self._problem.world_size), samples)

    def _factor(self, samples: int) -> float:
        return samples / min(self._problem.micro_batches, samples) / self._problem.micro_batch_size


def _starts(ends: Ints) -> Ints:
    return np.concatenate([np.zeros((len(ends), 1), dtype=np.int64), ends[:, :-1]], axis=1)
