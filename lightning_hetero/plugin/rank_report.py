"""What a rank tells the others at the end of a window, and what all of it looks like in a run's record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.run_record import RunWindow
from lightning_hetero.balance.types import BatchPlan, MemoryReading, StepTime, WindowTiming

__all__ = ["RankReport", "run_window"]


@dataclass(frozen=True)
class RankReport:
    """What a rank tells.

    Attributes:
        window: what its steps took.
        memory: what its passes took.
        pass_limit: most samples that its passes may have, as the user wants it or as it was learned; 0 for no limit.
        fetched_through: the latest step for which it has drawn its samples.
    """

    window: WindowTiming
    memory: MemoryReading
    pass_limit: int
    fetched_through: int

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, fit for a collective."""
        return [*self.window.to_numbers(), *self.memory.to_numbers(), self.pass_limit, self.fetched_through]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> RankReport:
        """Return what :meth:`to_numbers` described."""
        *rest, pass_limit, fetched_through = numbers
        window, memory = WindowTiming.from_numbers(rest[:-4]), MemoryReading.from_numbers(rest[-4:])
        return cls(window, memory, int(pass_limit), int(fetched_through))


def run_window(
    reports: Sequence[RankReport],
    plan: BatchPlan,
    step_times: Sequence[StepTime],
    communication_s: float,
    *,
    step: int,
    time_s: float,
    tuning: bool,
) -> RunWindow:
    """Return the event of a record that holds the reports of all ranks, rank 0 first."""
    memory = [report.memory for report in reports] if any(report.memory.samples for report in reports) else []
    return RunWindow(
        step=step,
        time_s=time_s,
        tuning=tuning,
        samples=plan.samples,
        own_s=tuple(report.window.own_s for report in reports),
        waiting_s=tuple(report.window.waiting_s for report in reports),
        deviation_s=tuple(report.window.deviation_s for report in reports),
        overhead_s=tuple(time.overhead_s for time in step_times),
        seconds_per_sample=tuple(time.seconds_per_sample for time in step_times),
        communication_s=communication_s,
        peak_bytes=tuple(m.peak_bytes for m in memory),
        budget_bytes=tuple(m.budget_bytes for m in memory),
    )
