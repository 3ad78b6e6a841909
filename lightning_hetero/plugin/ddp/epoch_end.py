"""What the ranks reduce in the last hooks of an epoch, where it is no longer known which samples a value stands for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_hetero.distributed.calling_line import called_by_library, calling_line
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.plugin.common.lightning_private import set_batch_size
from lightning_hetero.plugin.common.overridden import overridden_method

__all__ = ["EpochEnd"]

_NEUTRAL = {torch.sum: 0.0, sum: 0.0, torch.max: float("-inf"), max: float("-inf"), torch.min: float("inf")}
_NEUTRAL[min] = float("inf")


class EpochEnd:
    """The last hooks of an epoch in which the ranks had different numbers of samples.

    A typical value there is the mean of what a rank has collected from its batches. Plain DDP averages such means over
    ranks, which is right for equally many samples. Here each has the weight of the rank's samples in the epoch. Whether
    that is what a value needs cannot be known, so one warning names the line.

    Args:
        module: The module whose epoch ends.
        samples: Number of samples of each rank in the epoch.
        rank: This rank.
        warned: What has been warned of; grows.
    """

    def __init__(self, module: LightningModule, samples: Sequence[int], rank: int, warned: set[str]) -> None:
        self._module = module
        self._samples = samples
        self._own = samples[rank]
        self._warned = warned

    @contextmanager
    def weighted(self) -> Iterator[None]:
        """Weight what is logged in this context with the rank's number of samples in the epoch."""
        trainer = self._module.trainer
        set_batch_size(trainer, self._own)
        try:
            with overridden_method(self._module, "log", self._logged):
                yield
        finally:
            set_batch_size(trainer, None)

    def _logged(self, log: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = inspect.signature(LightningModule.log).bind(self._module, name, value, *args, **kwargs).arguments
        except TypeError:  # the user's own `log`
            given = {}
        if given.get("sync_dist") and not given.get("rank_zero_only") and isinstance(value, Tensor | Number):
            value = self._checked(name, value, given.get("reduce_fx", torch.mean), given.get("batch_size"))
        log(name, value, *args, **kwargs)

    def _checked(self, name: str, value: Any, reduce_fx: Any, batch_size: int | None) -> Any:
        is_mean = reduce_fx in (torch.mean, "mean")
        if is_mean and name not in self._warned:
            self._warned.add(name)
            of_ranks = all_gather(float(value))
            counting = {v for v, samples in zip(of_ranks, self._samples, strict=True) if samples}
            if len(counting) > 1:
                how = "averages over ranks" if batch_size is not None else "weights each rank's value by its samples"
                self._warn(f"`self.log({name!r}, ..., sync_dist=True)`", how)
        if self._own == 0:  # what it has collected comes from stand-ins, or is the mean of nothing
            neutral = 0.0 if is_mean else _NEUTRAL.get(reduce_fx)
            if neutral is None:
                return value
            return torch.full_like(value, neutral) if isinstance(value, Tensor) else neutral
        return value

    def note_reduce(self, reduce_op: str) -> None:
        """Note that the strategy's ``reduce`` was called, and warn if the user takes a mean over ranks."""
        if reduce_op in ("mean", "avg") and not called_by_library(2):
            self._warn_once("`strategy.reduce`", "averages over ranks")

    def note_gather(self) -> None:
        """Note that the ranks gather values, and warn because these stand for different numbers of samples."""
        self._warn_once("`all_gather`", "gathers values of ranks that do not count the same")

    def _warn_once(self, what: str, how: str) -> None:
        line = calling_line()
        if line not in self._warned:
            self._warned.add(line)
            self._warn(what, how)

    def _warn(self, what: str, how: str) -> None:
        rank_zero_warn(
            f"`hetero_ddp`: {what} in {calling_line()} {how}, at the end of an epoch in which the ranks had"
            f" {list(self._samples)} samples. That is exact only for certain values: a mean over samples needs these"
            f" weights, a sum or a time per rank needs none. Log the value in the step, where the weight is known, or"
            f" use a metric of torchmetrics, for example MeanMetric."
        )
