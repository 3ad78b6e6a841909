"""Find the stages before the first step, and watch them and the shares of replicas during a training."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from typing_extensions import override

from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.stages import StagePlan, WantedSchedule
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.distributed.pipeline.placement import Plan
from lightning_hetero.hardware.memory import state_per_parameter
from lightning_hetero.plugin.pipeline.checkpoints import SavingStrategy
from lightning_hetero.plugin.pipeline.planning import (
    PipelineFindings,
    budget_bytes,
    find_stages,
    first_plan,
    report_findings,
)
from lightning_hetero.plugin.pipeline.refusals import why_one_pipeline
from lightning_hetero.plugin.pipeline.replicas.arguments import wants_replicas
from lightning_hetero.plugin.pipeline.replicas.planning import (
    ReplicaFindings,
    Wanted,
    find_replicas,
    first_replicas,
    report_replicas,
)
from lightning_hetero.plugin.pipeline.runtime import Runtime
from lightning_hetero.plugin.pipeline.watching.watcher import StageChange, StageWatcher
from lightning_hetero.plugin.step.gradients import taken_aside

__all__ = ["WatchingStrategy"]


class WatchingStrategy(SavingStrategy):
    """A strategy that finds its stages by measuring, and lets layers and samples move where devices change.

    Attributes:
        plan: The stages; None before set-up, and with several replicas.
        replica_plan: The replicas and their stages; None before set-up, and if there is one pipeline.
        findings: The measurements and predictions; None if nothing was measured, and with several replicas.
        replica_findings: The same for replicas.
        changes: The changes of stages, and of the shares of replicas, during the training.
    """

    splits: Any
    speeds: Any
    replicas: Any
    schedule: WantedSchedule
    num_microbatches: int
    max_memory_bytes: Any
    min_gain: float
    watch_steps: int
    verbose: bool

    @override
    def renew(self) -> None:
        self.plan: StagePlan | None = None
        self.replica_plan: ReplicaPlan | None = None
        self.findings: PipelineFindings | None = None
        self.replica_findings: ReplicaFindings | None = None
        self.changes: list[StageChange] = []
        self._watcher: StageWatcher | None = None
        self._accumulates = False

    @property
    @abstractmethod
    def runtime(self) -> Runtime | None:
        """The stages of the current run, or None."""

    @abstractmethod
    def _context_of(self, *, training: bool) -> AbstractContextManager[None]:
        """Return the context of a step's passes, such as autocast."""

    @override
    @failure_of_peers()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # not within a step, which runs inside that of the optimiser
        if self._watcher is not None and self.runtime is not None:
            self._watcher.between_steps(self.optimizers, accumulates=self._accumulates)
            found = self._watcher.findings
            if isinstance(found, ReplicaFindings):
                self.replica_findings, self.replica_plan = found, found.plan
            else:
                self.findings, self.plan = found, found.plan

    def _begin_with(self, num_layers: int) -> Plan:
        """Return the stages to begin with, or the replicas and their stages."""
        if wants_replicas(self.replicas) and self.world_size > 1:
            known = None if self.replica_findings is None else self.replica_findings.plan
            self.plan = None
            self.replica_plan = first_replicas(num_layers, self.world_size, self._wanted, self.speeds, known)
            return self.replica_plan
        found = None if self.findings is None else self.findings.plan
        self.plan = first_plan(num_layers, self.world_size, self.splits, self.speeds, found)
        return self.plan

    @property
    def _wanted(self) -> Wanted:
        return Wanted(self.replicas, self.num_microbatches, self.schedule)

    def _prepare(self, step: Any, args: tuple[Any, ...], *, training: bool) -> None:
        """Find the stages before the first step, and measure others if that is due."""
        running = self.runtime
        assert running is not None
        self._find(running, step, args, training=training)
        if training and self._watcher is not None:
            self._watcher.before_step()

    def _finish(self) -> None:
        """Note that the passes of a training step have been run."""
        self._accumulates = True
        if self._watcher is not None:
            self._watcher.after_step()

    def _find(self, running: Runtime, step: Any, args: tuple[Any, ...], *, training: bool) -> None:
        """Change to the best stages before the first step, not counting Lightning's sanity check."""
        running.verify(step, args, self.optimizers, self._context_of(training=training), training=training)
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        if self.splits != "auto" or self.speeds is not None or self.world_size == 1 or module.trainer.sanity_checking:
            return
        if wants_replicas(self.replicas):
            if training:  # the first of those to begin with also evaluates
                known = self.replica_findings
                if known is None or known.plan != running.placement.plan:  # of a model with other layers
                    known = self._found_replicas(running, step, args)
                self._watch(running, known)
            return
        known_stages = self.findings is not None and self.findings.plan == running.placement.plan
        if self.findings is None or not known_stages or (training and not self.findings.training):
            example = running.steps.example(step, args, training=training)
            # the loss is timed with the module's own parameters
            aside = taken_aside(running.placement.parameters)
            with aside, running.steps.prepared(), self._context_of(training=training):
                self.findings = find_stages(
                    running.placement,
                    running.found.calls,
                    example,
                    self.schedule,
                    self.num_microbatches,
                    self.root_device,
                    budget_bytes(self.max_memory_bytes, self.global_rank, self.root_device),
                    max((state_per_parameter(optimizer) for optimizer in self.optimizers), default=0.0),
                )
            self.plan = self.findings.plan
            if self.findings.order is not None:
                running.reorder(self.findings.order, self.findings.split_layers)
            if self.findings.order is not None or self.plan != running.placement.plan:
                running.move(self.plan, self.optimizers)
            if self.verbose:
                report_findings(module.trainer, self.findings)
        if training:
            self._watch(running, self.findings)

    def _watch(self, running: Runtime, findings: PipelineFindings | ReplicaFindings) -> None:
        """Begin to watch this training, if that is wanted and has not been done."""
        if not self.watch_steps or self._watcher is not None:
            return
        assert self.lightning_module is not None
        self._watcher = StageWatcher(
            self.lightning_module.trainer, running, findings, self.min_gain, self.watch_steps, self.root_device,
            verbose=self.verbose,
        )  # fmt: skip
        self._watcher.changes = self.changes

    def _found_replicas(self, running: Runtime, step: Any, args: tuple[Any, ...]) -> ReplicaFindings:
        """Change to the best stages of each replica before the first training step, and return what was found."""
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        wanted, reason = self._wanted, None
        if self.replicas == "auto":
            reason = why_one_pipeline(module)
            wanted = wanted if reason is None else replace(wanted, replicas=1)
        parts = wanted.parts(self.world_size, running.placement.plan.num_layers)
        examples = [running.steps.example(step, args, training=True, parts=n) for n in parts]
        if examples[0].size == examples[1].size:
            examples.pop()
        aside = taken_aside(running.placement.parameters)
        with aside, running.steps.prepared(), self._context_of(training=True):
            found = self.replica_findings = find_replicas(
                running.placement,
                running.found.calls,
                examples,
                wanted,
                self.root_device,
                all_gather(self.node_rank),
                budget_bytes(self.max_memory_bytes, self.global_rank, self.root_device),
                max((state_per_parameter(optimizer) for optimizer in self.optimizers), default=0.0),
            )
        self.replica_plan = found.plan
        running.reorder(found.orders, found.split_layers)
        if found.ordered is not None or found.plan != running.placement.plan:
            running.move(found.plan, self.optimizers)
        if self.verbose:
            report_replicas(module.trainer, found, reason)
        return found
