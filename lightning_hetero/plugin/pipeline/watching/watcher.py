"""Measure the stages during a training, and move layers between two steps where a device has changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_hetero.balance.pipeline.stage_rebalancer import StageDecision
from lightning_hetero.balance.pipeline.stage_watch import StageReport, StageWatch
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.collectives import all_wait, decide_on_rank_zero
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.pipeline.planning import PipelineFindings
from lightning_hetero.plugin.pipeline.runtime import Runtime

__all__ = ["StageChange", "StageWatcher"]


@dataclass(frozen=True)
class StageChange:
    """A change of stages during a training.

    Attributes:
        step: First training step with the new stages.
        plan: The new stages.
        reason: Why layers have moved.
        moving_s: Seconds that it has taken.
    """

    step: int
    plan: StagePlan
    reason: str
    moving_s: float


class StageWatcher:
    """Watches the stages of one training on this rank.

    Args:
        trainer: The Trainer of the training.
        running: The stages.
        findings: What was measured before the first step.
        min_gain: Minimum predicted gain that justifies a move.
        watch_steps: Number of training steps per window.
        device: This rank's device.
        verbose: Whether to print what moves.

    Attributes:
        findings: The measurements and predictions for the current stages.
        changes: The changes of stages.
    """

    def __init__(
        self,
        trainer: Trainer,
        running: Runtime,
        findings: PipelineFindings,
        min_gain: float,
        watch_steps: int,
        device: torch.device,
        *,
        verbose: bool,
    ) -> None:
        self.findings = findings
        self.changes: list[StageChange] = []
        self._trainer = trainer
        self._running = running
        self._verbose = verbose
        self._exchange_s = 0.0
        self._watch: StageWatch | None = StageWatch(
            findings.problem, findings.plan, min_gain, watch_steps, asynchronous=device.type != "cpu"
        )

    def between_steps(self, optimizers: Sequence[Optimizer], *, accumulates: bool) -> None:
        """Exchange measurements and move layers, if that is due; every rank must call this at the same point.

        Args:
            optimizers: The optimisers.
            accumulates: Whether gradients of earlier batches wait for a step of the optimiser.
        """
        watch = self._watch
        if watch is not None and watch.is_due and not accumulates and not self._running.pipeline.is_recording:
            self._exchange(watch, optimizers)

    def before_step(self) -> None:
        """Measure the passes of the training step that begins, if it belongs to a window."""
        if self._watch is not None and self._watch.measures:
            self._running.timer.begin_step(synchronised=self._watch.synchronised)

    def after_step(self) -> None:
        """Note that the passes of a training step have been run."""
        self._running.timer.end_step(self._running.steps.samples)
        if self._watch is not None:
            self._watch.step_ended()

    def _exchange(self, watch: StageWatch, optimizers: Sequence[Optimizer]) -> None:
        progress, timer = TrainingProgress(self._trainer), self._running.timer
        report = StageReport(watch.summary(timer.take()), self._exchange_s, progress.remaining_steps)
        begun_s = time.perf_counter()
        decision = decide_on_rank_zero(
            report.to_numbers(), lambda rows: watch.decide([StageReport.from_numbers(row) for row in rows])
        )
        self._exchange_s = time.perf_counter() - begun_s
        moves = decision.pays and decision.plan != watch.plan
        obstacle = self._running.why_not_moved(decision.plan, optimizers) if moves else None
        reason = watch.follow(decision)
        if reason is None:
            return
        if obstacle is not None:
            self._give_up(decision, reason, obstacle)
        elif moves:
            self._move(watch, decision, reason, optimizers, progress.step)
        elif self._verbose:
            say(
                self._trainer,
                f"hetero_pipeline: {_layers(decision.plan)} layers per rank would be faster ({reason}), but moving them"
                f" is predicted to take {decision.moving_s:.2g} s, more than it saves in the"
                f" {progress.remaining_steps:.0f} steps that are left",
            )

    def _move(
        self, watch: StageWatch, decision: StageDecision, reason: str, optimizers: Sequence[Optimizer], step: int
    ) -> None:
        begun_s = time.perf_counter()
        if decision.order is not None:
            self._running.reorder(decision.order, self.findings.split_layers)
        self._running.move(decision.plan, optimizers)
        all_wait()
        seconds = time.perf_counter() - begun_s
        watch.moved_in(seconds, decision)
        before, self.findings = self.findings, self.findings.changed(decision.plan, decision.factors, decision.order)
        self.changes.append(StageChange(step, decision.plan, reason, seconds))
        if self._verbose:
            say(
                self._trainer,
                f"hetero_pipeline: {_layers(decision.plan)} layers per rank{_other_way(before, self.findings)} from"
                f" training step {step} on ({reason}); moving them took {seconds:.2g} s",
            )

    def _give_up(self, decision: StageDecision, reason: str, obstacle: str) -> None:
        self._watch = None
        self._running.timer.discard()
        rank_zero_warn(
            f"`hetero_pipeline`: {_layers(decision.plan)} layers per rank would be faster ({reason}), but they stay"
            f" where they are, because {obstacle}. A run that resumes from a checkpoint finds its stages again."
        )


def _other_way(before: PipelineFindings, after: PipelineFindings) -> str:
    if before.choice is None or after.choice is None or before.choice.name == after.choice.name:
        return ""
    return f' and schedule "{after.choice.name}"'


def _layers(plan: StagePlan) -> list[int]:
    return list(plan.layers_of_ranks)
