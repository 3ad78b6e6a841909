"""``hetero_ddp``: data-parallel training in which a device twice as fast gets a mini-batch twice as large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetero.balance.batch_solver import keeps_limits, proportional_plan
from lightning_hetero.balance.sharding import plan_for_block
from lightning_hetero.balance.types import BatchLimits, BatchPlan, BatchSlice, DeviceProfile, PlanSchedule
from lightning_hetero.distributed.agree import gather
from lightning_hetero.distributed.share_sampler import ShareBatchSampler
from lightning_hetero.distributed.step_timer import CudaClock, HostClock, StepTimer
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.hardware.probe import TorchDeviceProbe
from lightning_hetero.plugin import arguments, loaders
from lightning_hetero.plugin.slices import EvaluationSlices, TrainingSlices
from lightning_hetero.plugin.stand_in import discarded_metrics, muted_gradients

__all__ = ["HeteroDDPStrategy"]


class HeteroDDPStrategy(DDPStrategy):
    """DDP for devices of unequal speed: the same training as ``ddp``, in which faster ranks get more samples.

    Every step trains on the global batch that plain DDP would train on, divided unequally; each rank's loss is
    weighted by its number of samples, so the combined gradient is that of the mean over the global batch.

    Args:
        shares: How the samples are divided. "auto" measures the ranks and finds the division by itself; a list has
            one positive number a rank, so that [1, 2] gives rank 1 twice the samples of rank 0; a mapping gives a
            number to each device name, for example {"Tesla K80": 1, "Tesla V100-SXM2-16GB": 2}. Given numbers are
            fixed, or, with a LoadBalancer among the callbacks, where its tuning starts.
        global_batch_size: Samples of all ranks in one training step. By default the training loader's batch size
            times the number of ranks, as under DDP.
        max_batch_size: Most training samples a rank can hold in one step: one number for all ranks or one a rank.
        batch_multiple: Every rank's number of samples is a multiple of this, but for one rank that takes what is
            left over.
        loss_reduction: "mean" if the training loss is a mean over the batch, "sum" if it is a sum. A sum is left
            unweighted: like plain DDP, the gradient is that of the sum over the global batch divided by the number
            of ranks.
        num_loss_terms: Counts the terms that the training loss averages over, given the batch, where that is not
            the number of samples: tokens that are not padding, boxes. Costs one small all-reduce a step.
        **ddp_kwargs: Arguments of Lightning's DDPStrategy and of torch's DistributedDataParallel.

    Raises:
        ConfigurationError: an argument breaks its rule; what depends on the number of ranks is checked when the
            Trainer is constructed.
    """

    def __init__(
        self,
        shares: Literal["auto"] | list[float] | dict[str, float] = "auto",
        global_batch_size: int | None = None,
        max_batch_size: int | list[int] | None = None,
        batch_multiple: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
        num_loss_terms: Callable[[Any], int] | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        arguments.check_at_least("batch_multiple", batch_multiple, 1)
        arguments.check_shares(shares)
        arguments.check_global_batch_size(global_batch_size, batch_multiple)
        arguments.check_caps(max_batch_size, batch_multiple)
        arguments.check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        if num_loss_terms is not None and not callable(num_loss_terms):
            raise ConfigurationError(f"`num_loss_terms` must be callable with a batch or None, got {num_loss_terms!r}.")
        if num_loss_terms is not None and loss_reduction == "sum":
            raise ConfigurationError(
                '`num_loss_terms` must be None with `loss_reduction="sum"`: a sum is not averaged over terms.'
            )
        super().__init__(**ddp_kwargs)
        self.shares: str | Sequence[float] | Mapping[str, float] = shares
        self.global_batch_size = global_batch_size
        self.max_batch_size = max_batch_size
        self.batch_multiple = batch_multiple
        self.loss_reduction = loss_reduction
        self.num_loss_terms = num_loss_terms
        self.timer = StepTimer(HostClock())
        self.profiles: tuple[DeviceProfile, ...] = ()
        self._schedule: PlanSchedule | None = None
        self._training_sampler: ShareBatchSampler | None = None
        self._training_slices = TrainingSlices()
        self._training_slice: BatchSlice | None = None
        self._evaluation_slices = EvaluationSlices()
        self._loss_weight = 1.0

    # ---- what a balancer needs -------------------------------------------------------------------------------------

    @property
    def schedule(self) -> PlanSchedule | None:
        """Which plan holds at which training step; None where the training loader is not divided by this strategy."""
        return self._schedule if self._training_sampler is not None else None

    @property
    def limits(self) -> BatchLimits:
        """What every plan has to respect."""
        caps = self.max_batch_size
        return BatchLimits(
            max_samples=None if caps is None else tuple([caps] * self.world_size if isinstance(caps, int) else caps),
            batch_multiple=self.batch_multiple,
        )

    @property
    def fetched_through(self) -> int:
        """The latest training step for which this rank has drawn its samples; -1 before the first."""
        return -1 if self._training_sampler is None else self._training_sampler.fetched_through

    @property
    def training_slice(self) -> BatchSlice | None:
        """This rank's part of the latest global batch; None where the loader is not divided by this strategy."""
        return self._training_slice

    def change_plan(self, first_step: int, plan: BatchPlan) -> None:
        """Follow ``plan`` from training step ``first_step`` on.

        Args:
            first_step: a step that no rank has fetched yet, the same on all ranks.
            plan: a plan of the present global batch.

        Raises:
            ConfigurationError: this rank has already drawn samples of that step under another plan, or the plan is
                of another number of ranks or samples.
        """
        schedule = self.schedule
        if schedule is None:
            raise ConfigurationError("`change_plan` needs a training loader that this strategy divides; there is none.")
        if first_step <= self.fetched_through:
            raise ConfigurationError(
                f"`first_step` must be a step that no rank has fetched, got {first_step}, but rank {self.global_rank}"
                f" has fetched step {self.fetched_through}. Use a later step."
            )
        current = schedule.at(first_step)
        if (plan.world_size, plan.global_batch_size) != (current.world_size, current.global_batch_size):
            raise ConfigurationError(
                f"`plan` must divide {current.global_batch_size} samples among {current.world_size} ranks, got {plan}."
            )
        self._schedule = schedule.with_change(first_step, plan)

    def restore_schedule(self, schedule: PlanSchedule) -> None:
        """Continue with the schedule of an earlier run, before any training batch is drawn."""
        self._schedule = schedule

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def set_world_ranks(self) -> None:
        # The Trainer's constructor calls this as soon as the number of ranks is known: no process is launched yet.
        world_size = self.num_nodes * self.num_processes
        arguments.check_shares(self.shares, world_size)
        arguments.check_global_batch_size(self.global_batch_size, self.batch_multiple, world_size)
        arguments.check_caps(self.max_batch_size, self.batch_multiple, world_size, self.global_batch_size)
        super().set_world_ranks()

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # one replica: Lightning injects a sampler over the whole epoch, whose order this strategy divides
        return {"num_replicas": 1, "rank": 0} if self._divides else super().distributed_sampler_kwargs

    @property
    def _divides(self) -> bool:
        return self.world_size > 1

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = model.trainer
        if self.shares == "auto" and trainer.state.fn == TrainerFn.FITTING:
            from lightning_hetero.plugin.load_balancer import add_default_balancer  # which knows this strategy

            add_default_balancer(trainer)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.root_device.type == "cuda":
            self.timer = StepTimer(CudaClock())
        self.profiles = tuple(gather(TorchDeviceProbe().profile(self.root_device)))
        # raises where a mapping does not know a device; every rank sees all devices, so all raise
        arguments.shares_of_ranks(self.shares, self.profiles)

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        loaders.check_training(self._trainer.train_dataloader, self.lightning_module.training_step)
        super().on_train_start()

    @override
    def on_validation_start(self) -> None:
        self._evaluation_slices.clear()
        loaders.check_evaluation(self._trainer.val_dataloaders)
        super().on_validation_start()

    @override
    def on_test_start(self) -> None:
        self._evaluation_slices.clear()
        loaders.check_evaluation(self._trainer.test_dataloaders)
        super().on_test_start()

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # ---- data ------------------------------------------------------------------------------------------------------

    @override
    def process_dataloader(self, dataloader: object) -> object:
        training = self._trainer.training
        if training:
            self._training_sampler = self._training_slice = None
            self._training_slices.clear()
        if not self._divides:
            return dataloader
        loader = loaders.examine(dataloader, self.world_size, self._epoch)
        if isinstance(loader, loaders.Undivided):
            if training:
                self._leave_undivided(dataloader, loader.reason)
            return dataloader
        if training:
            self._training_sampler = self._training_shares(loader)
            return loaders.divide(loader, self._training_sampler, self.timer.resume, self._training_slices.note)
        shares = self._evaluation_shares(loader)
        note = _nothing if self._trainer.predicting else partial(self._evaluation_slices.note, id(shares))
        return loaders.divide(loader, shares, _nothing, note)

    def _evaluation_shares(self, loader: loaders.Divisible) -> ShareBatchSampler:
        return ShareBatchSampler(
            loader.order,
            batch_size=loader.batch_size,
            global_batch_size=loader.batch_size * self.world_size,
            drop_last=loader.drop_last,
            rank=self.global_rank,
            plan_at=self._evaluation_plan,
            first_step=lambda: 0,
            stand_in=not self._trainer.predicting,
        )

    def _training_shares(self, loader: loaders.Divisible) -> ShareBatchSampler:
        global_batch_size = self.global_batch_size or loader.batch_size * self.world_size
        self._prepare_schedule(global_batch_size)
        return ShareBatchSampler(
            loader.order,
            batch_size=loader.batch_size,
            global_batch_size=global_batch_size,
            drop_last=loader.drop_last,
            rank=self.global_rank,
            plan_at=self._training_plan,
            first_step=self._next_training_step,
        )

    def _prepare_schedule(self, global_batch_size: int) -> None:
        """Begin a schedule, or adapt the one there is to a loader of another batch size."""
        schedule, step = self._schedule, self._next_training_step()
        if schedule is None or schedule.at(step).world_size != self.world_size:
            shares = arguments.shares_of_ranks(self.shares, self.profiles)
            self._schedule = PlanSchedule.constant(self._plan(shares, global_batch_size))
        elif schedule.at(step).global_batch_size != global_batch_size or not keeps_limits(
            schedule.at(step), self.limits
        ):
            # the loader has another batch size, or the run is resumed under other limits
            self._schedule = schedule.with_change(step, self._plan(schedule.at(step).samples, global_batch_size))

    def _plan(self, shares: Sequence[float], global_batch_size: int) -> BatchPlan:
        return proportional_plan(shares, global_batch_size, self.limits, min_samples=1)

    @property
    def _epoch(self) -> int:
        # what Lightning sets samplers to; `current_epoch` lags behind it where a run is resumed
        return self._trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined, no-any-return]

    def _next_training_step(self) -> int:
        return self._trainer.fit_loop.total_batch_idx + 1

    def _training_plan(self, step: int) -> BatchPlan:
        assert self._schedule is not None
        return self._schedule.at(step)

    def _evaluation_plan(self, _: int) -> BatchPlan:
        if self._schedule is not None:
            return self._schedule.at(self._next_training_step())
        # only the proportions count: the sampler scales the plan to the loader's batches
        shares = arguments.shares_of_ranks(self.shares, self.profiles)
        return proportional_plan(shares, 1000 * self.world_size, min_samples=1)

    def _leave_undivided(self, dataloader: object, reason: str) -> None:
        name = type(dataloader).__name__
        if self.shares != "auto":
            raise UnsupportedFeatureError(
                f"`shares` cannot be honoured for the training loader {name!r}: {reason}. Give each rank its part"
                f' yourself and use shares="auto", or use a DataLoader over a dataset with a length.'
            )
        rank_zero_warn(
            f"`hetero_ddp` leaves the training loader {name!r} as it is, because {reason}: every rank trains on what"
            f" its own loader yields, with equal weight, as under `ddp`."
        )

    # ---- the step --------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # DDP broadcasts buffers before the forward pass, and counting terms communicates too: the rank may wait
        self.timer.pause()
        self._training_slice = self._slice_of_step(self._trainer.fit_loop.total_batch_idx)
        self._loss_weight = self._weight_of_loss(args[0] if args else None)
        with self._discard(self._training_slice):
            return super().training_step(*args, **kwargs)

    def _slice_of_step(self, step: int) -> BatchSlice | None:
        part = self._training_slices.at(step)
        if part is None and self._training_sampler is not None:
            raise UnsupportedFeatureError(
                f"`hetero_ddp` needs the batch of training step {step} from the training loader, got one from"
                f" elsewhere: how many samples the other ranks have is unknown."
                f' Use strategy="ddp" to fetch batches yourself.'
            )
        return part

    def _weight_of_loss(self, batch: Any) -> float:
        part = self._training_slice
        stands_in = part is not None and part.samples == 0
        if self.num_loss_terms is not None:
            terms = 0 if stands_in else self.num_loss_terms(batch)
            return self.world_size * terms / max(self._sum_over_ranks(terms), 1)
        if part is None or (self.loss_reduction == "sum" and not stands_in):
            return 1.0
        return part.loss_weight

    def _sum_over_ranks(self, count: int) -> int:
        total = torch.tensor(count, dtype=torch.int64, device=self.root_device)
        dist.all_reduce(total)
        return int(total)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._discard(self._evaluation_slices.take()):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._discard(self._evaluation_slices.take()):
            return super().test_step(*args, **kwargs)

    def _discard(self, part: BatchSlice | None) -> AbstractContextManager[None]:
        if part is None or part.samples > 0:
            return nullcontext()
        assert self.lightning_module is not None
        return discarded_metrics(self.lightning_module)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        weight = self._loss_weight
        # DDP averages over ranks; the weight turns that into the mean over samples. It stays a Python float: rounded
        # to the precision of the loss it would cost nine digits.
        loss = closure_loss if weight == 1.0 else closure_loss * weight
        self.timer.watch_backward(loss)
        with self._muted() if weight == 0.0 else nullcontext():
            loss = super().backward(loss, optimizer, *args, **kwargs)
        self.timer.gradients_reduced()
        return loss

    def _muted(self) -> AbstractContextManager[None]:
        assert self.model is not None
        return muted_gradients(self.model.parameters())

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        # torch needs equal shapes and does not check them: gloo ends the process, NCCL leaves it undefined
        if self._shares_differ_in_this_step():
            shapes = gather(tuple(tensor.shape))
            if len(set(shapes)) > 1:
                raise UnsupportedFeatureError(
                    f"`all_gather` needs tensors of one shape, got {shapes} on the ranks: their mini-batches differ in"
                    f' size. Pad them to one size before, or use strategy="ddp".'
                )
        return super().all_gather(tensor, group, sync_grads)

    def _shares_differ_in_this_step(self) -> bool:
        part = self._training_slice
        if part is None or self._schedule is None or not self._trainer.training:
            return False
        return len(set(plan_for_block(self._schedule.at(part.step), part.global_samples).samples)) > 1

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        # Lightning averages integer counts over ranks and rounds the result down, so a mean over 3 and 4 samples
        # would be divided by 3; see its issue #21859
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and str(reduce_op).lower() in ("mean", "avg"):
            tensor = tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
        return super().reduce(tensor, group, reduce_op)


def _nothing(*_: Any) -> None:
    """Evaluation is not timed."""
