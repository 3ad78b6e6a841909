"""Combine what a step logs for its micro-batches into what it would log for the whole mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_hetero.distributed.torch_private import node_before_ddp
from lightning_hetero.plugin.common.lightning_private import current_hook
from lightning_hetero.plugin.common.overridden import overridden, overridden_method

__all__ = ["LogCapture", "captured_log", "silent_log"]

# Position of `reduce_fx` among the arguments of `LightningModule.log` after the value.
_REDUCE_FX = 4


@dataclass(frozen=True)
class _Call:
    value: Any
    samples: int
    weight: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LogCapture:
    """Collects the values that ``self.log`` gets for each micro-batch, and logs one value for all of them.

    A value that is logged once is also synchronised over ranks once, however many micro-batches each rank has.

    Hooks of backward passes log too. Their values are kept until the backward pass of the last micro-batch, which the
    ranks make together: see :meth:`completed_in`.

    Args:
        log: The module's own ``log`` method.
        hook_of: Function that returns the name of the hook that is being called.
        batch_value_of: Function that returns a function for the value for the whole batch, given a value that is logged
            for a micro-batch; None if that is not known.

    Attributes:
        samples: Number of samples of the current micro-batch.
        weight: Weight of its loss in the sum over all micro-batches.
    """

    def __init__(
        self,
        log: Callable[..., None],
        hook_of: Callable[[], str | None] = lambda: None,
        batch_value_of: Callable[[Any], Callable[[], Any] | None] = lambda _: None,
    ) -> None:
        self._log = log
        self._batch_value_of = batch_value_of
        self._batch_values: dict[str, Callable[[], Any]] = {}
        self._hook_of = hook_of
        self._in_backward = False
        self._of_hooks: dict[tuple[str | None, str], list[_Call]] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._losses: set[str] = set()
        self._nodes: dict[str, Any] = {}
        self.samples = 0
        self.weight = 1.0

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Take the place of ``LightningModule.log``."""
        call = self._call(value, args, kwargs)
        if self._in_backward:
            self._of_hooks.setdefault((self._hook_of(), name), []).append(call)
            return
        if isinstance(value, Tensor) and value.grad_fn is not None:
            self._nodes[name] = value.grad_fn
        self._calls.setdefault(name, []).append(call)
        batch_value = self._batch_value_of(value)
        if batch_value is not None:
            self._batch_values[name] = batch_value

    def _call(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        return _Call(value.detach() if isinstance(value, Tensor) else value, self.samples, self.weight, args, kwargs)

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Keep what the hooks of a backward pass log in this context."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False

    @contextmanager
    def completed_in(self, module: LightningModule, loss: Tensor) -> Iterator[None]:
        """Complete what hooks log in this context, the last backward pass, with what they have logged before.

        It is logged at the same moment as on the ranks that have one micro-batch, because the ranks communicate.

        Args:
            module: The module whose ``log`` is called.
            loss: The loss of all micro-batches, which the hooks are given.
        """

        def complete(log: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            calls = self._of_hooks.pop((self._hook_of(), name), [])
            if isinstance(value, Tensor) and value.data_ptr() == loss.data_ptr():
                calls = []
            self._log_once(log, name, [*calls, self._call(value, args, kwargs)])

        with overridden_method(module, "log", complete) if self._of_hooks else nullcontext():
            yield

    def note_loss(self, loss: Tensor) -> None:
        """Note the ``loss`` of the current micro-batch: values that were logged from it add up as losses do."""
        node = node_before_ddp(loss)
        for name, calls in self._calls.items():
            value = calls[-1].value
            if (node is not None and self._nodes.get(name) is node) or (
                isinstance(value, Tensor) and value.data_ptr() == loss.data_ptr()
            ):
                self._losses.add(name)
        self._nodes.clear()  # they keep parts of the graph

    @property
    def losses(self) -> frozenset[str]:
        """The names of values that were logged from losses."""
        return frozenset(self._losses)

    def note_losses(self, names: Collection[str]) -> None:
        """Note that the values of these names add up as losses do."""
        self._losses |= {*names}

    def flush(self) -> None:
        """Log every value once."""
        for name, calls in self._calls.items():
            self._log_once(self._log, name, calls)

    def _log_once(self, log: Callable[..., None], name: str, calls: list[_Call]) -> None:
        args, kwargs = calls[-1].args, calls[-1].kwargs
        if kwargs.get("batch_size") is not None:
            kwargs = {**kwargs, "batch_size": sum(call.kwargs["batch_size"] for call in calls)}
        reduce_fx = args[_REDUCE_FX] if len(args) > _REDUCE_FX else kwargs.get("reduce_fx", "mean")
        known = self._batch_values.get(name)
        log(name, _combined(calls, reduce_fx, name in self._losses) if known is None else known(), *args, **kwargs)


def _combined(calls: list[_Call], reduce_fx: Any, is_loss: bool) -> Any:
    last = calls[-1].value
    if len(calls) == 1 or not all(isinstance(call.value, Tensor | int | float) for call in calls):
        return last  # a metric counts the samples of every micro-batch itself
    stacked = torch.stack([torch.as_tensor(call.value) for call in calls])
    if is_loss:
        return _sum(stacked, [call.weight for call in calls])
    if reduce_fx in ("mean", torch.mean):
        samples = sum(call.samples for call in calls)
        return _sum(stacked, [call.samples / samples for call in calls])
    if reduce_fx in ("sum", torch.sum, sum):
        return stacked.sum(0)
    if reduce_fx in ("max", torch.max, max):
        return stacked.amax(0)
    if reduce_fx in ("min", torch.min, min):
        return stacked.amin(0)
    return last


def _sum(values: Tensor, weights: list[float]) -> Tensor:
    """Return the weighted sum over the first dimension."""
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    # a loss without terms has weight 0 and may not be a number
    summands = (value * weight for value, weight in zip(values, weights, strict=True) if weight)
    return sum(summands, torch.zeros_like(values[0]))


@contextmanager
def captured_log(module: LightningModule) -> Iterator[LogCapture]:
    """Collect what ``module`` logs in this context, and log it at the end unless the context ends in an error."""
    log = LogCapture(module.log, partial(current_hook, module))
    with overridden(module, "log", log):
        yield log
    log.flush()


@contextmanager
def silent_log(module: LightningModule) -> Iterator[None]:
    """Log nothing in this context."""
    with overridden(module, "log", lambda *_, **__: None):
        yield
