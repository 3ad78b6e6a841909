"""A callback that records which stage of a pipeline computes which micro-batch when."""

from __future__ import annotations

import time
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stages import known_schedule
from lightning_hetero.balance.record.run_record import RunEnd, RunPasses, RunStages
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.probe import TorchDeviceProbe
from lightning_hetero.lightning_packages import with_either_trainer
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.loop_progress import TrainingProgress
from lightning_hetero.plugin.common.run_writer import RunWriter, reason_of, record_directory, run_header
from lightning_hetero.plugin.pipeline.replicas.arguments import wants_replicas
from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

__all__ = ["PipelineRecorder"]


@with_either_trainer
class PipelineRecorder(Callback):
    """Records one training step of ``hetero_pipeline``: which stage computes which micro-batch when.

    It also records when layers move to other ranks after that step.

    Args:
        step: Number of the training step to record, counted from 0. The first steps prepare the stages and are slower
            than the others.
        record: Whether to write the record that `lightning-hetero report` turns into a page. True writes a small file
            hetero_run.jsonl to the logger's directory, or nothing if there is no logger; a string is the path of
            another directory.

    Raises:
        ConfigurationError: An argument breaks its rule.

    Attributes:
        timeline: The recorded passes, on every rank, in seconds from the start of the step; None before the step.

    Example::

        recorder = PipelineRecorder(step=10, record="runs/first")
        trainer = Trainer(strategy="hetero_pipeline", devices=2, callbacks=[recorder])
        trainer.fit(model, train_loader)
        print(recorder.timeline.passes)

    Then ``lightning-hetero report runs/first/hetero_run.jsonl`` writes the page.
    """

    def __init__(self, step: int = 2, record: bool | str = True) -> None:
        arguments.check_at_least("step", step, 0)
        arguments.check_record(record)
        super().__init__()
        self.step = step
        self.record = record
        self.timeline: Timeline | None = None
        self._started_s = 0.0
        self._changes = 0
        self._writer: RunWriter | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._strategy_of(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started_s = time.monotonic()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            self._strategy_of(trainer).record_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = self._strategy_of(trainer)
        if trainer.fit_loop.total_batch_idx == self.step:
            self.timeline = strategy.recorded_step()
            self._write(trainer, self.timeline, _samples_in(batch) if trainer.is_global_zero else 0)
        elif self._writer is not None and len(strategy.changes) > self._changes:
            self._writer.add(_stages(strategy, self._time_s))
        self._changes = len(strategy.changes)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "finished")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, reason_of(exception))

    def _write(self, trainer: Trainer, timeline: Timeline, samples: int) -> None:
        directory = record_directory(trainer, self.record)
        strategy = self._strategy_of(trainer)
        profiles = tuple(all_gather(TorchDeviceProbe().profile(strategy.root_device)))
        if directory is None or not trainer.is_global_zero:
            return
        self._writer = RunWriter(directory, run_header("hetero_pipeline", profiles, samples))
        self._writer.add(_stages(strategy, self._time_s))
        passes = timeline.passes
        self._writer.add(
            RunPasses(
                step=self.step,
                time_s=self._time_s,
                stages=tuple(p.stage for p in passes),
                kinds=tuple(p.kind for p in passes),
                micro_batches=tuple(p.micro_batch for p in passes),
                start_s=tuple(p.start_s for p in passes),
                end_s=tuple(p.end_s for p in passes),
            )
        )

    @property
    def _time_s(self) -> float:
        return time.monotonic() - self._started_s

    def _end(self, trainer: Trainer, reason: str) -> None:
        if self._writer is not None:
            self._writer.add(RunEnd(TrainingProgress(trainer).step, self._time_s, reason))
        self._writer = None

    @staticmethod
    def _strategy_of(trainer: Trainer) -> HeteroPipelineStrategy:
        strategy = trainer.strategy
        # asked by name, because it may be the strategy for the other package of Lightning
        if getattr(strategy, "strategy_name", "") != HeteroPipelineStrategy.strategy_name:
            raise UnsupportedFeatureError(
                f"`PipelineRecorder` needs a strategy with stages, got {type(strategy).__name__}."
                f' Use Trainer(strategy="hetero_pipeline") or remove the callback.'
            )
        found = cast("HeteroPipelineStrategy", strategy)
        if wants_replicas(found.replicas):
            raise UnsupportedFeatureError(
                f"`PipelineRecorder` records the passes of one pipeline, got `replicas={found.replicas!r}`. Remove the"
                f" callback, or use `replicas=1`."
            )
        return found


def _stages(strategy: HeteroPipelineStrategy, time_s: float) -> RunStages:
    """Return the stages in the form of the record; fields that were not measured are empty or 0."""
    plan, found = strategy.plan, strategy.findings
    assert plan is not None
    times = None if found is None else found.costs.of_stages(plan)
    change = strategy.changes[-1] if strategy.changes else None
    sentences = () if found is None else tuple(found.advice.sentences())
    if change is not None:
        sentences = (f"layers have moved before step {change.step}: {change.reason}", *sentences)
    return RunStages(
        step=0 if change is None else change.step,
        time_s=time_s,
        ranks=plan.ranks,
        ends=plan.ends,
        forward_s=() if times is None else times.forward_s,
        backward_s=() if times is None else times.backward_s,
        micro_batches=strategy.num_microbatches,
        schedule=known_schedule(strategy.schedule) if found is None or found.choice is None else found.choice.name,
        transfer_s=0.0 if found is None else found.transfer_s,
        step_s=0.0 if found is None else found.advice.step_s,
        uniform_step_s=0.0 if found is None else found.advice.uniform_step_s,
        sentences=sentences,
    )


def _samples_in(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 0
