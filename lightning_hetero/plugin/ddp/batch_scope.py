"""Know which part of a global batch this rank processes, in every hook that Lightning calls for a batch or an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.distributed.calling_line import called_by_library, calling_line
from lightning_hetero.distributed.collective_watch import Collective, CollectiveWatch
from lightning_hetero.plugin.common.first_listener import listening_first, logging_through
from lightning_hetero.plugin.common.lightning_private import set_batch_size
from lightning_hetero.plugin.common.overridden import overridden_method
from lightning_hetero.plugin.data.evaluation_data import EvaluationData
from lightning_hetero.plugin.data.training_data import TrainingData
from lightning_hetero.plugin.ddp.epoch_end import EpochEnd
from lightning_hetero.plugin.ddp.mean_metrics import weighted_means
from lightning_hetero.plugin.ddp.own_collectives import OwnCollectives
from lightning_hetero.plugin.ddp.shared_faults import FrozenParameters, LossTerms, is_compiled, warn_of_monitored
from lightning_hetero.plugin.ddp.stand_in import stand_in
from lightning_hetero.plugin.ddp.throughput import counting_for_all_ranks
from lightning_hetero.plugin.step.metric_sync import MetricSync

__all__ = ["BatchScope"]


class BatchScope(Callback):
    """The batch that this rank processes, from the first hook that Lightning calls for it to the last.

    Hooks are where metrics are updated and values are logged, as much as in the step. A rank that stands in must leave
    no trace in any of them, and what is reduced in any of them has the weight of the rank's samples. The hooks of this
    object are called before those of all callbacks, and it is none of them. Lightning calls a module's hook for the end
    of a batch after those of all callbacks, so the scope ends with that hook.

    Args:
        train_data: The training loaders.
        eval_data: The loaders of validation and test.
        before_collective: Function that is called before a collective that the user's code makes, with its name.
        waiting: Function that returns the context in which this rank waits for others in a collective, or None.

    Attributes:
        part: This rank's part of the batch; None between batches, or if it is unknown.
        weight: Weight of this rank's mean in the mean over ranks; 1 between batches.
        epoch_end: The epoch that ends, in its last hooks; None at any other time.
        frozen_stay: Whether parameters that are frozen at first are never combined between ranks, as under DDP.
    """

    def __init__(
        self,
        train_data: TrainingData,
        eval_data: EvaluationData,
        before_collective: Callable[[str], None],
        waiting: Callable[[], AbstractContextManager[None] | None],
    ) -> None:
        self._train_data = train_data
        self._eval_data = eval_data
        self._before_collective = before_collective
        self._watch = CollectiveWatch(waiting)
        self._own_collectives = OwnCollectives(train_data, eval_data)
        self._samples: dict[str, tuple[int, ...]] = {}
        self._stage = ""
        self._run = ExitStack()
        self._batch = ExitStack()
        self._metrics = MetricSync(self.samples_of_ranks)
        self._warned: set[str] = set()
        self._is_first = False
        self._epochs = 0
        self._loss_terms: LossTerms | None = None
        self._frozen: FrozenParameters | None = None
        self.part: BatchSlice | None = None
        self.weight = 1.0
        self.epoch_end: EpochEnd | None = None
        self.frozen_stay = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": ExitStack(), "_batch": ExitStack()}  # a copy is in no run

    @property
    def stands_in(self) -> bool:
        """Whether the rank has no sample of its own in the batch."""
        return self.part is not None and self.part.samples == 0

    def samples_of_ranks(self) -> tuple[int, ...]:
        """Return each rank's number of samples in the current epoch; empty if they are unknown."""
        return self._samples.get(self._stage, ())

    def open(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin a run."""
        self.close()
        self._metrics.some_rank_stood_in = False
        self._own_collectives.begin()
        if trainer.world_size > 1:
            self._metrics.before_sync = self._before_metric
            self._run.enter_context(self._metrics.installed())
            self._run.enter_context(counting_for_all_ranks(trainer, self))
            self._run.enter_context(self._watch.installed())
            self._run.enter_context(logging_through(trainer, module))
            self._run.enter_context(weighted_means(trainer, module, partial(self._weight_of_mean, trainer)))
        self._run.enter_context(listening_first(trainer, module, self))

    def _weight_of_mean(self, trainer: Trainer) -> float:
        """Return the weight of the mean over this rank's batch, or over its current micro-batch."""
        strategy: Any = trainer.strategy
        part: float = strategy.micro_batches.part_of_rank
        return self.weight * part

    def close(self) -> None:
        """End whatever has begun, at the end of a run or after an error."""
        self.end_batch()
        self._run.close()

    # ---- a run -----------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end_batch()  # a checkpoint that is saved now must not hold what a stand-in has changed

    # ---- an epoch --------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # DDP has just wrapped the module
        self._frozen = FrozenParameters(pl_module) if trainer.world_size > 1 and self.frozen_stay else None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs, self._is_first = 0, trainer.world_size > 1
        by_samples = self._train_data.means_over_samples and not is_compiled(pl_module)
        self._loss_terms = LossTerms() if by_samples and trainer.world_size > 1 else None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epochs == 1:
            warn_of_monitored(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch("train")
        if self._epochs == 1:
            warn_of_monitored(trainer)
        self._epochs += 1

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch("validation")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_epoch("test")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer, pl_module, "train")

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer, pl_module, "validation")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_epoch(trainer, pl_module, "test")

    def _begin_epoch(self, stage: str) -> None:
        self.end_batch()
        self._stage = stage
        self._samples.pop(stage, None)

    def _end_epoch(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.end_batch()
        self._stage = stage
        samples = self.samples_of_ranks()
        if len(set(samples)) > 1:
            self._batch.enter_context(self._watch.watching(partial(self._own_collectives.in_evaluation, samples)))
            self.epoch_end = EpochEnd(module, samples, trainer.global_rank, self._warned)
            self._batch.enter_context(self.epoch_end.weighted())
            self._batch.enter_context(overridden_method(module, f"on_{stage}_epoch_end", self._last))

    # ---- a batch ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._train_data.begin_step()
        self._begin_batch(trainer, pl_module, "train", self._train_data.part, self._train_data.samples_in_batch)
        if batch_idx == 0 and self._frozen is not None:
            self._frozen.warn()
        if self._loss_terms is not None and self.part is not None:
            self._batch.enter_context(self._loss_terms.observed())

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss_terms is not None and self.part is not None:
            self._loss_terms.warn(self.part.samples)
            self._loss_terms = None
        if self._is_first and self.part is not None:
            self._is_first = False
            with self.ignoring():
                self._own_collectives.after_first_batch()

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._begin_evaluation_batch(trainer, pl_module, "validation", dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._begin_evaluation_batch(trainer, pl_module, "test", dataloader_idx)

    def _begin_evaluation_batch(self, trainer: Trainer, module: LightningModule, stage: str, loader: int) -> None:
        part = self._eval_data.part_of_step(loader)
        self._begin_batch(trainer, module, stage, part, self._eval_data.samples_in_batch)

    def _begin_batch(
        self, trainer: Trainer, module: LightningModule, stage: str, part: BatchSlice | None, samples: int | None
    ) -> None:
        self.end_batch()
        if part is None:
            return
        self._stage = stage
        of_ranks = part.plan.samples
        so_far = self._samples.get(stage, (0,) * len(of_ranks))
        self._samples[stage] = tuple(n + new for n, new in zip(so_far, of_ranks, strict=True))
        self._metrics.some_rank_stood_in |= 0 in of_ranks
        self.part, self.weight = part, part.loss_weight
        if samples is not None:
            set_batch_size(trainer, max(samples, 1))
        self._batch.enter_context(self.watching())
        self._batch.enter_context(overridden_method(module, f"on_{stage}_batch_end", self._last))
        if part.samples == 0:
            self._metrics.stand_in = self._batch.enter_context(stand_in(module))

    def watching(self) -> AbstractContextManager[None]:
        """Watch the collectives that the user's code makes in this context."""
        return self._watch.watching(None if self.part is None else self._note_collective)

    def ignoring(self) -> AbstractContextManager[None]:
        """Let all collectives of this context pass."""
        return self._watch.watching(None)

    def _note_collective(self, collective: Collective) -> None:
        assert self.part is not None
        plan = self.part.plan
        if self._stage == "train":
            self._before_collective(collective.name)
        if not collective.moves_tensors:
            return
        if self._stage == "train":
            self._own_collectives.in_training(plan, collective)
        else:
            self._own_collectives.in_evaluation(plan.samples, collective)

    def _before_metric(self) -> None:
        if self.part is not None and self._stage == "train":
            self._before_collective("Metric.compute")

    def note_reduce(self, tensor: Any, operation: str) -> None:
        """Note that a tensor is reduced over ranks through the strategy."""
        if self.epoch_end is not None:
            self.epoch_end.note_reduce(operation)
        elif operation not in ("mean", "avg") and tensor.requires_grad and not called_by_library(1):
            self.note_collective("reduce", tensor)

    def note_collective(self, name: str, tensor: Any) -> None:
        """Note that the user's code calls a collective of the strategy with a tensor of one shape on all ranks."""
        if self.part is not None:
            self._note_collective(
                Collective(name, calling_line(), dist.group.WORLD, (tensor,), needs_one_shape=True, shapes_agree=True)
            )

    def _last(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the last hook of a scope, and end the scope."""
        try:
            return hook(*args, **kwargs)
        finally:
            self.end_batch()

    def end_batch(self) -> None:
        """End the scope, and undo what a stand-in has changed."""
        self.part, self.weight, self.epoch_end, self._metrics.stand_in = None, 1.0, None, None
        self._batch.close()
