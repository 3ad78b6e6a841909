"""Undo what a step changes in metrics and in logged values.

What is private in torchmetrics is used here only. tests/plugin/step/test_metrics.py fails if it changes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_hetero.plugin.common.lightning_private import logged_values
from lightning_hetero.plugin.common.overridden import overridden_on_class

__all__ = [
    "GATHER_STATES",
    "DiscardedUpdates",
    "counted_in_part",
    "discarded_metrics",
    "forward_or_nan",
    "is_forward",
    "kept_metrics",
    "patched_reductions",
    "reductions_of",
    "set_step_value",
    "step_value",
    "updates_of",
]

# The method in which a metric gathers its states. `sync` is public, but comes before classes that gather by themselves.
GATHER_STATES = "_sync_dist"
# What every module has; a step changes none of it.
_OF_MODULES = frozenset(vars(nn.Module()))
_LARGEST_CONTAINER = 1000  # what has more entries holds data


class DiscardedUpdates:
    """The states of all metrics before a step changed them, with which the changes are undone.

    A user may keep metrics anywhere: in the module, in a list, in a callback. They are therefore not searched for. A
    metric that is updated, reset or computed sets one of its attributes first, and at that moment its state is saved.
    The same holds for a collection, which decides on its first update which of its metrics share their states.
    """

    def __init__(self) -> None:
        self._saved: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._made: dict[int, nn.Module] = {}

    @property
    def changed(self) -> list[nn.Module]:
        """The metrics and collections that have changed, without those that were constructed meanwhile."""
        return [changed for key, (changed, _) in self._saved.items() if key not in self._made]

    def state_before(self, metric: Metric) -> dict[str, Any]:
        """Return the attributes of ``metric`` before the step; the current ones if the step has not changed it."""
        saved = self._saved.get(id(metric))
        return _attributes(metric) if saved is None else saved[1]

    def save(self, changing: nn.Module) -> None:
        """Save the state of a metric or a collection that is about to change, unless it is saved already."""
        set_last = "_update_count" if isinstance(changing, Metric) else "_groups_checked"  # when it is constructed
        if set_last not in vars(changing):
            self._made[id(changing)] = changing
        elif id(changing) not in self._saved:
            self._saved[id(changing)] = (changing, _attributes(changing))

    def restore(self) -> None:
        """Undo all changes."""
        for changed, state in self._saved.values():
            if isinstance(changed, Metric):
                # a metric that was constructed in the step has states that were not saved
                state = copy.deepcopy({k: v for k, v in changed._defaults.items() if k not in state}) | state  # noqa: PLW2901
            _restore(changed, state)

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Save the state of whatever changes in this context before it changes."""
        with _before_setting(Metric, self.save), _before_setting(MetricCollection, self.save):
            yield


