"""The callback that notes who computes what when in a step of a pipeline."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_hetero.balance.pipeline_simulation import Timeline
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin import arguments
from lightning_hetero.plugin.pipeline_strategy import HeteroPipelineStrategy

__all__ = ["PipelineRecorder"]


class PipelineRecorder(Callback):
    """Records one training step of ``hetero_pipeline``: which stage computes which micro-batch when.

    Args:
        step: The training step to record, from 0 on. The first ones prepare the stages.

    Raises:
        ConfigurationError: an argument breaks its rule.

    Attributes:
        timeline: What was recorded, on every rank; None before. Seconds count from the start of the step.
    """

    def __init__(self, step: int = 2) -> None:
        arguments.check_at_least("step", step, 0)
        super().__init__()
        self.step = step
        self.timeline: Timeline | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._strategy_of(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            self._strategy_of(trainer).record_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx == self.step:
            self.timeline = self._strategy_of(trainer).recorded_step()

    @staticmethod
    def _strategy_of(trainer: Trainer) -> HeteroPipelineStrategy:
        strategy = trainer.strategy
        if not isinstance(strategy, HeteroPipelineStrategy):
            raise UnsupportedFeatureError(
                f"`PipelineRecorder` needs stages to record, got {type(strategy).__name__}."
                f' Use Trainer(strategy="hetero_pipeline") or remove the callback.'
            )
        return strategy
