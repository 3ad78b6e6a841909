"""Report what the balancer does: in the terminal, through the user's loggers and in the run's record."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_hetero.balance.record.run_record import RunAdvice, RunChange, RunEnd, RunWindow
from lightning_hetero.balance.record.run_summary import scalars_of
from lightning_hetero.balance.tuning.advice import Advice
from lightning_hetero.balance.types import BatchPlan, DeviceProfile
from lightning_hetero.plugin.common.console import has_progress_bar, say
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.common.run_writer import RunWriter, record_directory, run_header

__all__ = ["RunReporter"]


class RunReporter:
    """Reports on a run from rank zero; every rank must construct one at the same point.

    Args:
        trainer: The Trainer of the run.
        profiles: Device of each rank.
        global_batch_size: Number of samples of all ranks in one step.
        record: The argument ``record`` of ``LoadBalancer``.
        verbose: The argument ``verbose`` of ``LoadBalancer``.
    """

    def __init__(
        self,
        trainer: Trainer,
        profiles: tuple[DeviceProfile, ...],
        global_batch_size: int,
        record: bool | str,
        verbose: bool,
    ) -> None:
        self._trainer = trainer
        self._verbose = verbose
        self._started_s = time.monotonic()
        self._logged_at: int | None = None
        self._writer: RunWriter | None = None
        directory = record_directory(trainer, record)
        if directory is not None and trainer.is_global_zero:
            self._writer = RunWriter(directory, run_header("hetero_ddp", profiles, global_batch_size))

    @property
    def path(self) -> Path | None:
        """The path of the record; None if there is no record, and on all ranks but zero."""
        return None if self._writer is None else self._writer.path

    @property
    def time_s(self) -> float:
        """The seconds since the run began."""
        return time.monotonic() - self._started_s

    # ---- the terminal ----------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        """Print a line if the user wants lines printed."""
        if self._verbose:
            say(self._trainer, f"hetero_ddp: {message}")

    def say_progress(self, message: str) -> None:
        """Print a line that only matters to someone who watches the progress bar."""
        if has_progress_bar(self._trainer):
            self.say(message)

    # ---- events ----------------------------------------------------------------------------------------------------

    def window(self, window: RunWindow) -> None:
        """Record and log the measurements of all ranks in one window."""
        if self._writer is not None:
            self._writer.add(window)
        if not all(window.own_s):
            return
        every: int = self._trainer.log_every_n_steps  # type: ignore[attr-defined]  # public, but not annotated
        due = self._logged_at is None or window.tuning or window.step - self._logged_at >= every
        if due and every and self._trainer.is_global_zero:
            self._logged_at = window.step
            scalars, step = scalars_of(window), TrainingProgress(self._trainer).logged_step
            for logger in self._trainer.loggers:
                logger.log_metrics(scalars, step=step)

    def change(self, first_step: int, plan: BatchPlan, reason: str) -> None:
        """Record a change of shares."""
        if self._writer is not None:
            self._writer.add(RunChange(first_step, self.time_s, plan.samples, reason))

    def advice(self, advice: Advice) -> None:
        """Record the predictions for the plan that was found."""
        if self._writer is not None:
            step = TrainingProgress(self._trainer).step
            fields = (advice.step_s, advice.speed_up, advice.efficiency, tuple(advice.sentences()))
            self._writer.add(RunAdvice(step, self.time_s, *fields))

    def end(self, reason: str) -> None:
        """Record the end of the run; events after it are left out."""
        if self._writer is not None:
            self._writer.add(RunEnd(max(TrainingProgress(self._trainer).step, 0), self.time_s, reason))
        self._writer = None
