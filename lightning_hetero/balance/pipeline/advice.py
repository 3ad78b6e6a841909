"""Say what a pipeline is worth: against equal stages, the fastest device alone, and other numbers of micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stage_solver import StageMemory, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan, StageTimes

__all__ = ["PipelineAdvice", "advise_pipeline"]

_WORTH_IT = 0.05
_MOST_MICRO_BATCHES = 64


@dataclass(frozen=True)
class PipelineAdvice:
    """What is predicted of a pipeline.

    Attributes:
        step_s: of the plan.
        uniform_step_s: with equal numbers of layers.
        fastest_rank: which rank would be fastest with the whole model.
        alone_s: how long a step would take it.
        micro_batches: of the plan.
        better_micro_batches: as many would make a step at least 5 % faster; None where no number up to 64 would.
        better_step_s: what a step would take then.
        fits_alone: whether the whole model fits into that rank's memory; None where nothing is known of it.
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
        """Return what a user should know, the plan's worth first."""
        found = [
            f"predicted {1e3 * self.step_s:.0f} ms a step; {1e3 * self.uniform_step_s:.0f} ms with equal numbers of"
            f" layers, {1e3 * self.alone_s:.0f} ms on rank {self.fastest_rank} alone"
        ]
        if self.better_micro_batches is not None:
            found.append(
                f"{self.better_micro_batches} micro-batches instead of {self.micro_batches} are predicted to take"
                f" {1e3 * self.better_step_s:.0f} ms a step, if smaller ones are as fast a sample"
            )
        return found

    def warning(self) -> str | None:
        """Return why not to use a pipeline at all; None where it is worth it, or one device cannot hold the model."""
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
) -> PipelineAdvice:
    """Return what is predicted.

    Args:
        costs: of every layer on every rank, for one micro-batch.
        plan: the stages.
        micro_batches: of a step.
        schedule: the order of passes.
        transfer_s: what a transfer between stages takes.
        batch_size: samples of a step, which is the most micro-batches that it can have; None where unknown.
        memory: what layers hold, and ranks may; None where nothing is known of it.
    """
    uniform = uniform_stages(costs.num_layers, costs.world_size, plan.ranks[-1])
    alone_s = [micro_batches * sum(row) for row in costs.total_s]

    def step_s(stages: StagePlan, count: int) -> float:
        # the work of a step stays the same, in more and smaller parts
        times, part = costs.of_stages(stages), micro_batches / count
        smaller = StageTimes(tuple(t * part for t in times.forward_s), tuple(t * part for t in times.backward_s))
        return simulate_pipeline(smaller, count, schedule, transfer_s).step_s

    present_s = step_s(plan, micro_batches)
    most = min(_MOST_MICRO_BATCHES, batch_size or _MOST_MICRO_BATCHES)
    counts = [count for count in (micro_batches * 2**k for k in range(1, 7)) if count <= most]
    better, better_s = None, present_s
    for count in counts:
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
