"""The report that each rank sends at the end of a window, and the event of the record that it becomes part of."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.record.run_record import RunWindow
from lightning_hetero.balance.types import BatchPlan, MemoryReading, PlanSchedule, StepTime, WindowTiming
from lightning_hetero.exceptions import DivergedRanksError

__all__ = ["RankReport", "check_agreement", "fingerprint_of", "run_window"]


@dataclass(frozen=True)
class RankReport:
    """The report of one rank on one window.

    Attributes:
        window: Timing of the rank's steps.
        memory: Memory use of the rank's steps.
        micro_batch_limit: Largest micro-batch in samples that the rank may process, set by the user or since memory ran
            out; 0 for no limit.
        fetched_through: Latest step for which the rank has drawn its samples.
        fingerprint: Fingerprint of the plans that the rank follows and of its position, below 2^32.
        exchange_s: Seconds that the rank has spent on the exchange before this one, waiting included; 0 for the first.
    """

    window: WindowTiming
    memory: MemoryReading
    micro_batch_limit: int
    fetched_through: int
    fingerprint: int
    exchange_s: float = 0.0

    def to_numbers(self) -> list[float]:
        """Return the fields as floating-point numbers, which a collective can send."""
        return [
            *self.window.to_numbers(),
            *self.memory.to_numbers(),
            self.micro_batch_limit,
            self.fetched_through,
            self.fingerprint,
            self.exchange_s,
        ]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> RankReport:
        """Return the report that :meth:`to_numbers` has encoded."""
        *rest, micro_batch_limit, fetched_through, fingerprint, exchange_s = numbers
        window, memory = WindowTiming.from_numbers(rest[:-4]), MemoryReading.from_numbers(rest[-4:])
        return cls(window, memory, int(micro_batch_limit), int(fetched_through), int(fingerprint), exchange_s)


def fingerprint_of(schedule: PlanSchedule, step: int, epoch: int) -> int:
    """Return a hash below 2^32 of the plans and the position; other plans have the same with a chance of 1 in 2^32."""
    return zlib.crc32(repr((schedule.first_steps, schedule.plans[-1].samples, step, epoch)).encode())


def check_agreement(reports: Sequence[RankReport]) -> None:
    """Check that all ranks follow the same plans and are at the same step.

    Raises:
        DivergedRanksError: If some ranks differ; the message names them.
    """
    # The majority is taken to be right.
    (common, _), *others = Counter(report.fingerprint for report in reports).most_common()
    if others:
        ranks = [rank for rank, report in enumerate(reports) if report.fingerprint != common]
        raise DivergedRanksError(
            f"All ranks must follow the same plan and be at the same step, but rank {', '.join(map(str, ranks))} of"
            f" {len(reports)} differ from the others. Continuing would lose or repeat samples. Do all ranks run the"
            f" same program, and did all of them load the same checkpoint?"
        )


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
    """Return the event of the record that holds the reports of all ranks, rank 0 first."""
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
