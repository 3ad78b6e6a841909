"""The callback that times the first steps, finds the shares and has all ranks change to them at the same step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_hetero.balance.batch.batch_solver import predicted_step_s
from lightning_hetero.balance.batch.caps import limits_of_micro_batches, micro_batch_sizes
from lightning_hetero.balance.record.run_summary import measured_speed_up
from lightning_hetero.balance.tuning.advice import Advice, advise, predicted_efficiency
from lightning_hetero.balance.tuning.change_reason import change_reason
from lightning_hetero.balance.tuning.memory_model import MemoryModel
from lightning_hetero.balance.tuning.rebalancer import Decision, Rebalancer, Window
from lightning_hetero.balance.tuning.saved_balance import SavedBalance
from lightning_hetero.balance.tuning.window import summarise
from lightning_hetero.balance.types import BatchPlan, MemoryReading, StepTime, WindowTiming
from lightning_hetero.distributed.collectives import decide_on_rank_zero
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.plugin.balancing.rank_report import RankReport, check_agreement, fingerprint_of, run_window
from lightning_hetero.plugin.balancing.reporter import RunReporter, reason_of
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy

__all__ = ["LoadBalancer", "add_default_balancer"]

_NOTHING_MEASURED = WindowTiming(0, 0, 0.0)
_NOTHING_READ = MemoryReading(0, 0.0, 0.0, 0.0)
_REPORT_STEPS = 10


@dataclass(frozen=True)
class _RankZeroDecision:
    """What all ranks do next; the windows of all ranks where somebody wants to see them."""

    decision: Decision
    first_step: int
    windows: tuple[WindowTiming, ...]
    predicted_micro_batches: tuple[int | None, ...]


class LoadBalancer(Callback):
    """Finds the shares of ``hetero_ddp`` from the timings of the first training steps, and keeps them right.

    It measures each rank's own time for a step (data, transfer, forward, backward, optimiser, and the callbacks before
    this one; no waiting for other ranks), learns overhead and cost a sample, and changes to the division with the
    earliest slowest rank. Then it goes on looking for devices that became slower or faster. The training itself is the
    same before, during and after; only its speed changes. With strategy="hetero_ddp" one with these defaults is added
    where there is none.

    Args:
        warmup_steps: Training steps that are not measured: memory is allocated and kernels are chosen in them.
        tune_steps: Most training steps in which the shares are searched for; the search ends earlier where measuring
            on would not change them.
        min_gain: Least predicted gain that justifies other shares than the initial ones; 0.05 is 5 % more samples/s.
        verbose: Whether to print one line for each change and a table of what it brought; beside a progress bar, also
            how the tuning gets on.
        memory_fraction: How much of a device's memory a plan may count on, as a part of what this process has and what
            nobody has. Peaks are predicted from the steps that run anyway; on processors nothing is predicted.
        watch_steps: Training steps of each look for drift after the tuning. The ranks exchange a few numbers at the end
            of each, at most about four times a second. 0 keeps the shares that the tuning found.
        record: Whether to keep the record that `lightning-hetero report` turns into a page: true keeps a small file
            hetero_run.jsonl in the logger's directory, and none where there is no logger; a text names a directory.
        progress_bar: Whether the progress bar shows the efficiency: samples a second over what the ranks would process
            if none ever waited.

    Raises:
        ConfigurationError: an argument breaks its rule.

    Attributes:
        step_times: The expected step time of each rank; empty before the first window has ended.
        communication_s: What a step takes besides the slowest rank's own time, as measured.
        windows_before: Each rank under the plan that was measured first, as measured.
        windows_after: Each rank under the plan that was found, as measured.
        changes: The changes of plan, as pairs of the first training step and the plan.
        finished: Whether the tuning is over.
        reporter: What is told of the run; None before it begins.
    """

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
        self.memory_fraction = memory_fraction
        self.warmup_steps = warmup_steps
        self.tune_steps = tune_steps
        self.min_gain = min_gain
        self.verbose = verbose
        self.watch_steps = watch_steps
        self.record = record
        self.progress_bar = progress_bar
        self.reporter: RunReporter | None = None
        self.step_times: tuple[StepTime, ...] = ()
        self.communication_s = 0.0
        self.windows_before: tuple[WindowTiming, ...] = ()
        self.windows_after: tuple[WindowTiming, ...] = ()
        self.changes: list[tuple[int, BatchPlan]] = []
        self.finished = False
        self._strategy: HeteroDDPStrategy | None = None
        self._forward_hook: RemovableHandle | None = None
        self._rebalancer: Rebalancer | None = None
        self._memory_model = MemoryModel(0)
        self._restored: dict[str, Any] | None = None
        self._window = Window(0, 1)
        self._measure_from = 0
        self._elapsed = 0
        self._kept = 0
        self._guess_is_due = False
        self._improved = False
        self._efficiency: float | None = None
        self._times_before: tuple[StepTime, ...] = ()
        self._reports_of_ranks: tuple[RankReport, ...] = ()

    # ---- hooks -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, HeteroDDPStrategy):
            raise UnsupportedFeatureError(
                f"`LoadBalancer` needs a strategy that can divide batches unequally, got {type(strategy).__name__}."
                f' Use Trainer(strategy="hetero_ddp") or remove the callback.'
            )
        self._strategy = strategy

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = self._the_strategy
        if strategy.plan_schedule is None or trainer.world_size == 1 or (self.finished and not self.watch_steps):
            return
        batch = strategy.plan_schedule.plans[-1].global_batch_size
        self.reporter = RunReporter(trainer, strategy.profiles, batch, self.record, self.verbose)
        self._begin(trainer.fit_loop.total_batch_idx + 1)
        self._guess_is_due = not self.finished
        # the forward pass proper begins behind what DDP communicates before it
        self._forward_hook = pl_module.register_forward_pre_hook(lambda *_: strategy.timer.resume())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._rebalancer is None:
            return
        strategy = self._the_strategy
        strategy.timer.pause()
        if self.progress_bar and self._efficiency is not None:
            pl_module.log("hetero_efficiency", self._efficiency, prog_bar=True, logger=False)
        part, schedule, step = strategy.training_slice, strategy.plan_schedule, trainer.fit_loop.total_batch_idx
        if part is None or schedule is None:
            self._stop_measuring()  # the loader was replaced by one that the strategy does not divide
            return
        plan = schedule.at(step)
        if plan.global_batch_size != self._rebalancer.current.global_batch_size:
            self._restored = None
            self._begin(step + 1)  # what was measured is of another global batch
            return
        if self._guess_is_due:
            self._begin_with_a_guess(step + 1)
        if not strategy.timer.enabled:
            if step + 2 >= self._measure_from:  # the step under way when it is enabled is not whole
                self._start_measuring()
            return
        if step + 1 == self._measure_from and strategy.memory is not None:
            strategy.memory.restart()
        in_window = step >= self._measure_from
        whole = part.global_samples == plan.global_batch_size
        # a first batch may have waited for workers to start, unless there are hardly others; a ragged one is not what
        # the plan is for. Both follow from the step alone, so the ranks agree on what counts.
        keep = in_window and whole and (batch_idx > 0 or trainer.num_training_batches < 3)
        strategy.timer.finish_step(part.samples, keep)
        self._elapsed += in_window
        self._kept += keep
        if self._kept and self._elapsed >= self._window.measured_steps:
            self._end_window(plan)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        memory = self._strategy.memory if self._strategy is not None else None
        if self._rebalancer is not None and memory is not None:
            memory.restart()  # a peak of validation says nothing about training steps

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_measuring()
        if self.reporter is not None:
            self.reporter.end("finished")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.reporter is not None:
            self.reporter.end(reason_of(exception))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_measuring()

    # ---- windows ---------------------------------------------------------------------------------------------------

    @property
    def _the_strategy(self) -> HeteroDDPStrategy:
        assert self._strategy is not None
        return self._strategy

    @property
    def _the_reporter(self) -> RunReporter:
        assert self.reporter is not None
        return self.reporter

    def _begin(self, first_step: int) -> None:
        """Start to tune, or to watch where a resumed run has tuned already, or start anew."""
        strategy = self._the_strategy
        assert strategy.plan_schedule is not None
        current = strategy.plan_schedule.at(first_step)
        state = self._restored
        if state is not None and sum(state["initial"]) != current.global_batch_size:
            state = self._restored = None
        self.finished = state is not None
        self._rebalancer = Rebalancer(
            initial=current if state is None else BatchPlan(tuple(state["initial"])),
            current=current,
            limits=strategy.limits,
            min_gain=self.min_gain,
            tune_steps=self.tune_steps,
            watch_steps=self.watch_steps or _REPORT_STEPS,
            model=None if state is None else Rebalancer.model_of(state),
        )
        self._memory_model = MemoryModel(strategy.world_size)
        self._start_window(first_step + self.warmup_steps, self._rebalancer.first_window())
        if not self.finished:
            self._the_reporter.say_progress(
                f"tuning the shares in at most {self.warmup_steps + self.tune_steps} steps, the first"
                f" {self.warmup_steps} to warm up; {list(current.samples)} samples a rank so far"
            )
        strategy.timer.disable()
        self._start_measuring()

    def _begin_with_a_guess(self, next_step: int) -> None:
        """Change to what the devices' data suggest, behind a first step that has shown that shares may be unequal."""
        self._guess_is_due = False
        strategy = self._the_strategy
        plan = strategy.nominal_plan()
        if plan is None or self._rebalancer is None or plan == self._rebalancer.current:
            return
        first_step = decide_on_rank_zero([strategy.fetched_through], _step_behind_all, strategy.root_device)
        self._rebalancer.current = plan
        self._change(first_step, plan, "a first guess, from the devices' cores and clocks", self.tune_steps)
        self._start_window(max(first_step, next_step) + self.warmup_steps, self._rebalancer.first_window())

    def _start_measuring(self) -> None:
        strategy = self._the_strategy
        assert strategy.lightning_module is not None
        strategy.timer.enable(strategy.lightning_module.parameters())

    def _start_window(self, first_step: int, window: Window) -> None:
        self._window = window
        self._measure_from = first_step + window.skipped_steps
        self._elapsed = self._kept = 0

    def _end_window(self, plan: BatchPlan) -> None:
        """Exchange what was measured; every rank comes here after the same step."""
        strategy = self._the_strategy
        assert self._rebalancer is not None
        current = self._rebalancer.current
        report = RankReport(
            summarise(strategy.timer.take()) or _NOTHING_MEASURED,
            self._memory_of_micro_batch(plan.samples[strategy.global_rank]),
            strategy.micro_batches.limit or 0,
            strategy.fetched_through,
            self._fingerprint,
        )
        outcome = decide_on_rank_zero(report.to_numbers(), self._decide, strategy.root_device)
        decision = outcome.decision
        strategy.micro_batches.predicted = outcome.predicted_micro_batches[strategy.global_rank]
        self.step_times, self.communication_s = decision.step_times, decision.communication_s
        self._rebalancer.current = decision.plan  # on rank zero it is already
        if self.progress_bar and self.step_times:
            self._efficiency = predicted_efficiency(self.step_times, plan, self.communication_s)
        self._tell_window(plan)
        if not self.windows_before:
            self.windows_before = outcome.windows
        elif self.finished and self._reports:
            self.windows_after = outcome.windows
            self._tell_result()
        if decision.plan != current:
            self._improved = True
            self._change(
                outcome.first_step,
                decision.plan,
                change_reason(decision.gain, current, self._times_before, decision.step_times),
                0 if self.finished or decision.tuned else self._rebalancer.tune_steps_left,
            )
            self._times_before = ()
        if decision.tuned and not self._times_before:
            # what is learned while tuning corrects a guess; only from then on a difference is a change of speed
            self._times_before = decision.step_times
        if decision.tuned and not self.finished:
            self.finished = True
            if not self._improved:
                self._the_reporter.say(
                    f"the shares stay {list(decision.plan.samples)}; {self._why_they_stay(decision)}"
                )
                self._give_advice()
        self._start_window(outcome.first_step, decision.window)
        if self.finished and not (self.watch_steps or self._reports):
            self._stop_measuring()
        elif decision.window.skipped_steps > 2:
            strategy.timer.disable()

    def _why_they_stay(self, decision: Decision) -> str:
        if decision.step_times:
            return f"no others are predicted to be more than {self.min_gain:.0%} faster"
        assert self._rebalancer is not None
        ranks = ", ".join(map(str, self._rebalancer.model.unmeasured))  # rank zero knows, and prints
        return f"no step of rank {ranks} could be timed, so nothing is known of others"

    @property
    def _reports(self) -> bool:
        """Whether a table of what the tuning brought is still to come."""
        return bool(self._improved and self.windows_before and not self.windows_after)

    @property
    def _fingerprint(self) -> int:
        strategy = self._the_strategy
        progress = TrainingProgress(strategy.trainer)
        assert strategy.plan_schedule is not None
        return fingerprint_of(strategy.plan_schedule, progress.step, progress.epoch)

    def _memory_of_micro_batch(self, samples: int) -> MemoryReading:
        strategy = self._the_strategy
        use = strategy.memory.read() if strategy.memory is not None and strategy.train_data.counts_samples else None
        if use is None:
            return _NOTHING_READ
        assert strategy.memory is not None
        strategy.memory.restart()  # the next window may follow at once
        largest = max(micro_batch_sizes(samples, strategy.micro_batches.most), default=0)
        budget_bytes = self.memory_fraction * use.available_bytes
        return MemoryReading(largest, use.resident_bytes, use.peak_bytes, budget_bytes)

    def _predict_memory(self, reports: Sequence[RankReport]) -> tuple[int | None, ...]:
        """Have the rebalancer respect what fits; return the most samples that are expected to on each rank."""
        strategy = self._the_strategy
        assert self._rebalancer is not None
        self._memory_model.observe([report.memory if report.memory.samples else None for report in reports])
        predicted = tuple(self._memory_model.most_samples(rank) for rank in range(len(reports)))
        if strategy.micro_batch_size is None and strategy.train_data.counts_samples:
            fit = [
                min((n for n in (report.micro_batch_limit or None, most) if n is not None), default=None)
                for report, most in zip(reports, predicted, strict=True)
            ]
            batch = self._rebalancer.current.global_batch_size
            self._rebalancer.limit(limits_of_micro_batches(strategy.limits, fit, batch))
        return predicted

    def _decide(self, rows: list[list[float]]) -> _RankZeroDecision:
        reports = [RankReport.from_numbers(row) for row in rows]
        check_agreement(reports)
        windows = [report.window for report in reports]
        assert self._rebalancer is not None
        self._reports_of_ranks = tuple(reports)
        predicted_micro_batches = self._predict_memory(reports)
        decision = self._rebalancer.update([window if window.steps else None for window in windows])
        shown = all(window.steps for window in windows) and (not self.windows_before or self._reports)
        return _RankZeroDecision(
            decision=decision,
            first_step=_step_behind_all([[report.fetched_through] for report in reports]),
            windows=tuple(windows) if shown else (),
            predicted_micro_batches=predicted_micro_batches,
        )

    def _change(self, first_step: int, plan: BatchPlan, reason: str, steps_left: int) -> None:
        """Follow ``plan`` from ``first_step`` on, and say so.

        Args:
            first_step: that no rank has fetched.
            plan: the new shares.
            reason: why, for people.
            steps_left: how many steps the tuning may still take; 0 where it is over.
        """
        self._the_strategy.change_plan(first_step, plan)
        self.changes.append((first_step, plan))
        self._the_reporter.change(first_step, plan, reason)
        message = f"{list(plan.samples)} samples a rank from training step {first_step} on ({reason})"
        if steps_left > 0:
            left_s = steps_left * (
                predicted_step_s(self.step_times, plan) + self.communication_s if self.step_times else 0
            )
            about = f", about {left_s:.0f} s" if left_s >= 1 else ""
            self._the_reporter.say_progress(f"{message}; tuning for at most {steps_left} more steps{about}")
        elif self.finished:
            self._the_reporter.say(message)
        else:
            self._the_reporter.say_progress(message)

    def _tell_window(self, plan: BatchPlan) -> None:
        """Hand on what was measured of all ranks; only rank zero knows it."""
        reports, times = self._reports_of_ranks, self.step_times
        if not reports:
            return
        told = run_window(
            reports,
            plan,
            times,
            self.communication_s,
            step=TrainingProgress(self._the_strategy.trainer).step,
            time_s=self._the_reporter.time_s,
            tuning=not self.finished,
        )
        self._the_reporter.window(told)

    def _tell_result(self) -> None:
        strategy = self._the_strategy
        if self.windows_after and self.verbose and strategy.is_global_zero:
            from lightning_hetero.plugin.balancing.table import print_balance  # rich takes a while to import

            print_balance(strategy.trainer, strategy.profiles, self.windows_before, self.windows_after)
        self._give_advice()

    def _give_advice(self) -> None:
        advice = self.advice
        if advice is None:
            return
        self._the_reporter.advice(advice)
        for sentence in advice.sentences():
            self._the_reporter.say(sentence)

    @property
    def advice(self) -> Advice | None:
        """What the present plan is worth, and what would be worth more; None before every rank was measured."""
        strategy = self._strategy
        if strategy is None or strategy.plan_schedule is None or not self.step_times:
            return None
        plan = strategy.plan_schedule.plans[-1]
        return advise(self.step_times, plan, strategy.limits, self.communication_s, self.min_gain)

    def _stop_measuring(self) -> None:
        if self._rebalancer is not None and self.finished:
            self._restored = self._rebalancer.to_dict()
        self._rebalancer = None
        if self._strategy is not None:
            self._strategy.timer.disable()
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    @property
    def measured_speed_up(self) -> float | None:
        """How many times as many samples/s as under the plan that was measured first; None before it is known."""
        if not (self.windows_before and self.windows_after):
            return None
        return measured_speed_up(self.windows_before, self.windows_after)

    # ---- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        strategy = self._strategy
        if strategy is None or strategy.plan_schedule is None:
            return {}
        return {
            "devices": [profile.name for profile in strategy.profiles],
            "finished": self.finished,
            "schedule": strategy.plan_schedule.to_dict(),
            "step_times": [time.to_dict() for time in self.step_times],
            "balance": self._restored if self._rebalancer is None else self._rebalancer.to_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the shares of an earlier run.

        What the shares are has no influence on what is learned, so a state that cannot be used costs a line and the
        tuning, not the training: one that is damaged or of another version (a warning), or of other devices or another
        number of ranks.
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
        if saved.devices != tuple(profile.name for profile in strategy.profiles):
            if self.verbose:
                say(strategy.trainer, "hetero_ddp: the checkpoint is of other devices or ranks: tuning again")
            return
        strategy.restore_schedule(saved.schedule)
        self.step_times = saved.step_times
        self._restored = None if saved.balance is None else dict(saved.balance)
        self.finished = True


def _step_behind_all(rows: list[list[float]]) -> int:
    """Return the first step that no rank has fetched, given what each has fetched through."""
    return int(max(fetched_through for (fetched_through,) in rows)) + 1


def add_default_balancer(trainer: Trainer) -> None:
    """Add a balancer with default settings to the callbacks of ``trainer`` unless there is one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    if not any(isinstance(callback, LoadBalancer) for callback in callbacks):
        # Lightning keeps checkpoint callbacks last
        first_checkpoint = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(first_checkpoint, LoadBalancer())
