"""Update metrics on the last stage only, and make their values available on all ranks.

torchmetrics would add up the states of all ranks.  For that every rank has to take part and to have a state of the same
form, but a metric that was never updated lacks, for example, its list of scores.  So the last stage computes the value
and broadcasts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_hetero.distributed.collectives import broadcast_from

__all__ = ["PipelineMetrics"]


class PipelineMetrics:
    """Wraps the metrics of a module so that the last stage computes them for all ranks.

    Args:
        module: The user's LightningModule.
        last_rank: Rank of the last stage.
        is_last: Whether this rank is ``last_rank``.

    Attributes:
        names: Name of each metric in the module, by its identity.
        is_alone: Whether this rank runs code that the others do not run, so that no collective may be used.
    """

    def __init__(self, module: LightningModule, last_rank: int, *, is_last: bool) -> None:
        self._module = module
        self._last_rank = last_rank
        self._is_last = is_last
        self.is_alone = False
        self._changed: list[tuple[Metric, Callable[..., Any], Any]] = []
        self.names: dict[int, str] = {}
        for name, metric in module.named_modules():
            if not isinstance(metric, Metric):
                continue
            self.names[id(metric)] = name
            self._changed.append((metric, metric.compute, metric.distributed_available_fn))
            metric.compute = self._broadcasting(metric.compute)  # type: ignore[method-assign]
            metric.distributed_available_fn = _never

    def restore(self) -> None:
        """Restore the metrics to their original state."""
        for metric, compute, distributed_available in self._changed:
            metric.compute = compute  # type: ignore[method-assign]
            metric.distributed_available_fn = distributed_available
        self._changed = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute metrics on this rank only in this context, which other ranks do not enter, and broadcast nothing."""
        before, self.is_alone = self.is_alone, True
        try:
            yield
        finally:
            self.is_alone = before

    def _broadcasting(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def compute_and_broadcast(*args: Any, **kwargs: Any) -> Any:
            if self.is_alone:
                return compute(*args, **kwargs)
            value = None
            if self._is_last:
                with self.alone():  # a metric that is composed of others computes those
                    value = compute(*args, **kwargs)
            received = broadcast_from(move_data_to_device(value, torch.device("cpu")), self._last_rank)
            return value if self._is_last else move_data_to_device(received, self._module.device)

        return compute_and_broadcast


def _never() -> bool:
    return False
