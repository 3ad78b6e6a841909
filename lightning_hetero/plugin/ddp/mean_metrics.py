"""Let a metric that a step gives one number for its batch count what it stands for.

Under DDP each rank's batch is as large, so ``MeanMetric`` counts each as one. Here it counts a rank's mean with the
rank's part of the global batch, as a logged value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import MeanMetric, Metric

from lightning_hetero.plugin.common.overridden import overridden_method
from lightning_hetero.plugin.step.whole_batch import is_one_number

__all__ = ["weighted_means"]

_LARGEST_CONTAINER = 1000  # what has more entries holds data


@contextmanager
def weighted_means(trainer: Trainer, module: LightningModule, weight_of: Callable[[], float]) -> Iterator[None]:
    """Weight the numbers that a step or a hook of a batch gives to the means of the module and its callbacks.

    Args:
        trainer: The Trainer.
        module: The user's LightningModule.
        weight_of: Function that returns the weight of this rank's mean in the mean over ranks.
    """

    def update(run: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if is_one_number(args, kwargs) and (weight := weight_of()) != 1:
            kwargs = {**kwargs, "weight": weight}
        run(*args, **kwargs)

    parts: list[Any] = list(module.modules())
    kept = [vars(owner) for owner in (module, *trainer.callbacks)]  # type: ignore[attr-defined]
    found = {id(m): m for m in (*parts, *_kept_in(kept)) if isinstance(m, MeanMetric)}
    with ExitStack() as stack:
        for metric in found.values():
            if type(metric).update is MeanMetric.update:
                stack.enter_context(overridden_method(metric, "update", update))
        yield


def _kept_in(value: Any) -> Iterator[Metric]:
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, Metric):
            yield from (part for part in entry.modules() if isinstance(part, Metric))
        elif type(entry) in (list, tuple, dict) and len(entry) <= _LARGEST_CONTAINER:
            yield from _kept_in(entry)
