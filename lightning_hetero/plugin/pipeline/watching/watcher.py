"""Measure the stages during a training, and move samples and layers between two steps where a device has changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.replicas.watching.wording import changed_replicas
from lightning_hetero.balance.pipeline.stage_rebalancer import StageDecision
from lightning_hetero.balance.pipeline.stage_watch import StageReport, StageWatch
from lightning_hetero.distributed.collectives import all_wait, decide_on_rank_zero
from lightning_hetero.distributed.pipeline.placement import Plan
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.pipeline.planning import PipelineFindings
from lightning_hetero.plugin.pipeline.replicas.planning import ReplicaFindings
from lightning_hetero.plugin.pipeline.runtime import Runtime

__all__ = ["StageChange", "StageWatcher"]


@dataclass(frozen=True)
class StageChange:
    """A change of stages, or of the shares of replicas, during a training.

    Attributes:
        step: First training step with the new plan.
        plan: The new stages, or the replicas with their new stages and shares.
        reason: Why they have changed.
        moving_s: Seconds that it has taken.
    """

    step: int
    plan: Plan
    reason: str
    moving_s: float


class StageWatcher:
    """Watches the stages and shares of one training on this rank.

    Args:
        trainer: The Trainer of the training.
        running: The stages.
        findings: What was measured before the first step.
        min_gain: Minimum predicted gain that justifies a move.
        watch_steps: Number of training steps per window.
        device: This rank's device.
        verbose: Whether to print what moves.

    Attributes:
        findings: The measurements and predictions for the current plan.
        changes: The changes of the plan.
    """

    def __init__(
        self,
        trainer: Trainer,
        running: Runtime,
        findings: PipelineFindings | ReplicaFindings,
        min_gain: float,
        watch_steps: int,
        device: torch.device,
        *,
        verbose: bool,
    ) -> None:
        self.findings: Any = findings
        self.changes: list[StageChange] = []
        self._trainer = trainer
        self._running = running
        self._verbose = verbose
        self._exchange_s = 0.0
        problem: Any = findings.watched
        self._watch: StageWatch[Any] | None = StageWatch(
            problem, findings.plan, min_gain, watch_steps, asynchronous=device.type != "cpu"
        )

    def between_steps(self, optimizers: Sequence[Optimizer], *, accumulates: bool) -> None:
        """Exchange measurements and change the plan, if that is due; every rank must call this at the same point.

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

    def _exchange(self, watch: StageWatch[Any], optimizers: Sequence[Optimizer]) -> None:
        progress, timer = TrainingProgress(self._trainer), self._running.timer
        report = StageReport(watch.summary(timer.take()), self._exchange_s, progress.remaining_steps)
        begun_s = time.perf_counter()
        decision = decide_on_rank_zero(
            report.to_numbers(), lambda rows: watch.decide([StageReport.from_numbers(row) for row in rows])
        )
        self._exchange_s = time.perf_counter() - begun_s
        before, after = watch.plan, decision.plan
        moves = decision.pays and after != before and not _is_redivision(before, after)
        obstacle = self._running.why_not_moved(after, optimizers) if moves else None
        reason = watch.follow(decision, refused=obstacle is not None)
        if reason is None:
            return
        if obstacle is not None:
            self._keep_layers(watch, f"{_described(before, after)} would be faster ({reason})", obstacle)
        elif decision.pays:
            self._change(watch, before, decision, reason, optimizers, progress.step)
        elif self._verbose:
            say(
                self._trainer,
                f"hetero_pipeline: {_described(before, after)} would be faster ({reason}), but moving them is predicted"
                f" to take {decision.moving_s:.2g} s, more than it saves in the {progress.remaining_steps:.0f} steps"
                f" that are left",
            )

    def _change(
        self,
        watch: StageWatch[Any],
        before: Plan,
        decision: StageDecision[Any],
        reason: str,
        optimizers: Sequence[Optimizer],
        step: int,
    ) -> None:
        begun_s, plan = time.perf_counter(), decision.plan
        is_redivision = _is_redivision(before, plan)
        if is_redivision:
            self._running.divide(plan)
        else:
            if decision.order is not None:
                self._running.reorder(decision.order, self.findings.split_layers)
            self._running.move(plan, optimizers)
            all_wait()
        seconds = time.perf_counter() - begun_s
        watch.moved_in(seconds, decision)
        order = () if decision.order is None else (decision.order,)
        known, self.findings = self.findings, self.findings.changed(plan, decision.factors, *order)
        self.changes.append(StageChange(step, plan, reason, seconds))
        if self._verbose:
            took = "" if is_redivision else f"; moving them took {seconds:.2g} s"
            say(
                self._trainer,
                f"hetero_pipeline: {_described(before, plan)}{_other_way(known, self.findings)} from training step"
                f" {step} on ({reason}){took}",
            )

    def _keep_layers(self, watch: StageWatch[Any], advice: str, obstacle: str) -> None:
        """Let no layer move from now on, and say why."""
        others = ""
        if watch.keep_layers():
            others = " The shares of replicas still follow the devices."
        else:
            self._watch = None
            self._running.timer.discard()
        rank_zero_warn(
            f"`hetero_pipeline`: {advice}, but they stay where they are, because {obstacle}.{others} A run that resumes"
            f" from a checkpoint finds its stages again."
        )


def _is_redivision(before: Plan, after: Plan) -> bool:
    """Return whether nothing but the shares of replicas differs."""
    return isinstance(after, ReplicaPlan) and after.is_redivision_of(before)


def _described(before: Plan, after: Plan) -> str:
    """Return what a plan has instead of another one."""
    if isinstance(after, ReplicaPlan):
        assert isinstance(before, ReplicaPlan)
        return changed_replicas(before, after)
    return f"{list(after.layers_of_ranks)} layers per rank"


def _other_way(before: PipelineFindings | ReplicaFindings, after: PipelineFindings | ReplicaFindings) -> str:
    if isinstance(before, ReplicaFindings) or isinstance(after, ReplicaFindings):
        return ""
    if before.choice is None or after.choice is None or before.choice.name == after.choice.name:
        return ""
    return f' and schedule "{after.choice.name}"'
