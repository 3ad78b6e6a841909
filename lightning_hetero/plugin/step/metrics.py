"""Take back what a step adds to metrics and to what is logged."""

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

# What torchmetrics keeps of an update besides the states; like `_defaults`, the states' names and initial values, it is
# private. tests/plugin/step/test_metrics.py fails where it changes.
_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def discarded_metrics(module: LightningModule) -> Iterator[None]:
    """Take back what the step in this context adds to the module's metrics and to what it logs."""
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
            # created by the discarded step, and registered on the peers too: empty, but there to be synchronised
            metric = logged[key]
            _restore(metric, copy.deepcopy(metric._defaults) | _reduced_in_step(metric))


def _reduced_in_step(metric: Metric) -> dict[str, Any]:
    """Return what Lightning logs for the step, where that is of all ranks: this one added nothing to it."""
    meta: Any = getattr(metric, "meta", None)
    return {"_forward_cache": step_value(metric)} if meta is not None and meta.on_step and meta.sync.should else {}


def _state(metric: Metric) -> dict[str, Any]:
    """Copy what an update changes: tensors may be changed in place, lists are appended to."""
    kept = {name: metric.__dict__[name] for name in (*metric._defaults, *_BOOKKEEPING) if name in metric.__dict__}
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.copy(value) for name, value in kept.items()
    }


def _restore(metric: Metric, state: dict[str, Any]) -> None:
    for name, value in state.items():
        current = metric.__dict__.get(name)
        if isinstance(value, torch.Tensor) and isinstance(current, torch.Tensor):
            # an update may promote a state; where it did so on the peers, this rank has to follow
            value = value.to(current)  # noqa: PLW2901
        metric.__dict__[name] = value


def step_value(metric: Metric) -> Any:
    """Return the value of a metric's latest step, which Lightning logs for the step."""
    return metric._forward_cache


def set_step_value(metric: Metric, value: Any) -> None:
    """Have Lightning log ``value`` for the step."""
    metric._forward_cache = value
