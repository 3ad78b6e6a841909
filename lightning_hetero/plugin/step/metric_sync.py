"""Synchronise metrics over ranks that have different numbers of samples, or none.

torchmetrics expects all ranks to have updated a metric equally often. It gathers states entry by entry, so lists of
different lengths leave ranks waiting for each other. A rank without an update contributes the initial state, which is
wrong for means, for maxima and for most custom reductions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_mean
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.plugin.common.overridden import overridden_on_class
from lightning_hetero.plugin.step.metrics import (
    GATHER_STATES,
    DiscardedUpdates,
    is_forward,
    patched_reductions,
    reductions_of,
    updates_of,
)

__all__ = ["MetricSync"]


class MetricSync:
    """Takes part whenever a metric gathers its states while a strategy runs.

    Ranks compute metrics together, and each of them knows whether more has to be exchanged than states: if a rank has
    run a step on a stand-in, or if the ranks' numbers of samples differ and a state is a mean, or a list that
    torchmetrics does not concatenate.

    Args:
        samples_of_ranks: Function that returns each rank's number of samples in the current epoch.

    Attributes:
        before_sync: Function that is called before the ranks synchronise a metric.
        some_rank_stood_in: Whether a rank has run a step on a stand-in, the same on all ranks.
        stand_in: What this rank's current stand-in has changed; None if it does not run on one.
    """

    def __init__(self, samples_of_ranks: Callable[[], Sequence[int]]) -> None:
        self._samples_of_ranks = samples_of_ranks
        self.some_rank_stood_in = False
        self.before_sync: Callable[[], None] = _nothing
        self.stand_in: DiscardedUpdates | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Synchronise all metrics of this process through this object."""
        sync, gather_states = Metric.sync, getattr(Metric, GATHER_STATES)

        def synchronise(metric: Metric, *args: Any, **kwargs: Any) -> None:
            self.before_sync()
            sync(metric, *args, **kwargs)
            for name in reductions_of(metric):
                if isinstance(state := getattr(metric, name), list) and any(isinstance(e, _Padding) for e in state):
                    state[:] = [entry for entry in state if not isinstance(entry, _Padding)]

        # a user's class that gathers in its own way does not come here, unless it calls its base class
        def gather(metric: Metric, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
            run = partial(gather_states, metric, process_group=process_group)
            if self._needs_exchange(metric):
                self._sync(metric, run, dist_sync_fn or gather_all_tensors, process_group)
            else:
                run(dist_sync_fn)

        with overridden_on_class(Metric, "sync", synchronise), overridden_on_class(Metric, GATHER_STATES, gather):
            yield

    def _needs_exchange(self, metric: Metric) -> bool:
        if self.some_rank_stood_in:
            return True
        if len(set(self._samples_of_ranks())) < 2:
            return False
        return any(
            # torchmetrics concatenates lists of any length, but not tensors
            reduction is dim_zero_mean or isinstance(getattr(metric, name), list) == (reduction is not dim_zero_cat)
            for name, reduction in reductions_of(metric).items()
            if reduction in (dim_zero_mean, dim_zero_cat) or isinstance(getattr(metric, name), list)
        )

    def _sync(self, metric: Metric, run: Callable[..., None], gather: Callable[..., Any], group: Any) -> None:
        before: dict[str, Any] = {}
        if self.stand_in is not None and not is_forward(metric):
            before = self.stand_in.state_before(metric)
        # the states of a forward are those of one batch, here of the stand-in
        counted = updates_of(metric, before) > 0 and not (self.stand_in is not None and is_forward(metric))
        reductions = reductions_of(metric)
        # torchmetrics has copied the states, and returns to them afterwards
        vars(metric).update({name: before[name] for name in reductions if name in before})
        states = {name: getattr(metric, name) for name in reductions}
        shapes = {name: _shape(state) for name, state in states.items()}
        samples = self._samples_of_ranks()
        own = _States(counted, samples[dist.get_rank()] if samples else 0, shapes)
        of_ranks = all_gather(own, group or metric.process_group)
        counting = [rank for rank in of_ranks if rank.counted]
        if not counting:
            run(gather)
            return
        alike = _Alike(of_ranks, counted, metric.device)
        vars(metric).update({name: alike.filled(name, state, reductions[name]) for name, state in states.items()})
        tensors = {n for n, s in states.items() if isinstance(s, Tensor) and reductions[n] is dim_zero_cat}
        joined = dict.fromkeys(tensors, _joined)
        with patched_reductions(metric, _weighted(reductions, counting) | joined):
            run(partial(alike.gather, gather))


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class _Shape:
    """What tensors of all ranks must have in common to be gathered."""

    dimensions: int
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.zeros((0,) * self.dimensions, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class _States:
    """What one rank contributes to a metric.

    Attributes:
        counted: Whether the metric has been updated with samples of this rank.
        samples: Number of samples of this rank in the current epoch.
        shapes: Shape of each state, by name; for a list those of its entries; None for what is no tensor.
    """

    counted: bool
    samples: int
    shapes: dict[str, Any]


def _shape(state: Any) -> Any:
    if isinstance(state, Tensor):
        return _Shape(state.dim(), state.dtype)
    return tuple(_shape(entry) for entry in state) if isinstance(state, list) else None


class _Padding:
    """Takes the place of an entry that a rank does not have, where entries are no tensors."""


class _Alike:
    """Makes the states of all ranks alike in structure, and leaves out of the gathered states what was added for that.

    Args:
        of_ranks: What every rank contributes; at least one counts.
        counted: Whether this rank counts.
        device: Device of the states.
    """

    def __init__(self, of_ranks: Sequence[_States], counted: bool, device: torch.device) -> None:
        self._of_ranks = of_ranks
        self._counted = counted
        self._device = device
        self._kept: dict[int, list[bool]] = {}  # for each entry, by its identity: from which ranks it is kept

    def filled(self, name: str, state: Any, reduction: Any) -> Any:
        """Return the state to gather instead of this rank's ``state``."""
        shapes = [rank.shapes[name] for rank in self._of_ranks if rank.counted]
        if isinstance(state, Tensor) and reduction is dim_zero_cat and isinstance(shapes[0], _Shape):
            return [state if self._counted else self._empty(shapes[0])]
        if isinstance(state, list):
            if not all(isinstance(shape, tuple) for shape in shapes):
                return state
            most = max(shapes, key=len)
            if reduction is dim_zero_cat:  # torchmetrics concatenates the entries of a rank before it gathers them
                return state if state and self._counted else [self._empty(shape) for shape in most[:1]]
            return self._padded(state, [rank.shapes[name] for rank in self._of_ranks], most)
        if isinstance(state, Tensor) and not self._counted and isinstance(shapes[0], _Shape):
            return state if _shape(state) == shapes[0] else self._empty(shapes[0])
        return state

    def _padded(self, state: list[Any], of_ranks: Sequence[Any], most: Sequence[Any]) -> list[Any]:
        own = state if self._counted else []
        padded = [*own, *(self._empty(shape) for shape in most[len(own) :])]
        for i, entry in enumerate(padded):
            self._kept[id(entry)] = [
                rank.counted and i < len(shapes) for rank, shapes in zip(self._of_ranks, of_ranks, strict=True)
            ]
        return padded

    def _empty(self, shape: _Shape | None) -> Any:
        return _Padding() if shape is None else shape.empty(self._device)

    def gather(self, gather: Callable[..., list[Tensor]], tensor: Tensor, group: Any = None) -> list[Tensor]:
        """Gather ``tensor`` from all ranks, and return it from those that count."""
        kept = self._kept.get(id(tensor)) or [rank.counted for rank in self._of_ranks]
        return [of_rank for of_rank, keep in zip(gather(tensor, group=group), kept, strict=True) if keep]


def _weighted(reductions: dict[str, Any], counting: Sequence[_States]) -> dict[str, Any]:
    """Return reductions that weight the means of ranks by their numbers of samples."""
    weights = torch.tensor([rank.samples for rank in counting], dtype=torch.float64)
    if weights.sum() == 0:
        return {}
    mean = partial(_weighted_mean, weights / weights.sum())
    return {name: mean for name, reduction in reductions.items() if reduction is dim_zero_mean}


def _joined(of_ranks: list[Tensor]) -> Tensor:
    """Join tensors of ranks as torchmetrics does on one rank: it stacks them, if they are of one shape."""
    return torch.cat(of_ranks).unsqueeze(0)


def _weighted_mean(weights: Tensor, stacked: Tensor) -> Tensor:
    weights = weights.to(stacked.device, stacked.dtype if stacked.is_floating_point() else torch.float32)
    mean: Tensor = torch.tensordot(weights, stacked.to(weights.dtype), dims=1)
    return mean
