"""Metrics that are updated on the last stage only, and have their value on all ranks.

torchmetrics would add up the states of all ranks, which needs every rank to take part and to have states of the same
kind: one that was never updated has no list of scores, say.  Here the last stage computes, and tells.
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
    """The metrics of a module.

    Args:
        module: the user's.
        last_rank: where steps are finished.
        is_last: whether that is this rank.

    Attributes:
        names: of the metrics in the module, by their identity.
        is_alone: whether this rank runs what others do not, so that nobody would answer it.
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
            metric.compute = self._told(metric.compute)  # type: ignore[method-assign]
            metric.distributed_available_fn = _never

    def restore(self) -> None:
        """Leave the metrics as they were found."""
        for metric, compute, distributed_available in self._changed:
            metric.compute = compute  # type: ignore[method-assign]
            metric.distributed_available_fn = distributed_available
        self._changed = []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In this context one rank runs what others do not: what it computes is told to nobody."""
        before, self.is_alone = self.is_alone, True
        try:
            yield
        finally:
            self.is_alone = before

    def _told(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def told(*args: Any, **kwargs: Any) -> Any:
            if self.is_alone:
                return compute(*args, **kwargs)
            value = None
            if self._is_last:
                with self.alone():  # metrics made of others compute those
                    value = compute(*args, **kwargs)
            heard = broadcast_from(move_data_to_device(value, torch.device("cpu")), self._last_rank)
            return value if self._is_last else move_data_to_device(heard, self._module.device)

        return told


def _never() -> bool:
    return False
