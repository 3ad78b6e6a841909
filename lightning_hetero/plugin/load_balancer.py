"""The callback that times the first steps, finds the shares and has all ranks change to them at the same step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_hetero.balance.summary import RankStatus, rank_status, speed_up
from lightning_hetero.balance.tuning import Proposal, propose, review, windows_for
from lightning_hetero.balance.types import BatchPlan, PlanSchedule, StepTime, StepTiming
from lightning_hetero.distributed.agree import agree
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin import arguments
from lightning_hetero.plugin.strategy import HeteroDDPStrategy

__all__ = ["LoadBalancer", "add_default_balancer"]

_REPORT_STEPS = 10


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others at the end of a window: all its measured steps, and those of the window."""

    timings: tuple[StepTiming, ...]
    latest: tuple[StepTiming, ...]
    fetched_through: int


@dataclass(frozen=True)
class _Decision:
    """What all ranks do next."""

    proposal: Proposal
    first_step: int
    statuses: tuple[RankStatus, ...]


class LoadBalancer(Callback):
    """Finds the shares of ``hetero_ddp`` from the timings of the first training steps.

    It measures each rank's own time for a step (data, transfer, forward, backward, optimiser, and the callbacks before
    this one; no waiting for other ranks) under two or three different
    divisions of the global batch, fits overhead and cost a sample, and changes to the division with the earliest
    slowest rank. The training itself is the same before, during and after; only its speed changes. With
    strategy="hetero_ddp" one with these defaults is added where there is none.

    Args:
        warmup_steps: Training steps that are not measured: memory is allocated and kernels are chosen in them.
        tune_steps: Training steps in which the shares are found. Below 8 the division is corrected once only, in
            proportion to the speeds, and a fixed overhead of a step is not told apart.
        min_gain: Least predicted gain that justifies other shares than the initial ones; 0.05 is 5 % more samples/s.
        verbose: Whether to print one line for each change and a table of what it brought.

    Raises:
        ConfigurationError: an argument breaks its rule.

    Attributes:
        step_times: The fitted step time of each rank; empty before the first window has ended.
        statuses_before: Each rank under the initial plan, as measured.
        statuses_after: Each rank under the plan that was found, as measured.
        changes: The changes of plan, as pairs of the first training step and the plan.
        finished: Whether the shares are found.
    """

    def __init__(
        self, warmup_steps: int = 3, tune_steps: int = 20, min_gain: float = 0.05, verbose: bool = True
    ) -> None:
        arguments.check_at_least("warmup_steps", warmup_steps, 0)
        arguments.check_at_least("tune_steps", tune_steps, 1)
        arguments.check_at_least("min_gain", min_gain, 0, whole=False)
        super().__init__()
        self.warmup_steps = warmup_steps
        self.tune_steps = tune_steps
        self.min_gain = min_gain
        self.verbose = verbose
        self.step_times: tuple[StepTime, ...] = ()
        self.statuses_before: tuple[RankStatus, ...] = ()
        self.statuses_after: tuple[RankStatus, ...] = ()
        self.changes: list[tuple[int, BatchPlan]] = []
        self.finished = False
        self._windows = windows_for(tune_steps)
        self._strategy: HeteroDDPStrategy | None = None
        self._forward_hook: RemovableHandle | None = None
        self._initial: BatchPlan | None = None
        self._reporting = False
        self._changed = False
        self._window = 0
        self._measure_from = 0
        self._elapsed = 0
        self._kept = 0
        self._timings: list[StepTiming] = []

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
        if strategy.schedule is None or trainer.world_size == 1 or self.finished:
            return
        self._begin(trainer.fit_loop.total_batch_idx + 1)
        # the forward pass proper begins behind what DDP communicates before it
        self._forward_hook = pl_module.register_forward_pre_hook(lambda *_: strategy.timer.resume())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = self._the_strategy
        if not strategy.timer.enabled:
            return
        strategy.timer.pause()
        part, schedule, step = strategy.training_slice, strategy.schedule, trainer.fit_loop.total_batch_idx
        if part is None or schedule is None:
            self._stop_measuring()  # the loader was replaced by one that the strategy does not divide
            return
        if schedule.at(step).global_batch_size != self._initial_plan.global_batch_size:
            self._begin(step + 1)  # what was measured is of another global batch
            return
        in_window = step >= self._measure_from
        whole = part.global_samples == schedule.at(step).global_batch_size
        # a first batch may have waited for workers to start, unless there are hardly others; a ragged one is not what
        # the plan is for. Both follow from the step alone, so the ranks agree on what counts.
        keep = in_window and whole and (batch_idx > 0 or trainer.num_training_batches < 3)
        strategy.timer.finish_step(part.samples, keep)
        self._elapsed += in_window
        self._kept += keep
        if self._kept and self._elapsed >= self._steps_of_window:
            self._end_window()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_measuring()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_measuring()

    # ---- windows ---------------------------------------------------------------------------------------------------

    @property
    def _the_strategy(self) -> HeteroDDPStrategy:
        assert self._strategy is not None
        return self._strategy

    @property
    def _steps_of_window(self) -> int:
        return _REPORT_STEPS if self._reporting else self._windows.measured_steps[self._window]

    @property
    def _initial_plan(self) -> BatchPlan:
        assert self._initial is not None
        return self._initial

    def _begin(self, first_step: int) -> None:
        """Start to tune, or start anew."""
        strategy = self._the_strategy
        assert strategy.schedule is not None
        self._initial = strategy.schedule.at(first_step)
        self._window, self._timings = 0, []
        self._reporting = self._changed = self.finished = False
        self._start_window(first_step + self.warmup_steps)
        strategy.timer.disable()
        strategy.timer.enable()

    def _start_window(self, first_step: int) -> None:
        self._measure_from = first_step
        self._elapsed = self._kept = 0

    def _end_window(self) -> None:
        """Exchange what was measured; every rank comes here after the same step."""
        strategy = self._the_strategy
        assert strategy.schedule is not None
        current = strategy.schedule.plans[-1]
        measured = strategy.timer.take()
        self._timings += measured
        report = _Report(tuple(self._timings), tuple(measured), strategy.fetched_through)
        decision = agree(report, lambda reports: self._decide(reports, current))
        if self._reporting:
            self._finish(decision, current)
        else:
            self._follow(decision, current)

    def _decide(self, reports: list[_Report], current: BatchPlan) -> _Decision:
        timings = [report.timings for report in reports]
        judge = review if self._reporting else propose
        proposal = judge(timings, self._initial_plan, current, self._the_strategy.limits, self.min_gain)
        statuses = [rank_status(report.latest, n) for report, n in zip(reports, current.samples, strict=True)]
        return _Decision(
            proposal=proposal,
            first_step=max(report.fetched_through for report in reports) + 1,
            statuses=tuple(status for status in statuses if status is not None),
        )

    def _follow(self, decision: _Decision, current: BatchPlan) -> None:
        proposal = decision.proposal
        self.step_times = proposal.step_times
        if self._window == 0:
            self.statuses_before = decision.statuses
        self._window += 1
        if proposal.plan != current:
            self._change(decision.first_step, proposal.plan, f"predicted: {1 + proposal.gain:.2f}x as many samples/s")
        self.finished = proposal.settled or self._window == len(self._windows.measured_steps)
        settle = self._windows.settle_steps if proposal.plan != current else 0
        self._start_window(decision.first_step + settle)
        if self.finished:
            self._reporting = self._changed
            if not self._reporting:
                self._say(
                    f"hetero_ddp: the shares stay {list(proposal.plan.samples)}; no others are predicted to be more"
                    f" than {self.min_gain:.0%} faster"
                )
                self._stop_measuring()

    def _change(self, first_step: int, plan: BatchPlan, reason: str) -> None:
        self._the_strategy.change_plan(first_step, plan)
        self.changes.append((first_step, plan))
        self._changed = True
        self._say(f"hetero_ddp: {list(plan.samples)} samples a rank from training step {first_step} on ({reason})")

    def _finish(self, decision: _Decision, current: BatchPlan) -> None:
        self.statuses_after = decision.statuses
        self.step_times = decision.proposal.step_times
        strategy = self._the_strategy
        self._stop_measuring()
        complete = len(self.statuses_before) == len(self.statuses_after) == len(strategy.profiles)
        if complete and self.verbose and strategy.is_global_zero:
            from lightning_hetero.plugin.table import print_balance  # rich takes a while to import

            print_balance(strategy.profiles, self.statuses_before, self.statuses_after)
        plan = decision.proposal.plan
        if plan != current:
            back = plan == self._initial_plan
            self._change(decision.first_step, plan, "back: the gain was noise" if back else "after a second look")

    def _stop_measuring(self) -> None:
        if self._strategy is not None:
            self._strategy.timer.disable()
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None
        self._reporting = False

    def _say(self, message: str) -> None:
        if self.verbose:
            rank_zero_info(message)

    @property
    def measured_speed_up(self) -> float | None:
        """How many times as many samples/s as under the initial plan; None before it is measured."""
        if not (self.statuses_before and self.statuses_after):
            return None
        return speed_up(self.statuses_before, self.statuses_after)

    # ---- checkpoint ------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        strategy = self._strategy
        if strategy is None or strategy.schedule is None:
            return {}
        return {
            "devices": [profile.name for profile in strategy.profiles],
            "finished": self.finished,
            "schedule": strategy.schedule.to_dict(),
            "step_times": [time.to_dict() for time in self.step_times],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        strategy = self._strategy
        if strategy is None or not state_dict.get("finished"):
            return
        if state_dict["devices"] != [profile.name for profile in strategy.profiles]:
            self._say("hetero_ddp: the checkpoint is of other devices or another number of ranks: tuning again")
            return
        strategy.restore_schedule(PlanSchedule.from_dict(state_dict["schedule"]))
        self.step_times = tuple(StepTime(**time) for time in state_dict["step_times"])
        self.finished = True


def add_default_balancer(trainer: Trainer) -> None:
    """Add a balancer with default settings to the callbacks of ``trainer`` unless there is one."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    if not any(isinstance(callback, LoadBalancer) for callback in callbacks):
        # Lightning keeps checkpoint callbacks last
        first_checkpoint = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), len(callbacks))
        callbacks.insert(first_checkpoint, LoadBalancer())
