"""Undo what a step adds to metrics and to logged values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_hetero.plugin.common.lightning_private import logged_values

__all__ = ["discarded_metrics", "set_step_value", "step_value"]

# What torchmetrics keeps of an update besides the states. It is private, and so is `_defaults`, the states' names and
# initial values. tests/plugin/step/test_metrics.py fails if one of them changes.
_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def discarded_metrics(module: LightningModule) -> Iterator[None]:
    """Undo what the step in this context adds to the module's metrics and to its logged values."""
    logged: dict[str, Metric] = logged_values(module.trainer)
    saved = [(metric, _state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    saved += [(metric, _state(metric)) for metric in logged.values()]
    known = set(logged)
    try:
        yield
    finally:
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


def _state(metric: Metric) -> dict[str, Any]:
    """Copy what an update changes; it may change tensors in place, and appends to lists."""
    kept = {name: metric.__dict__[name] for name in (*metric._defaults, *_BOOKKEEPING) if name in metric.__dict__}
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value) for name, value in kept.items()
    }


def _restore(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state.items():
        current = metric.__dict__.get(name)
        if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor):
            # an update may promote a state's type; if it did so on the peers, this rank must follow
            value = value.to(current)  # noqa: PLW2901
        metric.__dict__[name] = value


def step_value(metric: Metric) -> Any:
    """Return a metric's value of the latest step, which Lightning logs for that step."""
    return metric._forward_cache


def set_step_value(metric: Metric, value: Any) -> None:
    """Make Lightning log ``value`` as the metric's value of the step."""
    metric._forward_cache = value
