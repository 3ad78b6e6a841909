"""Run a step on a stand-in batch such that nothing of it remains.

Where a short last batch has no sample for a rank, the rank runs the step all the same, because its peers communicate in
it: in the backward pass, in synchronised batch normalisation, in logging.  What it contributes is taken back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

__all__ = ["discarded_metrics", "muted_gradients", "stand_in"]

# what torchmetrics keeps of an update beside the states
_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache")


@contextmanager
def muted_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Replace every gradient computed in this context by zeros before it is accumulated or communicated.

    Multiplying the loss by zero is not enough: zero times infinity is not a number.
    """
    handles: list[RemovableHandle] = [p.register_hook(torch.zeros_like) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stand_in(module: LightningModule) -> Iterator[None]:
    """Run a step on a stand-in: nothing that it adds to metrics, logs or synchronised statistics remains."""
    with discarded_metrics(module), _left_out_of_statistics(module):
        yield


@contextmanager
def _left_out_of_statistics(module: nn.Module) -> Iterator[None]:
    """Have synchronised batch normalisation count none of the samples in this context.

    The rank takes part in its communication with an empty batch, which torch provides for, and its own samples, whose
    results nobody sees, pass unchanged.
    """
    handles: list[RemovableHandle] = []
    passing: dict[nn.Module, torch.Tensor] = {}

    def empty_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        passing[layer] = inputs[0]
        return (inputs[0][:0],)

    def input_as_output(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        # the sum of nothing keeps the communication of the backward pass in the graph
        return passing.pop(layer) + output.sum()

    for layer in module.modules():
        if isinstance(layer, nn.SyncBatchNorm) and layer.training:
            handles += [layer.register_forward_pre_hook(empty_input), layer.register_forward_hook(input_as_output)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def discarded_metrics(module: LightningModule) -> Iterator[None]:
    """Take back what the step in this context adds to the module's metrics and to what it logs."""
    # `trainer._results` has no public counterpart: it is where `self.log` accumulates
    logged: dict[str, Metric] | None = module.trainer._results
    saved = [(metric, _state(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    saved += [(metric, _state(metric)) for metric in (logged or {}).values()]
    known = set(logged or {})
    try:
        yield
    finally:
        for metric, state in saved:
            _restore(metric, state | _reduced_in_step(metric))
        for key in set(logged or {}) - known:
            # created by the discarded step, and registered on the peers too: empty, but there to be synchronised
            metric = (logged or {})[key]
            _restore(metric, copy.deepcopy(metric._defaults) | _reduced_in_step(metric))


def _reduced_in_step(metric: Metric) -> dict[str, Any]:
    """Return what Lightning logs for the step, where that is of all ranks: this one added nothing to it."""
    meta: Any = getattr(metric, "meta", None)
    return {"_forward_cache": metric._forward_cache} if meta is not None and meta.on_step and meta.sync.should else {}


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
