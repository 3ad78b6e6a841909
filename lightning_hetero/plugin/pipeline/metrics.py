"""Update metrics on the last stage only, and make their values available on all ranks.

torchmetrics would add up the states of all ranks. For that, every rank must take part and have a state of the same
form, but a metric that was never updated lacks, for example, its list of scores. So the last stage computes the value
and broadcasts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.step.metrics import kept_metrics, step_value
from lightning_hetero.plugin.step.whole_batch import BatchValues

__all__ = ["MetricOf", "PipelineMetrics", "hosted", "portable"]


@dataclass(frozen=True)
class MetricOf:
    """A placeholder for a metric of the module, which is sent to another rank in its place.

    Attributes:
        name: Name of the metric in the module.
        in_step: Value of the metric in the latest step, known on the rank that updated it.
    """

    name: str
    in_step: Any


class PipelineMetrics:
    """Wraps the metrics of a module so that the last stage computes them for all ranks.

    Args:
        module: The user's LightningModule.
        last_rank: Rank of the last stage.
        is_last: Whether this rank is ``last_rank``.

    Attributes:
        names: Name of each metric in the module, by its identity.
        is_alone: Whether this rank runs code that the others do not run, so that no collective may be used.
        objects: All metrics and collections of them that are known, in the same order on all ranks.
        share: Function that returns the value of the last stage on every rank.
        batch_values: Values of the metrics for the batch of a step.
    """

    def __init__(self, module: LightningModule, last_rank: int, *, is_last: bool) -> None:
        self._module = module
        self._is_last = is_last
        self.is_alone = False
        self.share: Callable[[Any], Any] = partial(broadcast_from, source=last_rank)
        metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        self.names = {id(metric): name for name, metric in metrics.items()}
        self._overrides = ExitStack()
        every = list({id(m): m for m in (*metrics.values(), *kept_metrics(vars(module)))}.values())
        self.batch_values = BatchValues(every)
        self.objects: list[Any] = [*every, *(part for part in module.modules() if isinstance(part, MetricCollection))]
        for metric in every:
            for name, value in (("compute", self._broadcasting(metric.compute)), ("distributed_available_fn", _never)):
                self._overrides.enter_context(overridden(metric, name, value))

    def restore(self) -> None:
        """Restore the metrics to their original state."""
        self._overrides.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute metrics on this rank without broadcasting them; the other ranks do not enter this context."""
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
                with self.alone():  # a metric that is composed of others calls their `compute`
                    value = compute(*args, **kwargs)
            received = self.share(move_data_to_device(value, torch.device("cpu")))
            return value if self._is_last else move_data_to_device(received, self._module.device)

        return compute_and_broadcast


def portable(value: Any, names: dict[int, str]) -> Any:
    """Return a logged value with placeholders for metrics, given their names."""
    if isinstance(value, Metric):
        return MetricOf(names[id(value)], step_value(value))
    if isinstance(value, Mapping):
        return {key: portable(entry, names) for key, entry in value.items()}
    return value.detach() if isinstance(value, Tensor) else value


def hosted(value: Any) -> Any:
    """Return a portable value in the memory of the host."""
    if isinstance(value, MetricOf):
        return MetricOf(value.name, move_data_to_device(value.in_step, torch.device("cpu")))
    if isinstance(value, Mapping):
        return {key: hosted(entry) for key, entry in value.items()}
    return move_data_to_device(value, torch.device("cpu"))


def _never() -> bool:
    return False
