"""Let a mean to which a step gives one number for its batch count what that stands for.

Under DDP each rank's batch is as large, so ``MeanMetric`` counts each number as one. Here it counts that of a rank with
the rank's part of the global batch, as a logged value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import MeanMetric

from lightning_hetero.plugin.common.overridden import overridden_method
from lightning_hetero.plugin.step.metrics import counted_in_part, kept_metrics

__all__ = ["weighted_means"]


@contextmanager
def weighted_means(trainer: Trainer, module: LightningModule, weight_of: Callable[[], float]) -> Iterator[None]:
    """Weight the numbers that steps and hooks of a batch give to the means of the module and its callbacks.

    Args:
        trainer: The Trainer.
        module: The user's LightningModule.
        weight_of: Function that returns the weight of this rank's mean in the mean over ranks.
    """

    def update(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        run(*args, **counted_in_part(weight_of(), args, kwargs))

    kept = [[module], *(vars(owner) for owner in (module, *trainer.callbacks))]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for metric in {id(found): found for found in kept_metrics(kept)}.values():
            if type(metric).update is MeanMetric.update:
                stack.enter_context(overridden_method(metric, "update", update))
        yield
