"""Run the stages of one training, evaluation or prediction, from its set-up to its tear-down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from lightning_hetero.balance.pipeline.moves import layer_moves
from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.orders.proof import verify_order
from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan
from lightning_hetero.balance.pipeline.stages import Schedule
from lightning_hetero.distributed.collectives import all_gather, broadcast_from
from lightning_hetero.distributed.data import single_process
from lightning_hetero.distributed.pass_timer import PassTimer
from lightning_hetero.distributed.pipeline.batch_stream import end_iterations
from lightning_hetero.distributed.pipeline.moving import digest_of_attributes
from lightning_hetero.distributed.pipeline.passes.channels import open_channels
from lightning_hetero.distributed.pipeline.passes.sharing import foreign_hook
from lightning_hetero.distributed.pipeline.pipeline import Pipeline
from lightning_hetero.distributed.pipeline.placement import Plan, TensorPlacement
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.distributed.step_timer import clock_of
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.pipeline.gradients import Sums, begin_sums, clip_by_norm
from lightning_hetero.plugin.pipeline.hooks.running import HookRunner
from lightning_hetero.plugin.pipeline.layers import layers_of
from lightning_hetero.plugin.pipeline.metrics import PipelineMetrics
from lightning_hetero.plugin.pipeline.refusals import refuse_backend
from lightning_hetero.plugin.pipeline.replicas.left_behind import LeftBehind
from lightning_hetero.plugin.pipeline.replicas.seat import Seat
from lightning_hetero.plugin.pipeline.step import PipelineStep
from lightning_hetero.plugin.pipeline.verification import verify_layers

__all__ = ["Orders", "Runtime"]

LossWeights = Callable[[Sequence[Any], Sequence[int]], "list[float]"]
# one for all, or one for each replica, of which None stands for "1f1b"
Orders = Schedule | Order | tuple[Schedule | Order | None, ...]


class Runtime:
    """The stages of one run, and everything that is overridden on the user's objects for them.

    Args:
        module: The user's LightningModule.
        plan: The stages to begin with, or the replicas and their stages.
        rank: This rank.
        device: This rank's device.
        schedule: Order of the passes: the name of a known one, or an order; with replicas, perhaps one for each.
        split_layers: Numbers of the layers whose backward pass an order may split.
        num_microbatches: Number of micro-batches per step.
        loss_weights: Function that returns the weight of each micro-batch's loss, given the micro-batches and their
            sizes.

    Raises:
        UnsupportedFeatureError: The ranks cannot exchange tensors of the device.

    Attributes:
        found: The model that steps call, and its layers.
        placement: Where the parts of the model live. It outlives the run, because a checkpoint may be saved afterwards.
        metrics: The metrics of the module.
        seat: The place of this rank among the replicas.
        pipeline: The pipeline of this rank's replica, which runs the layers of its stage.
        hooks: The hooks of the module and of callbacks.
        steps: The user's steps on this rank.
        timer: Times this rank's passes, if the stages are watched.
        seed: Seed of the random numbers that are the same on all ranks.
    """

    def __init__(
        self,
        module: LightningModule,
        plan: Plan,
        *,
        rank: int,
        device: torch.device,
        schedule: Orders,
        split_layers: Sequence[int],
        num_microbatches: int,
        loss_weights: LossWeights,
    ) -> None:
        refuse_backend(device)
        self._module = module
        self._rank = rank
        self._device = device
        self._schedule = schedule
        self._split_layers = split_layers
        self._num_microbatches = num_microbatches
        self._loss_weights = loss_weights
        self._overrides = ExitStack()
        self._verified = False
        self.timer = PassTimer(
            partial(clock_of, device, "hetero_pipeline", "Give the stages, for example `splits=[4]`")
        )
        self.found = layers_of(module)
        self.seed = broadcast_from(torch.initial_seed(), 0)
        self.placement = TensorPlacement(module, self.found.layers, plan, device)
        self.seat = Seat(plan, rank)
        self._sums: Sums | None = None
        self.metrics = PipelineMetrics(module, self.seat.leader, is_last=rank == self.seat.leader)
        self._overrides.callback(self.metrics.restore)
        try:
            self.pipeline = self._new_pipeline()
            self.hooks = HookRunner(module, self.found.called, self.placement, self._run_model, rank, device, self.seed)
            self.steps = self._new_steps()
            if plan.world_size > 1:
                self._overrides.enter_context(single_process.installed())
                self.metrics.share = self.hooks.share_value
                self._overrides.enter_context(self.hooks.installed(self._recorded_log))
        except BaseException:
            self._overrides.close()
            raise

    def _new_pipeline(self) -> Pipeline:
        self.seat = seat = Seat(self.placement.plan, self._rank)
        for ranks in seat.pipelines if seat.has_replicas else ():  # every rank opens all of them, in one order
            open_channels(ranks, self._device)
        for last_rank in seat.others:
            open_channels([last_rank, seat.leader], self._device)
        return Pipeline(
            self.found.calls,
            seat.stages,
            (self._schedule[seat.number] or "1f1b") if isinstance(self._schedule, tuple) else self._schedule,
            seat.rank,
            self._device,
            self.timer,
            self._split_layers,
            seat.members,
        )

    def _new_left_behind(self) -> LeftBehind | None:
        """Return what compares the module before and after steps; None without replicas."""
        seat = self.seat
        return LeftBehind(self._module, self.placement, seat, self._rank, self._device) if seat.has_replicas else None

    def _begin_sums(self) -> None:
        self._sums = begin_sums(self.placement)

    def take_sums(self) -> Sums | None:
        """Return what waits for the sums of the latest step's gradients over replicas, once; None if there are none."""
        sums, self._sums = self._sums, None
        return sums

    def _new_steps(self) -> PipelineStep:
        return PipelineStep(
            self._module,
            self.found,
            self.pipeline,
            self.seat,
            self._new_left_behind(),
            self._begin_sums,
            self._num_microbatches,
            self._loss_weights,
            self.metrics,
            self.seed,
            self.hooks.traces,
        )

    def _run_model(self, call: Call) -> Any:
        with self.steps.prepared():
            found = self._evaluate(call)
        return found[0] if found else None

    def _evaluate(self, call: Call) -> list[Any]:
        """Run the layers of the first replica, and return the output on its last rank."""
        return self.pipeline.evaluate(1, [call]) if self.seat.number == 0 else []

    def _recorded_log(self) -> Any:
        return self.steps.recorded_log()

    def verify(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        optimizers: Sequence[Optimizer],
        context: AbstractContextManager[None],
        *,
        training: bool,
    ) -> None:
        """Compare the layers with the model before the first step; every rank must call this at the same point.

        Args:
            step: The user's step.
            args: Arguments of the step, the batch first.
            optimizers: The optimisers.
            context: Context of a step's passes, such as autocast.
            training: Whether the step has backward passes.
        """
        if self._verified or self.found.certain:
            return
        self._verified = True
        call = self.steps.example(step, args, training=training).call
        before = list(self.found.layers)
        with self.steps.prepared(), context:
            self.found.calls.prepare(call)
            if any(a is not b for a, b in zip(before, self.found.layers, strict=True)):  # the order of calls
                self.move(self.placement.plan, optimizers)
            verify_layers(self._module, self.found, self.placement, self._evaluate, self.seat.leader, call)

    def reorder(self, schedule: Orders, split_layers: Sequence[int]) -> None:
        """Run the next stages in another order; every rank must call :meth:`move` afterwards.

        Args:
            schedule: Order of the passes; with replicas, perhaps one for each.
            split_layers: Numbers of the layers whose backward pass the order may split.

        Raises:
            ConfigurationError: In one of the orders ranks would wait for each other for ever; raised on every rank.
        """
        for order in schedule if isinstance(schedule, tuple) else (schedule,):
            if isinstance(order, Order):
                verify_order(order)
        self._schedule, self._split_layers = schedule, split_layers

    def move(self, plan: Plan, optimizers: Sequence[Optimizer]) -> None:
        """Change to other stages; every rank must call this at the same point."""
        self.hooks.traces.equalise()  # while each attribute is still where it has changed
        with torch.inference_mode(False):
            self.placement.move(plan, optimizers, self.found.layers)
        self.hooks.traces.moved()
        self.pipeline = self._new_pipeline()
        self.steps.use(self.pipeline, self.seat, self._new_left_behind())

    def divide(self, plan: ReplicaPlan) -> None:
        """Divide batches otherwise from the next step on; every rank must call this at the same point.

        Args:
            plan: A plan that differs from the current one in nothing but shares.
        """
        self.placement.divide(plan)
        self.seat.divide(plan)

    def why_not_moved(self, plan: Plan, optimizers: Sequence[Optimizer]) -> str | None:
        """Return why layers cannot move without a trace while a training runs, on all ranks; None if they can.

        Every rank must call this at the same point.
        """
        traces, placement = self.hooks.traces, self.placement
        traces.equalise()
        moves = layer_moves(placement.plan, plan)
        parts = placement.modules_of_layers([move.layer for move in moves])
        reason = placement.why_not_moved(plan, optimizers) or traces.why_not_moved(parts) or self._hook_on_shared(plan)
        gathered = all_gather((reason, [self._kept_beside(move.layer) for move in moves]))
        for number, move in enumerate(moves):
            if gathered[move.source][1][number] != gathered[move.target][1][number]:
                reason = f"layer {move.layer}, which the model does not contain, keeps what it has computed"
        return next((found for found, _ in gathered if found is not None), reason)

    def _hook_on_shared(self, plan: Plan) -> str | None:
        for layer in plan.shared:
            hook = foreign_hook(self.found.layers[layer])
            if hook is not None:
                return f"two ranks would share layer {layer}, on which the hook {hook!r} was registered"
        return None

    def _kept_beside(self, layer: int) -> bytes:
        """Return a digest of what modules of a layer keep that are none of the model's, but made for the pipeline."""
        known = {id(part) for part in self._module.modules()}
        return digest_of_attributes(part for part in self.found.layers[layer].modules() if id(part) not in known)

    # ---- what is overridden ----------------------------------------------------------------------------------------

    def clip_whole_model(self, precision: Precision) -> None:
        """Clip by the norm of the whole model when Lightning asks ``precision`` to clip gradients by norm."""
        by_value = precision.clip_grad_by_value

        def clip_norm(optimizer: Optimizer, clip_val: float) -> None:
            clip_by_norm(optimizer, clip_val, self.placement, self._device)

        def clip_value(optimizer: Optimizer, clip_val: float) -> None:
            # torch fails without any gradient, which a rank may be that has frozen layers only
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                by_value(optimizer, clip_val)

        self._overrides.enter_context(overridden(precision, "clip_grad_by_norm", clip_norm))
        self._overrides.enter_context(overridden(precision, "clip_grad_by_value", clip_value))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def close(self, *, complete: bool) -> None:
        """Restore the user's objects; the placement stays, since a checkpoint may be saved after the run.

        Args:
            complete: Whether every rank gets the whole model back; every rank must then call this at the same point.
        """
        try:
            if complete:
                end_iterations()
                self.hooks.traces.equalise()
                self.placement.complete()
        finally:
            self._overrides.close()
