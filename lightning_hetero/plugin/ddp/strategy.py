"""``hetero_ddp``: data-parallel training in which a device twice as fast gets a mini-batch twice as large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetero.balance.batch.caps import MicroBatchLimits
from lightning_hetero.balance.tuning.prior import nominal_shares
from lightning_hetero.balance.types import (
    BatchLimits,
    BatchPlan,
    BatchSlice,
    DeviceProfile,
    PlanSchedule,
)
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.distributed.step_timer import HostClock, StepTimer, clock_of
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.hardware.memory import MemoryMeter, meter_of
from lightning_hetero.hardware.probe import TorchDeviceProbe
from lightning_hetero.plugin.balancing.default_balancer import add_default_balancer
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.base_strategy import BaseStrategy
from lightning_hetero.plugin.common.inexact import inexact_parts, warn_of_inexact
from lightning_hetero.plugin.common.lightning_private import has_comm_hook, trainer_of
from lightning_hetero.plugin.data.evaluation_data import EvaluationData
from lightning_hetero.plugin.data.training_data import TrainingData
from lightning_hetero.plugin.ddp.batch_scope import BatchScope
from lightning_hetero.plugin.ddp.micro_batches import MicroBatches
from lightning_hetero.plugin.ddp.reduction import to_reduce
from lightning_hetero.plugin.step.gradients import muted_gradients
from lightning_hetero.plugin.step.loss_weights import weight_of_rank
from lightning_hetero.plugin.step.no_terms import logging_without_terms, with_weighted_gradient

__all__ = ["HeteroDDPStrategy"]


class HeteroDDPStrategy(BaseStrategy):
    """DDP for devices of unequal speed: the same training as ``ddp``, but faster ranks get more samples.

    Every step trains on the global batch that plain DDP would train on, divided unequally. Each rank's loss is weighted
    by its number of samples, so the combined gradient is that of the mean over the global batch.

    Args:
        shares: How the global batch is divided among the ranks. "auto" measures the ranks and finds the shares. A list
            gives one positive number per rank: [1, 2] gives rank 1 twice the samples of rank 0. A mapping gives one
            number per device name, for example {"Tesla K80": 1, "Tesla V100-SXM2-16GB": 2}. Given shares stay fixed
            unless a LoadBalancer is among the callbacks; then its tuning starts from them.
        global_batch_size: Number of samples of all ranks in one training step. By default it is the training loader's
            batch size times the number of ranks, as with DDP. With your own batch sampler, give the size of its
            batches; each of them is taken as a global batch.
        max_batch_size: Maximum number of training samples that a rank gets in one step. Give one number for all ranks,
            one per rank, or one per device name.
        batch_multiple: Every rank's number of samples is a multiple of this, for example of 8 for tensor cores. One
            rank may deviate, because it also takes the remainder.
        loss_reduction: How the training loss is reduced over a batch, "mean" or "sum". A sum is not weighted: as with
            plain DDP, the gradient is that of the sum over the global batch divided by the number of ranks.
        num_loss_terms: Function that takes a batch and returns the number of terms over which the training loss is
            averaged, or the sum of their weights. Give it if these terms are not the samples but, for example, tokens
            without padding, or boxes. It costs one small all-reduce per step. In YAML it is an import path, for example
            my_package.count_tokens.
        micro_batch_size: Maximum number of samples that a rank processes at once. Give one number for all ranks, one
            per rank, or one per device name. A larger mini-batch takes several micro-batches, whose gradients are added
            up on the rank, so a fast device with little memory still gets the share that its speed deserves.
        **ddp_kwargs: Further arguments of Lightning's DDPStrategy and of torch's DistributedDataParallel.

    Raises:
        ConfigurationError: An argument breaks its rule. Rules that depend on the number of ranks are checked when the
            Trainer is constructed.

    Example:
        Give rank 1 twice the samples of rank 0, and process at most 16 samples at once::

            strategy = HeteroDDPStrategy(shares=[1, 2], micro_batch_size=16)
            trainer = Trainer(strategy=strategy, devices=2)
    """

    strategy_name = "hetero_ddp"
    why_one_micro_batch: str | None = None

    def __init__(
        self,
        shares: Literal["auto"] | list[float] | dict[str, float] = "auto",
        global_batch_size: int | None = None,
        max_batch_size: int | list[int] | dict[str, int] | None = None,
        batch_multiple: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
        num_loss_terms: Callable[[Any], float] | None = None,
        micro_batch_size: int | list[int] | dict[str, int] | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        arguments.check_at_least("batch_multiple", batch_multiple, 1)
        arguments.check_shares(shares)
        arguments.check_global_batch_size(global_batch_size, batch_multiple)
        arguments.check_caps("max_batch_size", max_batch_size, batch_multiple)
        arguments.check_caps("micro_batch_size", micro_batch_size)
        arguments.check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        arguments.check_num_loss_terms(num_loss_terms, loss_reduction)
        self._check_keywords(ddp_kwargs)
        super().__init__(**ddp_kwargs)
        self.shares: str | Sequence[float] | Mapping[str, float] = shares
        self.global_batch_size = global_batch_size
        self.max_batch_size = max_batch_size
        self.batch_multiple = batch_multiple
        self.loss_reduction = loss_reduction
        self.num_loss_terms = num_loss_terms
        self.micro_batch_size = micro_batch_size
        self.renew()

    @override
    def renew(self) -> None:
        self.timer = StepTimer(HostClock())
        self.profiles: tuple[DeviceProfile, ...] = ()
        self.train_data = TrainingData(self)
        self.eval_data = EvaluationData(self, self.train_data.plan_at_next_step)
        self.micro_batch_limits = MicroBatchLimits()
        self.micro_batches = MicroBatches(self, self.micro_batch_limits)
        self.memory: MemoryMeter | None = None
        self.loss_weight = 1.0
        self.scope = BatchScope(self.train_data, self.eval_data, self.micro_batches.before_collective, self.waiting)

    # ---- for the balancer ------------------------------------------------------------------------------------------

    @property
    def plan_schedule(self) -> PlanSchedule | None:
        """The plan schedule of the training; None if the training loaders are not divided."""
        return self.train_data.plan_schedule

    @property
    def limits(self) -> BatchLimits:
        """The limits that every plan must respect."""
        return self.train_data.limits

    @property
    def counts_samples(self) -> bool:
        """Whether a plan's numbers are samples of one loader, not fractions of several loaders."""
        return self.train_data.counts_samples

    @property
    def fetched_through(self) -> int:
        """The latest training step for which this rank has drawn its samples; -1 before the first."""
        return self.train_data.fetched_through

    @property
    def training_slice(self) -> BatchSlice | None:
        """This rank's part of the latest global batch; None before the first."""
        return self.train_data.part

    def waiting(self) -> AbstractContextManager[None] | None:
        """Return a context in which this rank may wait for others, which is not its own time; None if none is kept."""
        return self.timer.waiting() if self.timer.enabled else None

    def nominal_plan(self) -> BatchPlan | None:
        """Return the plan that the devices' nominal speeds suggest before measuring; None if they suggest none."""
        shares = nominal_shares(self.profiles) if self.shares == "auto" and self.plan_schedule is not None else None
        return None if shares is None else self.train_data.plan_in_proportion(shares)

    def change_plan(self, first_step: int, plan: BatchPlan) -> None:
        """Follow ``plan`` from training step ``first_step`` on.

        Args:
            first_step: First step of the plan, the same on all ranks. No rank has fetched it yet.
            plan: New plan of the current global batch.

        Raises:
            ConfigurationError: This rank has already drawn samples of that step under another plan, or the plan has
                another number of ranks or samples, or no training with divided loaders is running.
        """
        arguments.check_at_least("first_step", first_step, 0)
        if not isinstance(plan, BatchPlan) or not all(arguments.is_integer(n) for n in plan.samples):
            raise ConfigurationError(f"`plan` must be a BatchPlan, got {plan!r}. For example BatchPlan((32, 96)).")
        schedule = self.plan_schedule
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
        self.train_data.plan_schedule = schedule.with_change(first_step, plan)

    def restore_schedule(self, schedule: PlanSchedule) -> None:
        """Continue with the plan schedule of an earlier run; called before any training batch is drawn."""
        self.train_data.plan_schedule = schedule

    @override
    def loaders_state(self) -> Any:
        return self.train_data.state()

    @override
    def load_loaders_state(self, state: Any) -> None:
        self.train_data.load(state)

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def check_world_size(self, world_size: int) -> None:
        arguments.check_shares(self.shares, world_size)
        arguments.check_global_batch_size(self.global_batch_size, self.batch_multiple, world_size)
        arguments.check_caps("max_batch_size", self.max_batch_size, self.batch_multiple, world_size)
        arguments.check_sum_of_caps(self.max_batch_size, world_size, self.global_batch_size, self.batch_multiple)
        arguments.check_caps("micro_batch_size", self.micro_batch_size, 1, world_size)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # one replica: Lightning injects a sampler over the whole epoch, whose order this strategy divides
        return {"num_replicas": 1, "rank": 0} if self.world_size > 1 else super().distributed_sampler_kwargs

    @override
    def begin_with(self, trainer: Trainer, model: LightningModule) -> None:
        if self.shares == "auto" and trainer.state.fn == TrainerFn.FITTING:
            add_default_balancer(trainer)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.root_device.type != "cpu":
            self.timer = StepTimer(clock_of(self.root_device))
        self.memory = meter_of(self.root_device)
        self.profiles = tuple(all_gather(TorchDeviceProbe().profile(self.root_device)))
        # raises if a mapping lacks a device; every rank sees all devices, so all of them raise
        arguments.shares_of_ranks(self.shares, self.profiles)
        arguments.caps_of_ranks("max_batch_size", self.max_batch_size, self.profiles)
        micro_batch_sizes = arguments.caps_of_ranks("micro_batch_size", self.micro_batch_size, self.profiles)
        self.micro_batch_limits.limit = None if micro_batch_sizes is None else micro_batch_sizes[self.global_rank]
        if self.lightning_module is not None:
            self.scope.open(self.trainer, self.lightning_module)

    @override
    def teardown(self) -> None:
        self.scope.close()
        super().teardown()

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        self.train_data.check(self.lightning_module.training_step)
        self.micro_batches.begin()
        if self.train_data.may_be_unequal:
            warn_of_inexact(inexact_parts(self.lightning_module, self))
        super().on_train_start()

    @override
    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        self.eval_data.begin(self.lightning_module.validation_step)
        super().on_validation_start()

    @override
    def on_test_start(self) -> None:
        assert self.lightning_module is not None
        self.eval_data.begin(self.lightning_module.test_step)
        super().on_test_start()

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs this strategy."""
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def process_dataloader(self, dataloader: object) -> object:
        dataloader, trainer = super().process_dataloader(dataloader), trainer_of(self.lightning_module)
        if trainer is None or trainer.training:
            return dataloader if trainer is None else self.train_data.process(dataloader)
        return self.eval_data.process(dataloader, predicting=trainer.predicting)

    # ---- the step --------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # the rank may wait: DDP broadcasts buffers before the forward pass, and counting terms communicates too
        self.timer.pause()
        self.loss_weight = self._weight_of_loss(args[0] if args else None)
        if self.num_loss_terms is not None:
            self.scope.weight = self.loss_weight
        forward = partial(self._forward, **kwargs)
        backward = partial(self._backward, super().backward)
        with self.scope.watching(), self._logging(), failure_of_peers():
            return self.micro_batches.training_step(forward, backward, args, self.train_data.part)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)

    def _weight_of_loss(self, batch: Any) -> float:
        part = self.train_data.part
        if self.num_loss_terms is not None:
            return weight_of_rank(self.num_loss_terms, batch, stands_in=self.scope.stands_in)
        if part is None or (self.loss_reduction == "sum" and not self.scope.stands_in):
            return 1.0
        return part.loss_weight

    def _logging(self) -> AbstractContextManager[None]:
        """Keep means over no terms out of what a training step logs."""
        assert self.lightning_module is not None
        no_terms = self.num_loss_terms is not None and self.loss_weight == 0.0
        return logging_without_terms(self.lightning_module) if no_terms else nullcontext()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # a hook combines gradients, which are weighted
        watching = self.scope.ignoring() if has_comm_hook(self) else nullcontext()
        with watching, failure_of_peers():
            return self.micro_batches.backward(
                partial(self._backward, super().backward), closure_loss, optimizer, *args, **kwargs
            )

    def _backward(
        self, backward: Callable[..., Tensor], loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        weight = self.loss_weight
        # DDP averages over ranks; the weight turns that into the mean over samples. It stays a Python float: rounded
        # to the precision of the loss, it would lose nine digits.
        loss = with_weighted_gradient(loss, weight)
        self.timer.watch_backward(loss)
        with self._muted() if weight == 0.0 else nullcontext():
            loss = backward(loss, optimizer, *args, **kwargs)
        self.timer.resume()  # the gradients of all ranks are combined, on CUDA in the order of the stream
        return loss

    def _muted(self) -> AbstractContextManager[None]:
        assert self.model is not None
        return muted_gradients(self.model.parameters())

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self.micro_batches.before_collective("all_gather")
        if self.scope.epoch_end is not None:
            self.scope.epoch_end.note_gather()
        with self.timer.waiting():
            self._check_gathered(tensor)
            return super().all_gather(tensor, group, sync_grads)

    def _check_gathered(self, tensor: Tensor) -> None:
        # torch needs equal shapes but does not check them: gloo ends the process, with NCCL the result is undefined
        if self._shapes_may_differ:
            shapes = all_gather(tuple(tensor.shape))
            if len(set(shapes)) > 1:
                raise UnsupportedFeatureError(
                    f"`all_gather` needs tensors of one shape, got {shapes} on the ranks: their mini-batches differ in"
                    f" size. Pad them to one size first, use `drop_last=True` if this is an epoch's last batch, or use"
                    f' strategy="ddp".'
                )
        elif self.scope.part is not None and tensor.shape[:1] == (self.scope.part.samples,):
            self.train_data.keep_equal()
            return
        self.scope.note_collective("all_gather", tensor)

    @property
    def _shapes_may_differ(self) -> bool:
        if self.world_size == 1:
            return False
        trainer = trainer_of(self.lightning_module)
        part = self.scope.part or (self.train_data.part if trainer is not None and trainer.training else None)
        return part is None or not part.plan.is_equal

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        self.micro_batches.before_collective("reduce")
        if isinstance(tensor, Tensor):
            operation = str(reduce_op).lower()
            self.scope.note_reduce(tensor, operation)
            tensor = to_reduce(tensor, operation, self.scope.weight, self.scope.stands_in)
        with self.timer.waiting():
            return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self.micro_batches.before_collective("reduce_boolean_decision")
        with self.timer.waiting():
            # a rank that stands in agrees with whatever the others decide
            return super().reduce_boolean_decision(all if self.scope.stands_in else decision, all)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self.micro_batches.refuse_to_communicate("broadcast")
        with self.timer.waiting():
            return super().broadcast(obj, src)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches.refuse_to_communicate("barrier")
        with self.timer.waiting():
            super().barrier(*args, **kwargs)
