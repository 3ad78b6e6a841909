"""Simulate one step of a pipeline: when each stage computes which pass, and when the step ends.

A stage computes one pass at a time, in the order of the pipeline schedule.  A forward pass waits for the forward pass
of the previous stage, and a backward pass for the backward pass of the next stage.

- ``gpipe``: all forward passes, then all backward passes (Huang et al., "GPipe", NeurIPS 2019).
- ``1f1b``: as many forward passes as there are stages from this one to the last, then one backward pass per forward
  pass, so that a stage holds fewer activations (Narayanan et al., "PipeDream", SOSP 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.balance.pipeline.stages import Kind, Schedule, StageTimes

__all__ = ["Pass", "Timeline", "micro_batches_in_flight", "order_of_passes", "simulate_pipeline"]


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one stage.

    Attributes:
        stage: Index of the stage.
        kind: Direction of the pass, "forward" or "backward".
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


def order_of_passes(stage: int, num_stages: int, micro_batches: int, schedule: Schedule) -> list[tuple[Kind, int]]:
    """Return the passes of a stage in the order in which it computes them.

    Example:
        >>> order_of_passes(1, 2, 3, "1f1b")[:4]
        [('forward', 0), ('backward', 0), ('forward', 1), ('backward', 1)]
    """
    forward: list[tuple[Kind, int]] = [("forward", i) for i in range(micro_batches)]
    backward: list[tuple[Kind, int]] = [("backward", i) for i in range(micro_batches)]
    ahead = micro_batches_in_flight(stage, num_stages, micro_batches, schedule)
    order = forward[:ahead]
    for done, backward_pass in enumerate(backward):
        order.append(backward_pass)
        order += forward[ahead + done : ahead + done + 1]
    return order


def micro_batches_in_flight(stage: int, num_stages: int, micro_batches: int, schedule: Schedule) -> int:
    """Return the largest number of micro-batches whose activations a stage holds at a time."""
    return micro_batches if schedule == "gpipe" else min(micro_batches, num_stages - stage)


def simulate_pipeline(
    times: StageTimes, micro_batches: int, schedule: Schedule = "1f1b", transfer_s: float = 0.0
) -> Timeline:
    """Simulate one step.

    Args:
        times: Time of one micro-batch in each stage.
        micro_batches: Number of micro-batches per step, at least 1.
        schedule: Pipeline schedule.
        transfer_s: Seconds until the result of a pass has reached the next stage.
    """
    num_stages = len(times.forward_s)
    waiting = [order_of_passes(stage, num_stages, micro_batches, schedule)[::-1] for stage in range(num_stages)]
    free_at = [0.0] * num_stages
    ends: dict[tuple[Kind, int, int], float] = {}
    passes: list[Pass] = []
    while any(waiting):
        for stage, queue in enumerate(waiting):
            while queue:
                kind, i = queue[-1]
                ready_at = _ready_at(ends, kind, stage, i, num_stages, transfer_s)
                if ready_at is None:
                    break
                queue.pop()
                start_s = max(free_at[stage], ready_at)
                duration_s = times.forward_s[stage] if kind == "forward" else times.backward_s[stage]
                free_at[stage] = ends[kind, stage, i] = start_s + duration_s
                passes.append(Pass(stage, kind, i, start_s, start_s + duration_s))
    return Timeline(tuple(sorted(passes, key=lambda p: (p.end_s, p.stage))))


def _ready_at(
    ends: dict[tuple[Kind, int, int], float], kind: Kind, stage: int, i: int, num_stages: int, transfer_s: float
) -> float | None:
    """Return when a pass has its input from the neighbouring stage; None while that is unknown."""
    neighbour = stage - 1 if kind == "forward" else stage + 1
    if not 0 <= neighbour < num_stages:
        return 0.0  # the first stage has its input, the last one its loss
    end_s = ends.get((kind, neighbour, i))
    return None if end_s is None else end_s + transfer_s
