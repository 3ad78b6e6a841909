"""Values of metrics for a whole batch, of which they see one micro-batch after another.

A metric that is called returns its value for what it is given. On one device that is the batch. The mean of its values
for the micro-batches is another number for most metrics, so a copy of the metric sees the whole batch.

A ``MeanMetric`` that a step gives one number, such as its loss, counts the batch once. Of a micro-batch it counts the
part of the samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lightning_hetero.distributed.pipeline.structure import tensors_of
from lightning_hetero.plugin.common.overridden import overridden_method
from lightning_hetero.plugin.step.metrics import counted_in_part, forward_or_nan, set_step_value

__all__ = ["BatchValues"]


class BatchValues:
    """The values of some metrics for the batch of a step.

    Args:
        metrics: The metrics.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        # what overrides `forward` means something else by a call
        self._metrics = [metric for metric in metrics if type(metric).forward is Metric.forward]
        self._means = [metric for metric in metrics if type(metric).update is MeanMetric.update]
        self._part = 1.0
        self._copies: dict[tuple[int, int], Metric] = {}
        self._calls: dict[int, int] = {}
        self._used: dict[tuple[int, int], Metric] = {}
        self._returned: dict[int, tuple[Tensor, tuple[int, int], int]] = {}

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Collect the values of a step in this context."""
        self._used, self._returned = {}, {}
        with ExitStack() as stack:
            for metric in self._metrics:
                stack.enter_context(overridden_method(metric, "forward", partial(self._forward, metric)))
            for metric in self._means:
                stack.enter_context(overridden_method(metric, "update", self._update))
            yield

    def next_micro_batch(self, part: float) -> None:
        """Note that the step runs for another micro-batch now, which has a ``part`` of the batch's samples."""
        self._calls = {}
        self._part = part

    def finish(self) -> None:
        """Make the values of the batch those that Lightning logs for the step."""
        for key, metric in self._used.items():
            set_step_value(metric, self._value(key))
        self._used = {}  # the next step may be one of a single micro-batch

    def of(self, value: Any) -> Callable[[], Any] | None:
        """Return a function for the value for the batch, if ``value`` is one that a metric has returned."""
        tensor, key, number = self._returned.get(id(value), (None, (0, 0), 0))
        if tensor is None or tensor is not value:
            return None
        return lambda: tensors_of(self._value(key))[number]

    def _forward(self, metric: Metric, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if type(metric).update is MeanMetric.update:
            kwargs = counted_in_part(self._part, args, kwargs)
        call = self._calls.get(id(metric), 0)
        self._calls[id(metric)] = call + 1
        key = id(metric), call
        whole = self._copy(metric, key)
        if key not in self._used:
            whole.reset()
            self._used[key] = metric
        whole.update(*args, **kwargs)
        returned = forward_or_nan(metric, forward, *args, **kwargs)
        for number, tensor in enumerate(tensors_of(returned)):
            self._returned[id(tensor)] = tensor, key, number
        return returned

    def _update(self, update: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        update(*args, **counted_in_part(self._part, args, kwargs))

    def _copy(self, metric: Metric, key: tuple[int, int]) -> Metric:
        if key not in self._copies:
            # what a graph has computed cannot be copied, and counts for nothing here
            kept = [tensor for part in metric.modules() for tensor in tensors_of(list(vars(part).values()))]
            made = copy.deepcopy(metric, {id(tensor): tensor.detach() for tensor in kept if not tensor.is_leaf})
            for part in made.modules():
                part.__dict__.pop("forward", None)
            self._copies[key] = made
        return self._copies[key]

    def _value(self, key: tuple[int, int]) -> Any:
        with torch.no_grad():
            return self._copies[key].compute()
