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

__all__ = ["Pass", "PassTimes", "Timeline", "simulate_order", "simulate_pipeline"]


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
    """

    forward_s: Sequence[Sequence[float]]
    input_s: Sequence[Sequence[float]]
    weight_s: Sequence[Sequence[float]]

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
        whole = self.input_s[stage][i] if kind == "backward" else 0.0
        return whole + self.weight_s[stage][i]


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


def simulate_order(order: Order, times: PassTimes, transfer_s: float | Sequence[float] = 0.0) -> Timeline:
    """Simulate one step.

    Args:
        order: The passes of each rank, in an order that ends.
        times: Time of each stage and micro-batch.
        transfer_s: Seconds until the result of a pass has reached another rank; one number, or one for each stage but
            the last, between it and the next.
    """
    ranks, num_stages = order.ranks, order.num_stages
    between_s = [transfer_s] * (num_stages - 1) if isinstance(transfer_s, int | float) else transfer_s
    waiting = [list(actions[::-1]) for actions in order.actions]
    free_at = [0.0] * len(waiting)
    forward = [[inf] * order.micro_batches for _ in ranks]  # when a result exists; infinity while it is unknown
    backward = [[inf] * order.micro_batches for _ in ranks]
    passes: list[Pass] = []
    while any(waiting):
        left = len(passes)
        for rank, queue in enumerate(waiting):
            while queue:
                kind, stage, i = action = queue[-1]
                neighbour = stage - 1 if kind == "forward" else stage + 1
                ready_at = 0.0  # the first stage has its input, and the last one its loss
                if kind != "weight" and 0 <= neighbour < num_stages:
                    ready_at = (forward if kind == "forward" else backward)[neighbour][i]
                    ready_at += between_s[min(stage, neighbour)] if ranks[neighbour] != rank else 0.0
                if ready_at == inf:
                    break
                queue.pop()
                start_s = max(free_at[rank], ready_at)
                free_at[rank] = end_s = start_s + times.seconds(action)
                if kind != "weight":
                    (forward if kind == "forward" else backward)[stage][i] = end_s
                passes.append(Pass(stage, kind, i, start_s, end_s))
        assert len(passes) > left, "the order was verified to end"
    return Timeline(tuple(sorted(passes, key=lambda p: (p.end_s, p.stage))))
