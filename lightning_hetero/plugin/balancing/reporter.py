"""Report what the LoadBalancer does: in the terminal, through the user's loggers and in the run's record."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_hetero.balance.record.run_record import RunAdvice, RunChange, RunEnd, RunWindow
from lightning_hetero.balance.record.run_summary import scalars_of
from lightning_hetero.balance.tuning.actions import ChangePlan, KeepPlan, ShowSpeedUp
from lightning_hetero.balance.tuning.advice import Advice
from lightning_hetero.balance.tuning.session import TuningSettings
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
        """Print a line that only interests a user who watches the progress bar."""
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

    def tuning(self, settings: TuningSettings, plan: BatchPlan) -> None:
        """Report that the tuning begins with ``plan``."""
        steps, warmup_steps = settings.warmup_steps + settings.tune_steps, settings.warmup_steps
        self.say_progress(
            f"tuning the shares in at most {steps} steps, the first {warmup_steps} to warm up;"
            f" {list(plan.samples)} samples per rank so far"
        )

    def change(self, change: ChangePlan, step_s: float, *, tuned: bool) -> None:
        """Record and report a change of shares.

        Args:
            change: The change.
            step_s: The predicted duration of a step under the new plan, in seconds; 0 if it is not known.
            tuned: Whether the tuning is over.
        """
        if self._writer is not None:
            self._writer.add(RunChange(change.first_step, self.time_s, change.plan.samples, change.reason))
        samples, steps = list(change.plan.samples), change.tune_steps_left
        message = f"{samples} samples per rank from training step {change.first_step} on ({change.reason})"
        if steps > 0:
            about = f", about {steps * step_s:.0f} s" if steps * step_s >= 1 else ""
            self.say_progress(f"{message}; tuning for at most {steps} more steps{about}")
        elif tuned:
            self.say(message)
        else:
            self.say_progress(message)

    def no_change(self, kept: KeepPlan) -> None:
        """Report that the tuning is over and has kept the shares."""
        self.say(f"the shares stay {list(kept.plan.samples)}; {kept.reason}")

    def advice(self, advice: Advice) -> None:
        """Record and report the predictions for the plan that was found."""
        if self._writer is not None:
            step = TrainingProgress(self._trainer).step
            fields = (advice.step_s, advice.speed_up, advice.efficiency, tuple(advice.sentences()))
            self._writer.add(RunAdvice(step, self.time_s, *fields))
        for sentence in advice.sentences():
            self.say(sentence)

    def speed_up(self, shown: ShowSpeedUp, profiles: tuple[DeviceProfile, ...]) -> None:
        """Print what the tuning brought."""
        if self._verbose and self._trainer.is_global_zero:
            from lightning_hetero.plugin.balancing.table import print_balance  # rich takes a while to import

            print_balance(self._trainer, profiles, shown.before, shown.after)

    def end(self, reason: str) -> None:
        """Record the end of the run; events after it are left out."""
        if self._writer is not None:
            self._writer.add(RunEnd(max(TrainingProgress(self._trainer).step, 0), self.time_s, reason))
        self._writer = None
