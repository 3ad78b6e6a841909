"""A callback that times training steps, finds the shares and makes all ranks change to them at the same step."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_hetero.balance.batch.batch_solver import predicted_step_s
from lightning_hetero.balance.record.run_summary import measured_speed_up
from lightning_hetero.balance.tuning.actions import (
    Action,
    AdoptSuggestion,
    BeginAgain,
    ChangePlan,
    CloseStep,
    ExchangeReports,
    KeepPlan,
    ShowSpeedUp,
    StartTimer,
    StopTimer,
    WaitForDevice,
)
from lightning_hetero.balance.tuning.advice import Advice, advise, predicted_efficiency
from lightning_hetero.balance.tuning.rank_report import RankReport, fingerprint_of, run_window
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.session import StepFacts, TuningSession, TuningSettings, WindowResult
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.types import BatchPlan, StepTime, WindowTiming
from lightning_hetero.distributed.collectives import all_gather_counts, decide_on_rank_zero
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.lightning_packages import with_either_trainer
from lightning_hetero.plugin.balancing.memory_reading import read_memory
from lightning_hetero.plugin.balancing.reporter import RunReporter
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.common.protocols import BalancedStrategy, is_balanced
from lightning_hetero.plugin.common.run_writer import reason_of

__all__ = ["LoadBalancer"]

_NOTHING_MEASURED = WindowTiming(0, 0, 0.0)


@with_either_trainer
class LoadBalancer(Callback):
    """Finds the shares of ``hetero_ddp`` from the timings of the first training steps, and adapts them to drift.

    It measures each rank's own time for a step (data, transfer, forward, backward, optimiser, and the callbacks before
    this one, without waiting for other ranks), learns the overhead and the cost per sample, and changes to the plan
    whose slowest rank finishes earliest. Then it watches for devices that become slower or faster. A change of shares
    changes the speed of the training, not its result. With strategy="hetero_ddp", a LoadBalancer with these defaults is
    added if there is none.

    Args:
        warmup_steps: Number of training steps before the first measured one, in which memory is allocated and kernels
            are chosen.
        tune_steps: Maximum number of training steps in which the shares are searched for. The search ends earlier if
            more measurements would not change them.
        min_gain: Minimum predicted gain that justifies other shares than the initial ones; 0.05 is 5 % more samples/s.
        verbose: Whether to print one line per change and a table of its effect; with a progress bar, also the progress
            of the tuning.
        watch_steps: Number of training steps per window while watching for drift after the tuning. The ranks exchange
            a few numbers after each window, at most about four times per second. 0 keeps the shares of the tuning.
        memory_fraction: Fraction of a device's memory that a plan may use. That memory is what this process has
            allocated plus what is free. Peaks are predicted from the training steps; on processors none is predicted.
        record: Whether to write the record that `lightning-hetero report` turns into a page. True writes a small file
            hetero_run.jsonl to the logger's directory, or nothing if there is no logger; a string names a directory.
        progress_bar: Whether the progress bar shows the efficiency: samples per second over what the ranks would
            process if none ever waited.

    Raises:
        ConfigurationError: An argument breaks its rule.

    Attributes:
        session: State of the tuning, and what it has found.
        reporter: Reporter of the run; None before the run begins.

    Example:
        Tune for at most 10 steps, and keep the shares found::

            balancer = LoadBalancer(tune_steps=10, watch_steps=0)
            trainer = Trainer(strategy="hetero_ddp", devices=2, callbacks=[balancer])
    """

    finds_shares = True

    def __init__(
        self,
        warmup_steps: int = 3,
        tune_steps: int = 20,
        min_gain: float = 0.05,
        verbose: bool = True,
        watch_steps: int = 10,
        memory_fraction: float = 0.92,
        record: bool | str = True,
        progress_bar: bool = False,
    ) -> None:
        arguments.check_at_least("warmup_steps", warmup_steps, 0)
        arguments.check_at_least("tune_steps", tune_steps, 1)
        arguments.check_at_least("min_gain", min_gain, 0, whole=False)
        arguments.check_at_least("watch_steps", watch_steps, 0)
        arguments.check_fraction("memory_fraction", memory_fraction)
        arguments.check_record(record)
        arguments.check_bool("verbose", verbose)
        arguments.check_bool("progress_bar", progress_bar)
        super().__init__()
        self.warmup_steps = warmup_steps
        self.tune_steps = tune_steps
        self.min_gain = min_gain
        self.watch_steps = watch_steps
        self.verbose = verbose
        self.memory_fraction = memory_fraction
        self.record = record
        self.progress_bar = progress_bar
        self.session = TuningSession()
        self.reporter: RunReporter | None = None
        self._strategy: BalancedStrategy | None = None
        self._forward_hook: RemovableHandle | None = None
        self._efficiency: float | None = None
        self._exchange_s = 0.0

    # ---- what was found --------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the tuning is over."""
        return self.session.is_tuned

    @property
    def changes(self) -> list[tuple[int, BatchPlan]]:
        """The changes of plan, as pairs of the first training step and the plan."""
        return self.session.changes

    @property
    def step_times(self) -> tuple[StepTime, ...]:
        """The expected step time of each rank; empty before every rank was measured."""
        return self.session.step_times

    @property
    def communication_s(self) -> float:
        """The measured seconds of a step besides the slowest rank's own time."""
        return self.session.communication_s

    @property
    def windows_before(self) -> tuple[WindowTiming, ...]:
        """One window per rank under the plan that was measured first; empty before that."""
        return self.session.windows_before

    @property
    def windows_after(self) -> tuple[WindowTiming, ...]:
        """One window per rank under the plan that was found; empty before that."""
        return self.session.windows_after

    @property
    def measured_speed_up(self) -> float | None:
        """The samples/s under the found plan over those under the first one; None before both are measured."""
        if not (self.windows_before and self.windows_after):
            return None
        return measured_speed_up(self.windows_before, self.windows_after)

    @property
    def advice(self) -> Advice | None:
        """The predictions for the latest plan and for better set-ups; None before every rank was measured."""
        strategy = self._strategy
        if strategy is None or strategy.plan_schedule is None or not self.step_times:
            return None
        plan, windows = strategy.plan_schedule.plans[-1], (self.windows_before, self.windows_after)
        return advise(self.step_times, plan, strategy.limits, self.communication_s, self.min_gain, *windows)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not is_balanced(trainer.strategy):
            raise UnsupportedFeatureError(
                f"`LoadBalancer` needs a strategy that can divide batches unequally, got"
                f' {type(trainer.strategy).__name__}. Use Trainer(strategy="hetero_ddp") or remove the callback.'
            )
        self._strategy = trainer.strategy
        self.session.settings = TuningSettings(self.warmup_steps, self.tune_steps, self.min_gain, self.watch_steps)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = self._balanced
        schedule = strategy.plan_schedule
        if schedule is None or trainer.world_size == 1 or self.session.has_nothing_to_do:
            return
        global_batch_size = schedule.plans[-1].global_batch_size
        self.reporter = RunReporter(trainer, strategy.profiles, global_batch_size, self.record, self.verbose)
        self._begin(TrainingProgress(trainer).step + 1, strategy.nominal_plan())
        # the forward pass itself begins after DDP's communication before it
        self._forward_hook = pl_module.register_forward_pre_hook(lambda *_: strategy.timer.resume())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.session.is_running:
            return
        strategy = self._balanced
        strategy.timer.pause()
        if self.progress_bar and self._efficiency is not None:
            pl_module.log("hetero_efficiency", self._efficiency, prog_bar=True, logger=False)
        part = strategy.training_slice
        facts = StepFacts(
            step=TrainingProgress(trainer).step,
            schedule=None if part is None else strategy.plan_schedule,
            global_samples=0 if part is None else part.global_samples,
            step_in_epoch=batch_idx,
            steps_in_epoch=trainer.num_training_batches,
        )
        self._perform(self.session.on_step(facts))
        if not self.session.is_running:
            self._remove_hook()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        memory = self._strategy.memory if self._strategy is not None else None
        if self.session.is_running and memory is not None:
            memory.restart()  # the peak of a validation tells nothing about training steps

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if self.reporter is not None:
            self.reporter.end("finished")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.reporter is not None:
            self.reporter.end(reason_of(exception))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        self.session.stop()
        self._remove_hook()
        if self._strategy is not None:
            self._strategy.timer.disable()

    def _remove_hook(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    # ---- actions ---------------------------------------------------------------------------------------------------

    @property
    def _reporter(self) -> RunReporter:
        assert self.reporter is not None
        return self.reporter

    @property
    def _balanced(self) -> BalancedStrategy:
        assert self._strategy is not None
        return self._strategy

    def _begin(self, first_step: int, suggestion: BatchPlan | None = None) -> None:
        strategy = self._balanced
        assert strategy.plan_schedule is not None
        asynchronous = any(profile.is_asynchronous for profile in strategy.profiles)
        actions = self.session.begin(first_step, strategy.plan_schedule, strategy.limits, suggestion, asynchronous)
        if not self.finished:
            self._reporter.tuning(self.session.settings, strategy.plan_schedule.at(first_step))
        self._perform(actions)

    def _perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        strategy = self._balanced
        match action:
            case StartTimer():
                assert strategy.lightning_module is not None
                strategy.timer.disable()
                strategy.timer.enable(strategy.lightning_module.parameters())
            case StopTimer():
                strategy.timer.disable()
            case CloseStep():
                self._close_step(action)
            case WaitForDevice():
                strategy.timer.wait_for_device()
            case BeginAgain():
                self._begin(action.first_step)
            case AdoptSuggestion():
                first_step = max(all_gather_counts(strategy.fetched_through)) + 1
                self._perform(self.session.adopt_suggestion(first_step))
            case ExchangeReports():
                self._exchange_reports()
            case ChangePlan():
                strategy.change_plan(action.first_step, action.plan)
                self._reporter.change(action, self._predicted_step_s(action.plan), tuned=self.finished)
            case KeepPlan():
                self._reporter.no_change(action)
                self._report_advice()
            case ShowSpeedUp():
                self._reporter.speed_up(action, strategy.profiles)
                self._report_advice()

    def _predicted_step_s(self, plan: BatchPlan) -> float:
        return predicted_step_s(self.step_times, plan) + self.communication_s if self.step_times else 0.0

    def _report_advice(self) -> None:
        if (advice := self.advice) is not None:
            self._reporter.advice(advice)

    def _close_step(self, action: CloseStep) -> None:
        strategy = self._balanced
        if action.window_begins and strategy.memory is not None:
            strategy.memory.restart()
        assert strategy.training_slice is not None
        strategy.timer.finish_step(strategy.training_slice.samples, action.keep)

    # ---- a window --------------------------------------------------------------------------------------------------

    def _exchange_reports(self) -> None:
        """Exchange the measurements, and follow rank zero's decision; every rank does so after the same step."""
        strategy = self._balanced
        schedule, progress = strategy.plan_schedule, TrainingProgress(strategy.trainer)
        assert schedule is not None
        plan = schedule.at(progress.step)
        report = RankReport(
            window=summarise(strategy.timer.take()) or _NOTHING_MEASURED,
            memory=read_memory(strategy, plan.samples[strategy.global_rank], self.memory_fraction),
            micro_batch_limit=strategy.micro_batch_limits.limit or 0,
            fetched_through=strategy.fetched_through,
            fingerprint=fingerprint_of(schedule, progress.step, progress.epoch),
            exchange_s=self._exchange_s,
        )
        reports: list[RankReport] = []
        begun_s = time.perf_counter()

        def decide(rows: list[list[float]]) -> WindowResult:
            reports.extend(RankReport.from_numbers(row) for row in rows)
            by_memory = strategy.micro_batch_size is None and strategy.counts_samples
            return self.session.decide(reports, strategy.limits, memory_limits_shares=by_memory)

        result = decide_on_rank_zero(report.to_numbers(), decide)
        strategy.micro_batch_limits.predicted = result.predicted_micro_batches[strategy.global_rank]
        tuning = not self.finished
        actions = self.session.follow(result)
        if self.progress_bar and self.step_times:
            self._efficiency = predicted_efficiency(self.step_times, plan, self.communication_s)
        if reports:  # on rank zero
            step, time_s, times = progress.step, self._reporter.time_s, self.step_times
            self._reporter.window(
                run_window(reports, plan, times, self.communication_s, step=step, time_s=time_s, tuning=tuning)
            )
        self._exchange_s = time.perf_counter() - begun_s
        self._perform(actions)

    # ---- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        strategy = self._strategy
        if strategy is None or strategy.plan_schedule is None:
            return {}
        return {
            "devices": [profile.name for profile in strategy.profiles],
            "schedule": strategy.plan_schedule.to_dict(),
            **self.session.to_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the shares of an earlier run.

        The shares do not influence the result of the training, so an unusable state only starts the tuning again. A
        state that is damaged or of another version causes a warning, one of other devices or ranks a printed line.
        """
        strategy = self._strategy
        if strategy is None:
            return
        try:
            saved = SavedBalance.from_dict(state_dict)
        except ConfigurationError as error:
            rank_zero_warn(f"hetero_ddp: the shares in the checkpoint cannot be used, tuning again: {error}")
            return
        if saved is None:
            return
        if not saved.is_of(strategy.profiles):
            if self.verbose:
                say(strategy.trainer, "hetero_ddp: the checkpoint is from other devices or ranks: tuning again")
            return
        strategy.restore_schedule(saved.schedule)
        self.session.restore(saved)
