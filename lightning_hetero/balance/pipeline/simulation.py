"""Simulate one step of a pipeline: when each stage computes which pass, and when the step ends.

A rank computes one pass at a time, in its order.  A forward pass waits for the forward pass of the previous stage, and
a backward pass, or the part of it that computes the gradient of the input, for that of the next stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from lightning_hetero.balance.pipeline.orders.order import Action, Order, known_order
from lightning_hetero.balance.pipeline.stages import Kind, Schedule, StageTimes

__all__ = [
    "Pass",
    "PassTimes",
    "Timeline",
    "least_step_s",
    "order_step_s",
    "pipeline_step_s",
    "simulate_order",
    "simulate_pipeline",
]


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one stage.

    Attributes:
        stage: Index of the stage.
        kind: Direction of the pass, "forward" or "backward", or the part of a backward pass, "input" or "weight".
        micro_batch: Index of the micro-batch.
        start_s: Start of the pass, in seconds since the start of the step.
        end_s: End of the pass, in seconds since the start of the step.
    """

    stage: int
    kind: Kind
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline.

    Attributes:
        passes: Passes of all stages, in the order in which they end.
    """

    passes: tuple[Pass, ...]

    @property
    def step_s(self) -> float:
        """Seconds from the start of the step to the end of its last pass."""
        return max(p.end_s for p in self.passes)


@dataclass(frozen=True)
class PassTimes:
    """The time that each stage needs for each micro-batch, shape ``(num_stages, micro_batches)``.

    Attributes:
        forward_s: Seconds of the forward pass.
        input_s: Seconds of the part of the backward pass that computes the gradient of the input.
        weight_s: Seconds of the part of the backward pass that computes the gradients of parameters; 0 where the
            backward pass is computed whole.
        backward_s: Seconds of a backward pass that is computed whole; empty if it takes as long as its parts.
    """

    forward_s: Sequence[Sequence[float]]
    input_s: Sequence[Sequence[float]]
    weight_s: Sequence[Sequence[float]]
    backward_s: Sequence[Sequence[float]] = ()

    @classmethod
    def of_stages(cls, times: StageTimes, micro_batches: int) -> PassTimes:
        """Return the times of stages that compute backward passes whole, of equal micro-batches."""
        forward, backward = ([(t,) * micro_batches for t in row] for row in (times.forward_s, times.backward_s))
        return cls(forward, backward, [(0.0,) * micro_batches] * len(backward))

    def seconds(self, action: Action) -> float:
        """Return how long a pass takes."""
        kind, stage, i = action
        if kind == "forward":
            return self.forward_s[stage][i]
        if kind == "input":
            return self.input_s[stage][i]
        if kind == "weight":
            return self.weight_s[stage][i]
        return self.backward_s[stage][i] if self.backward_s else self.input_s[stage][i] + self.weight_s[stage][i]

    def whole_s(self, stage: int) -> list[float]:
        """Return how long a backward pass that is computed whole takes for each micro-batch."""
        if self.backward_s:
            return list(self.backward_s[stage])
        return [a + b for a, b in zip(self.input_s[stage], self.weight_s[stage], strict=True)]


def simulate_pipeline(
    times: StageTimes, micro_batches: int, schedule: Schedule = "1f1b", transfer_s: float = 0.0
) -> Timeline:
    """Simulate one step of a known schedule with one stage per rank.

    Args:
        times: Time of one micro-batch in each stage.
        micro_batches: Number of micro-batches per step, at least 1.
        schedule: Pipeline schedule.
        transfer_s: Seconds until the result of a pass has reached the next stage.
    """
    order = known_order(range(len(times.forward_s)), micro_batches, schedule)
    return simulate_order(order, PassTimes.of_stages(times, micro_batches), transfer_s)


def least_step_s(times: StageTimes, micro_batches: int, transfer_s: float = 0.0) -> float:
    """Return a time that no step can beat in which each rank has one stage.

    A stage waits until the first micro-batch has come to it, and the last one goes back through all stages before it.

    Args:
        times: Time of one micro-batch in each stage.
        micro_batches: Number of micro-batches per step, at least 1.
        transfer_s: Seconds until the result of a pass has reached the next stage.
    """
    before_s = least_s = 0.0
    for forward_s, backward_s in zip(times.forward_s, times.backward_s, strict=True):
        least_s = max(least_s, before_s + micro_batches * (forward_s + backward_s))
        before_s += forward_s + backward_s + 2 * transfer_s
    return least_s * (1 - 1e-12)


def pipeline_step_s(
    times: StageTimes, micro_batches: int, schedule: Schedule = "1f1b", transfer_s: float = 0.0
) -> float:
    """Return the seconds of the step that :func:`simulate_pipeline` simulates, without its passes."""
    order = known_order(range(len(times.forward_s)), micro_batches, schedule)
    return _simulated(order, PassTimes.of_stages(times, micro_batches), transfer_s, None)


def order_step_s(order: Order, times: PassTimes, transfer_s: float = 0.0) -> float:
    """Return the seconds of the step that :func:`simulate_order` simulates, without its passes."""
    return _simulated(order, times, transfer_s, None)


def simulate_order(order: Order, times: PassTimes, transfer_s: float | Sequence[float] = 0.0) -> Timeline:
    """Simulate one step.

    Args:
        order: The passes of each rank, in an order that ends.
        times: Time of each stage and micro-batch.
        transfer_s: Seconds until the result of a pass has reached another rank; one number, or one for each stage but
            the last, between it and the next.
    """
    passes: list[Pass] = []
    _simulated(order, times, transfer_s, passes)
    return Timeline(tuple(sorted(passes, key=lambda p: (p.end_s, p.stage))))


def _simulated(order: Order, times: PassTimes, transfer_s: float | Sequence[float], passes: list[Pass] | None) -> float:
    """Return the seconds of a step, and append its passes if they are wanted."""
    ranks, num_stages = order.ranks, order.num_stages
    between_s = [transfer_s] * (num_stages - 1) if isinstance(transfer_s, int | float) else transfer_s
    waiting = [list(actions[::-1]) for actions in order.actions]
    free_at = [0.0] * len(waiting)
    forward = [[inf] * order.micro_batches for _ in ranks]  # when a result exists; infinity while it is unknown
    backward = [[inf] * order.micro_batches for _ in ranks]
    left = sum(map(len, waiting))
    while left:
        before = left
        for rank, queue in enumerate(waiting):
            now_s = free_at[rank]
            while queue:
                kind, stage, i = action = queue[-1]
                is_forward = kind == "forward"
                neighbour = stage - 1 if is_forward else stage + 1
                start_s = now_s  # the first stage has its input, and the last one its loss
                if kind != "weight" and 0 <= neighbour < num_stages:
                    ready_at = (forward if is_forward else backward)[neighbour][i]
                    if ready_at == inf:
                        break
                    if ranks[neighbour] != rank:
                        ready_at += between_s[min(stage, neighbour)]
                    if ready_at > now_s:
                        start_s = ready_at
                queue.pop()
                left -= 1
                now_s = start_s + times.seconds(action)
                if kind != "weight":
                    (forward if is_forward else backward)[stage][i] = now_s
                if passes is not None:
                    passes.append(Pass(stage, kind, i, start_s, now_s))
            free_at[rank] = now_s
        assert left < before, "the order was verified to end"
    return max(free_at)
