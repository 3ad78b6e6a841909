"""Tell all ranks what a step returns, logs and changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_hetero.distributed.pipeline.shared_value import share
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.pipeline.hooks.traces import StepTraces
from lightning_hetero.plugin.pipeline.metrics import MetricOf, PipelineMetrics, hosted, portable
from lightning_hetero.plugin.step.metrics import set_step_value

__all__ = ["Telling", "named_arguments"]


@dataclass(frozen=True)
class _Refused:
    """What the leader tells the others in the place of an output if they must all raise an error."""

    message: str


class Telling:
    """Tells the ranks that have not run a step as a whole what comes of it.

    Args:
        module: The user's LightningModule.
        metrics: The module's metrics.
        traces: What the steps change in the module and its Trainer.
        leader: Rank that runs steps as a whole, the last one of the first replica.
        leads: Whether this rank is ``leader``.
    """

    def __init__(
        self, module: LightningModule, metrics: PipelineMetrics, traces: StepTraces, leader: int, *, leads: bool
    ) -> None:
        self._module = module
        self._metrics = metrics
        self._traces = traces
        self._leader = leader
        self._leads = leads

    def tell(self, returned: Any, calls: Sequence[dict[str, Any]]) -> Any:
        """Tell every rank the output of a step and what it has logged; log that here."""
        told = [{**call, "value": portable(call["value"], self._metrics.names)} for call in calls]
        self._shared((returned, told, self._traces.found()))
        self._log(calls)
        return returned

    def refuse(self, message: str) -> None:
        """Raise an error on every rank in the place of telling an output."""
        self._shared((_Refused(message), [], None))
        raise UnsupportedFeatureError(message)

    def hear(self) -> Any:
        """Return the output of the step that the leader tells, and log what it has logged."""
        returned, calls, traces = self._shared(None)
        if isinstance(returned, _Refused):
            raise UnsupportedFeatureError(returned.message)
        self._traces.take(traces)
        self._log_heard(calls)
        return move_data_to_device(returned, self._module.device)

    @contextmanager
    def recorded_log(self) -> Iterator[Any]:
        """Record what a hook logs in this context, which every rank runs.

        Yields:
            Function that logs on every rank what the leader has recorded, given a function that returns the message of
            the leader on every rank.
        """
        calls: list[dict[str, Any]] = []

        def pass_on(exchange: Any) -> None:
            told = [{**call, "value": hosted(portable(call["value"], self._metrics.names))} for call in calls]
            heard = exchange(told)
            self._log_heard(heard) if not self._leads else self._log(calls)

        with self.recorded(calls):
            yield pass_on

    def recorded(self, calls: list[dict[str, Any]]) -> AbstractContextManager[None]:
        """Record what the module logs in a context."""
        return overridden(self._module, "log", lambda *given, **named: calls.append(named_arguments(given, named)))

    def _log(self, calls: Sequence[dict[str, Any]]) -> None:
        for call in calls:
            self._module.log(**call)

    def _log_heard(self, calls: Sequence[dict[str, Any]]) -> None:
        for call in calls:
            if not call.get("rank_zero_only"):
                self._module.log(**{**call, "value": self._local(call["value"])})

    def _shared(self, value: Any) -> Any:
        return share(value, self._leader, self._module.device)

    def _local(self, value: Any) -> Any:
        if isinstance(value, MetricOf):
            metric: Any = self._module.get_submodule(value.name)
            set_step_value(metric, move_data_to_device(value.in_step, self._module.device))
            return metric
        if isinstance(value, Mapping):
            return {key: self._local(entry) for key, entry in value.items()}
        return value.to(self._module.device) if isinstance(value, Tensor) else value


def named_arguments(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a ``self.log`` call by name; all ranks log the same value, so nothing is reduced."""
    arguments = dict(inspect.signature(LightningModule.log).bind(None, *given, **named).arguments)
    del arguments["self"]
    return {**arguments, "sync_dist": False}
