"""Record what a training step does on the last rank of one replica, and do it again on that of the first one.

The first replica's last rank logs, and it has the metrics.  What another replica's last rank logs, and what it gives to
metrics, is repeated there in the order of the samples, as if all micro-batches had been run there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_hetero.distributed.pipeline.shared_value import receive, send
from lightning_hetero.distributed.pipeline.structure import mapped, tensors_of
from lightning_hetero.plugin.common.overridden import overridden, overridden_method
from lightning_hetero.plugin.pipeline.metrics import PipelineMetrics
from lightning_hetero.plugin.step.log_capture import LogCapture
from lightning_hetero.plugin.step.metrics import discarded_metrics, forward_or_nan

__all__ = ["StepRecord", "StepRecorder", "repeat"]


@dataclass(frozen=True)
class _MetricCall:
    """A call of a metric, or of a collection of them.

    Attributes:
        number: Number of the metric.
        method: "forward" or "update".
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    number: int
    method: str
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class _Logged:
    """A call of ``self.log``."""

    name: str
    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Returned:
    """Stands for a tensor that a metric has returned: the number of its call, and of the tensor in what it returned."""

    call: int
    tensor: int


@dataclass(frozen=True)
class _Itself:
    """Stands for a metric of a given number."""

    number: int


@dataclass
class StepRecord:
    """What the micro-batches of one replica have come to in a step.

    Attributes:
        outputs: Output of each micro-batch.
        events: What each micro-batch has logged and given to metrics, in this order.
        losses: Names of logged values that are the loss.
        settings: Settings of the Trainer and its optimisers after the step; see ``StepTraces.settings``.
        refusal: Why the step cannot be trained with replicas; None if it can.
    """

    outputs: list[Any] = field(default_factory=list)
    events: list[list[_MetricCall | _Logged]] = field(default_factory=list)
    losses: set[str] = field(default_factory=set)
    settings: Any = None
    refusal: str | None = None

    @classmethod
    def received(cls, source: int, device: torch.device) -> StepRecord:
        """Return the record of another replica's last rank, which must call :meth:`sent`."""
        found = receive(source, device)
        assert isinstance(found, cls)
        return found

    def sent(self, target: int, device: torch.device) -> None:
        """Send the record to the last rank of the first replica, or why there is none."""
        try:
            send(self if self.refusal is None else StepRecord(refusal=self.refusal), target, device)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            refusal = (
                f"`hetero_pipeline` with `replicas` sends what a training step returns and gives to metrics to rank 0,"
                f" and cannot send this: {error}. Return tensors and plain values, or use `replicas=1`."
            )
            send(StepRecord(refusal=refusal), target, device)


class StepRecorder:
    """Records the steps of a rank that computes the losses of a replica other than the first.

    Args:
        module: The user's LightningModule.
        metrics: The module's metrics.
        log: Takes part in each call of ``self.log``, to find out what is the loss.
    """

    def __init__(self, module: LightningModule, metrics: PipelineMetrics, log: LogCapture) -> None:
        self._module = module
        self._objects = metrics.objects
        self._log_capture = log
        self._depth = 0
        self._returned: dict[int, tuple[Tensor, _Returned]] = {}
        self.record = StepRecord()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what a step does in this context, and undo what it does to metrics."""
        numbers = {id(one): number for number, one in enumerate(self._objects)}
        with ExitStack() as stack:
            stack.enter_context(overridden(self._module, "log", self._log))
            for one in self._objects:
                for name in ("forward", "update"):
                    stack.enter_context(overridden_method(one, name, partial(self._call, one, numbers[id(one)], name)))
                for name in ("compute", "reset"):
                    stack.enter_context(overridden_method(one, name, partial(self._call_refused, one, name)))
            # ends first, since it restores the attributes that there were in this context
            updates = stack.enter_context(discarded_metrics(self._module))
            yield
            known = {id(part) for one in self._objects for part in one.modules()}
            unknown = [changed for changed in updates.changed if id(changed) not in known]
        if unknown:
            self.refuse(_not_of_module(unknown[0]))

    def next_micro_batch(self) -> None:
        """Note that the step runs for another micro-batch now."""
        self.record.events.append([])
        self._returned = {}

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self._log_capture(name, value, *args, **kwargs)
        kept = mapped(value, self._portable)
        self.record.events[-1].append(_Logged(name, kept, _copies(args), _copies(kwargs)))

    def _portable(self, leaf: Any) -> Any:
        if isinstance(leaf, Metric):
            number = next((number for number, one in enumerate(self._objects) if one is leaf), None)
            if number is None:
                self.refuse(_not_of_module(leaf))
            return _Itself(number or 0)
        tensor, returned = self._returned.get(id(leaf), (None, None))
        return returned if tensor is leaf and returned is not None else _copy(leaf)

    def _call(self, one: Any, number: int, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "forward" and isinstance(one, Metric):  # a part of the batch may have no value
            method = partial(forward_or_nan, one, method)
        if self._depth:
            return method(*args, **kwargs)
        events = self.record.events[-1]
        events.append(_MetricCall(number, name, _copies(args), _copies(kwargs)))
        self._depth += 1
        try:
            returned = method(*args, **kwargs)
        finally:
            self._depth -= 1
        for position, tensor in enumerate(tensors_of(returned)):
            self._returned[id(tensor)] = tensor, _Returned(len(events) - 1, position)
        return returned

    def _call_refused(self, one: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._depth:
            self.refuse(
                f"`hetero_pipeline` with `replicas` cannot call `{name}` of {type(one).__name__} within a training"
                f" step, because each replica has seen other samples. Call it in a hook, or use `replicas=1`."
            )
        return method(*args, **kwargs)

    def refuse(self, message: str) -> None:
        """Refuse the step when it is over, on every rank."""
        self.record.refusal = self.record.refusal or message


def repeat(
    record: StepRecord,
    metrics: PipelineMetrics,
    log: LogCapture,
    sizes: Sequence[int],
    weights: Sequence[float],
    total: int,
) -> None:
    """Do again on this rank what a replica's last rank has recorded.

    Args:
        record: What it has recorded.
        metrics: The module's metrics.
        log: Takes the place of ``LightningModule.log`` in the step.
        sizes: Number of samples of each of its micro-batches.
        weights: Weight of the loss of each of them.
        total: Number of samples of the batch.
    """
    for events, size, weight in zip(record.events, sizes, weights, strict=True):
        log.samples, log.weight = size, weight
        metrics.batch_values.next_micro_batch(size / total)
        returned: dict[int, list[Tensor]] = {}

        def local(leaf: Any, returned: dict[int, list[Tensor]] = returned) -> Any:
            if isinstance(leaf, _Returned):
                return returned[leaf.call][leaf.tensor]
            return metrics.objects[leaf.number] if isinstance(leaf, _Itself) else leaf

        for number, event in enumerate(events):
            if isinstance(event, _Logged):
                log(event.name, mapped(event.value, local), *event.args, **event.kwargs)
                continue
            one: Any = metrics.objects[event.number]
            with metrics.alone():
                called = one if event.method == "forward" else one.update
                returned[number] = tensors_of(called(*event.args, **event.kwargs))
    log.note_losses(record.losses)


def _not_of_module(metric: Any) -> str:
    return (
        f"`hetero_pipeline` with `replicas` needs the metrics of a training step to be attributes of the module, got a"
        f" {type(metric).__name__} from elsewhere. Assign it to the module in `__init__`, or use `replicas=1`."
    )


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _copies(value: Any) -> Any:
    """Return a copy of arguments, whose tensors the step may still change."""
    return mapped(value, _copy)