@contextmanager
def _before_setting(cls: type[nn.Module], notice: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call ``notice`` with each object of ``cls`` of which an attribute is about to be set.

    No public hook is called before an update: metrics wrap their ``update`` on construction.
    """
    set_attribute: Any = cls.__setattr__

    def noticing(self: nn.Module, name: str, value: Any) -> None:
        notice(self)
        set_attribute(self, name, value)

    with overridden_on_class(cls, "__setattr__", noticing):
        yield


@contextmanager
def discarded_metrics(module: LightningModule) -> Iterator[DiscardedUpdates]:
    """Undo what the code in this context adds to metrics, wherever they are, and to the module's logged values."""
    logged: dict[str, Metric] = logged_values(module.trainer)
    saved = [(metric, _state_of_logged(metric)) for metric in logged.values()]
    known = set(logged)
    updates = DiscardedUpdates()
    try:
        with updates.noticing():
            yield updates
    finally:
        updates.restore()
        for metric, state in saved:
            _restore(metric, state | _reduced_in_step(metric))
        for key in set(logged) - known:
            # created by the discarded step, and on the peers too: keep it empty, because the ranks synchronise it
            metric = logged[key]
            _restore(metric, copy.deepcopy(metric._defaults) | _reduced_in_step(metric))


def _reduced_in_step(metric: Metric) -> dict[str, Any]:
    """Return the value that Lightning logs for the step if it is reduced over all ranks; this rank added nothing."""
    meta: Any = getattr(metric, "meta", None)
    return {"_forward_cache": step_value(metric)} if meta is not None and meta.on_step and meta.sync.should else {}


def _attributes(changing: nn.Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(changing).items() if name not in _OF_MODULES}


def _state_of_logged(metric: Metric) -> dict[str, Any]:
    """Copy what an update changes in one of Lightning's own metrics, which hold what is logged."""
    kept = (*metric._defaults, "_update_count", "_forward_cache")
    return {name: _copied(metric.__dict__[name]) for name in kept if name in metric.__dict__}


def _copied(value: Any) -> Any:
    """Copy what an update may change in place: it adds to tensors, and appends to lists."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)((key, _copied(entry)) for key, entry in value.items())
    return copy.copy(value) if isinstance(value, list | deque | set) else value


def _restore(changed: nn.Module, state: dict[str, Any]) -> None:
    for name, value in state.items():
        current = changed.__dict__.get(name)
        if isinstance(value, Tensor) and isinstance(current, Tensor):
            # an update may promote a state's type; if it did so on the peers, this rank must follow
            value = value.to(current)  # noqa: PLW2901
        changed.__dict__[name] = value
    if isinstance(changed, Metric):
        changed._computed = None  # the peers have computed nothing since their update, and all ranks compute together


# ---- synchronisation -------------------------------------------------------------------------------------------------


def updates_of(metric: Metric, state: Mapping[str, Any]) -> int:
    """Return how often a metric was updated, according to its saved ``state`` if that tells."""
    return int(state.get("_update_count", metric._update_count))


def is_forward(metric: Metric) -> bool:
    """Return whether a metric computes the value of one batch, in which case its states are those of the batch."""
    return not metric._should_unsync


def reductions_of(metric: Metric) -> dict[str, Any]:
    """Return how the states of a metric are combined over ranks, by name of the state."""
    return metric._reductions


@contextmanager
def patched_reductions(metric: Metric, reductions: Mapping[str, Any]) -> Iterator[None]:
    """Combine some states of a metric in another way in this context."""
    before = metric._reductions
    metric._reductions = {**before, **reductions}
    try:
        yield
    finally:
        metric._reductions = before


# ---- the value of a step ---------------------------------------------------------------------------------------------


def step_value(metric: Metric) -> Any:
    """Return a metric's value of the latest step, which Lightning logs for that step."""
    return metric._forward_cache


def set_step_value(metric: Metric, value: Any) -> None:
    """Make Lightning log ``value`` as the metric's value of the step."""
    metric._forward_cache = value


def forward_or_nan(metric: Metric, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a metric with a part of a batch, for which alone it may have no value; return NaN then.

    A metric that raises an error in ``forward`` loses what it has collected, so that is restored.

    Args:
        metric: The metric.
        forward: Its method.
        *args: Positional arguments.
        **kwargs: Keyword arguments.
    """
    in_place = metric.full_state_update is not False or metric.dist_sync_on_step
    before = {
        name: _copied(value) if in_place or not isinstance(value, Tensor) else value
        for name, value in vars(metric).items()
        if name not in _OF_MODULES
    }
    try:
        return forward(*args, **kwargs)
    except (ValueError, RuntimeError, ZeroDivisionError):
        vars(metric).update(before)
        metric.update(*args, **kwargs)  # raises the error if it is not about the value
        return torch.full((), float("nan"), device=metric.device)


def kept_metrics(value: Any) -> Iterator[Metric]:
    """Yield the metrics in a user's containers and in the modules that these hold.

    Args:
        value: A list, a tuple, or a dict, for example the attributes of an object.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        container = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for entry in container.values() if isinstance(container, dict) else container:
            if isinstance(entry, nn.Module):
                yield from (part for part in entry.modules() if isinstance(part, Metric))
            elif type(entry) in (list, tuple, dict) and len(entry) <= _LARGEST_CONTAINER:
                waiting.append(entry)


def counted_in_part(part: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of an update of a ``MeanMetric``, such that it counts one number only in part.

    One number without a weight, such as a loss, stands for a batch. Under DDP and on one device batches count alike.

    Args:
        part: Part in which such a number counts.
        args: Positional arguments of the update.
        kwargs: Its keyword arguments.
    """
    given = (*args, *kwargs.values())
    if part == 1 or len(given) != 1 or np.ndim(value := given[0]) != 0:
        return kwargs
    if not isinstance(value, Tensor):
        return {**kwargs, "weight": part}
    # a number would be copied to the device, for which the host waits
    dtype = torch.float32 if value.device.type == "mps" else torch.float64  # MPS has no other
    return {**kwargs, "weight": torch.full((), part, dtype=dtype, device=value.device)}
