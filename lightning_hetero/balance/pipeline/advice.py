"""Compare a pipeline with equal stages, with the fastest device alone, and with other numbers of micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.balance.pipeline.simulation import pipeline_step_s
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan, StageTimes

__all__ = ["PipelineAdvice", "advise_pipeline"]

_WORTH_IT = 0.05
_MAX_MICRO_BATCHES = 64


@dataclass(frozen=True)
class PipelineAdvice:
    """The prediction for a pipeline and its alternatives.

    Attributes:
        step_s: Seconds per step under the plan.
        uniform_step_s: Seconds per step with equal numbers of layers.
        fastest_rank: Rank that would be fastest with the whole model.
        alone_s: Seconds per step on that rank alone.
        micro_batches: Number of micro-batches per step under the plan.
        better_micro_batches: Number of micro-batches with which a step would be at least 5 % faster; None if no number
            up to 64 would do.
        better_step_s: Seconds per step with that number.
        fits_alone: Whether the whole model fits into the memory of ``fastest_rank``; None if unknown.
    """

    step_s: float
    uniform_step_s: float
    fastest_rank: int
    alone_s: float
    micro_batches: int
    better_micro_batches: int | None
    better_step_s: float
    fits_alone: bool | None = None

    def sentences(self) -> list[str]:
        """Return notes for the user, starting with the predicted step time."""
        found = [
            f"predicted {1e3 * self.step_s:.0f} ms per step; {1e3 * self.uniform_step_s:.0f} ms with equal numbers of"
            f" layers, {1e3 * self.alone_s:.0f} ms on rank {self.fastest_rank} alone"
        ]
        if self.better_micro_batches is not None:
            found.append(
                f"{self.better_micro_batches} micro-batches instead of {self.micro_batches} are predicted to take"
                f" {1e3 * self.better_step_s:.0f} ms per step, if smaller ones cost as much per sample"
            )
        return found

    def warning(self) -> str | None:
        """Return why one device alone is better; None if the pipeline is faster or the device cannot hold the model."""
        if self.alone_s >= self.step_s or self.fits_alone is False:
            return None
        condition = "the model fits into its memory" if self.fits_alone else "if the model fits into its memory"
        return (
            f"rank {self.fastest_rank} alone is predicted to be {self.step_s / self.alone_s:.2f}x as fast as this"
            f" pipeline; {condition}, use it alone (devices=1)"
        )


def advise_pipeline(
    costs: LayerCosts,
    plan: StagePlan,
    micro_batches: int,
    schedule: Schedule = "1f1b",
    transfer_s: float = 0.0,
    batch_size: int | None = None,
    memory: StageMemory | None = None,
    planned_s: float | None = None,
) -> PipelineAdvice:
    """Predict a pipeline and its alternatives.

    Args:
        costs: Time of every layer on every rank, for one micro-batch.
        plan: Stages of the pipeline.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule.
        transfer_s: Seconds that a transfer between two stages takes.
        batch_size: Number of samples per step, which limits the number of micro-batches; None if unknown.
        memory: Memory needs of the layers and budgets of the ranks; None if unknown.
        planned_s: Seconds per step under the plan if its passes have an order of their own; None for ``schedule``.
    """
    uniform = uniform_stages(costs.num_layers, costs.world_size, plan.ranks[-1])
    alone_s = [micro_batches * sum(row) for row in costs.total_s]

    def step_s(stages: StagePlan, count: int) -> float:
        # the work per step stays the same; it is divided into more, smaller micro-batches
        times, part = costs.of_stages(stages), micro_batches / count
        smaller = StageTimes(tuple(t * part for t in times.forward_s), tuple(t * part for t in times.backward_s))
        return pipeline_step_s(smaller, count, schedule, transfer_s)

    present_s = step_s(plan, micro_batches) if planned_s is None else planned_s
    most = min(_MAX_MICRO_BATCHES, batch_size or _MAX_MICRO_BATCHES)
    counts = [count for count in (micro_batches * 2**k for k in range(1, 7)) if count <= most]
    better, better_s = None, present_s
    for count in counts if planned_s is None else []:  # nothing was planned for other numbers
        candidate_s = step_s(plan, count)
        if candidate_s < better_s * (1 - _WORTH_IT):
            better, better_s = count, candidate_s
    fastest = min(range(costs.world_size), key=lambda rank: alone_s[rank])
    return PipelineAdvice(
        step_s=present_s,
        uniform_step_s=step_s(uniform, micro_batches),
        fastest_rank=fastest,
        alone_s=alone_s[fastest],
        micro_batches=micro_batches,
        better_micro_batches=better,
        better_step_s=better_s,
        fits_alone=None if memory is None else memory.fits_alone(fastest),
    )
