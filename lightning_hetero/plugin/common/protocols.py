"""Protocols that list what the parts of ``hetero_ddp`` use of the strategy that owns them.

The strategy creates its loaders, its micro-batches and a balancer, and each of these uses the strategy. They import
these protocols instead of the class, so imports point one way, and each protocol lists what one part uses.
"""

# ruff: noqa: D102  # Lightning documents what its strategies have

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision

from lightning_hetero.balance.batch.caps import MicroBatchLimits
from lightning_hetero.balance.types import BatchLimits, BatchPlan, BatchSlice, DeviceProfile, PlanSchedule
from lightning_hetero.distributed.step_timer import StepTimer
from lightning_hetero.hardware.memory import MemoryMeter

__all__ = ["BalancedStrategy", "LoaderOwner", "StepOwner", "is_balanced"]


class _OnRank(Protocol):
    """A strategy of Lightning, as far as it knows the rank that it runs on."""

    @property
    def root_device(self) -> torch.device: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def trainer(self) -> Trainer: ...


class LoaderOwner(_OnRank, Protocol):
    """A strategy that divides loaders; the arguments are those of ``HeteroDDPStrategy``."""

    shares: str | Sequence[float] | Mapping[str, float]
    global_batch_size: int | None
    batch_multiple: int
    num_loss_terms: Callable[[Any], float] | None
    profiles: tuple[DeviceProfile, ...]
    timer: StepTimer

    @property
    def max_batch_size(self) -> int | Sequence[int] | Mapping[str, int] | None: ...
    @property
    def world_size(self) -> int: ...
    @property
    def lightning_module(self) -> LightningModule | None: ...


class StepOwner(_OnRank, Protocol):
    """A strategy whose steps may run in several micro-batches.

    Attributes:
        loss_weight: Weight of the rank's loss with which the mean over ranks is the mean over the global batch.
        why_one_micro_batch: Why no rank can run a step in several micro-batches; None if it depends on the module.
    """

    why_one_micro_batch: str | None
    num_loss_terms: Callable[[Any], float] | None
    loss_weight: float
    timer: StepTimer

    @property
    def loss_reduction(self) -> str: ...
    @property
    def micro_batch_size(self) -> int | Sequence[int] | Mapping[str, int] | None: ...
    @property
    def lightning_module(self) -> LightningModule | None: ...
    @property
    def model(self) -> torch.nn.Module | None: ...
    @property
    def precision_plugin(self) -> Precision: ...
    @property
    def training_slice(self) -> BatchSlice | None: ...
    def post_backward(self, closure_loss: torch.Tensor) -> None: ...


class Alone(Protocol):
    """Steps that can run on one rank alone."""

    def alone(self, refusal: str = "") -> AbstractContextManager[None]:
        """Run the code in this context on this rank alone, and refuse calls that communicate, for a given reason."""


class BalancedStrategy(_OnRank, Protocol):
    """A strategy that can divide batches unequally, and change the division during training."""

    profiles: tuple[DeviceProfile, ...]
    timer: StepTimer
    memory: MemoryMeter | None
    micro_batch_limits: MicroBatchLimits

    @property
    def micro_batch_size(self) -> int | Sequence[int] | Mapping[str, int] | None: ...

    @property
    def micro_batches(self) -> Alone: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def lightning_module(self) -> LightningModule | None: ...
    @property
    def precision_plugin(self) -> Precision: ...
    @property
    def plan_schedule(self) -> PlanSchedule | None:
        """The plan schedule of the training; None if the training loaders are not divided."""

    @property
    def limits(self) -> BatchLimits:
        """The limits that every plan must respect."""

    @property
    def counts_samples(self) -> bool:
        """Whether a plan's numbers are samples of one loader, not fractions of several loaders."""

    @property
    def fetched_through(self) -> int:
        """The latest training step for which this rank has drawn its samples; -1 before the first."""

    @property
    def training_slice(self) -> BatchSlice | None:
        """This rank's part of the current global batch; None before the first."""

    def nominal_plan(self) -> BatchPlan | None:
        """Return the plan that the devices' nominal speeds suggest before measuring; None if they suggest none."""

    def change_plan(self, first_step: int, plan: BatchPlan) -> None:
        """Follow ``plan`` from ``first_step`` on, which no rank has fetched yet."""

    def restore_schedule(self, schedule: PlanSchedule) -> None:
        """Continue with the plans of an earlier run, before any training batch is drawn."""

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any: ...


def is_balanced(strategy: object) -> TypeGuard[BalancedStrategy]:
    """Return whether a strategy can divide batches unequally, and change the division during training."""
    # ask the class, because a property of the strategy may not be ready yet
    return callable(getattr(type(strategy), "change_plan", None))
