"""``hetero_pipeline``: model-parallel training in which a device twice as fast gets twice the layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stages import WantedSchedule, known_schedule
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.lightning_private import samplers_stay
from lightning_hetero.plugin.common.parts_of_model import not_moved_to_cpu
from lightning_hetero.plugin.pipeline.data import PipelineData
from lightning_hetero.plugin.pipeline.gradients import with_tied_combined
from lightning_hetero.plugin.pipeline.layers import layers_of
from lightning_hetero.plugin.pipeline.refusals import (
    refuse_foreign_parameters,
    refuse_optimizers,
    refuse_tensor_hooks,
    refuse_training,
)
from lightning_hetero.plugin.pipeline.replicas.arguments import check_division, check_replicas
from lightning_hetero.plugin.pipeline.runtime import Orders, Runtime
from lightning_hetero.plugin.pipeline.watching.strategy import WatchingStrategy
from lightning_hetero.plugin.step.gradients import Gradients, put_back, taken_aside
from lightning_hetero.plugin.step.loss_weights import loss_weights
from lightning_hetero.plugin.step.seeded import seeded

__all__ = ["HeteroPipelineStrategy"]


class HeteroPipelineStrategy(WatchingStrategy):
    """Model-parallel training in which a device twice as fast gets twice the layers.

    ``self.model`` is a model of several blocks, for example of transformers, or an ``nn.Sequential``, or it or the
    module defines ``pipeline_layers()``. Steps call the model exactly once. Rank 0 runs the last stage, loads the data
    and computes the losses. All ranks know what a step returns and logs. Hooks run on all ranks, with what steps have
    collected in the module.

    Args:
        splits: Where the layers are divided. A list holds the first layer of every stage but the first: [4] gives the
            first stage four layers and the second stage the rest. "auto" times every layer on every rank before the
            first step, and takes the division that is predicted to be fastest; with ``speeds`` it divides the layers in
            proportion to them instead.
        speeds: Relative speed of each rank, one positive number per rank: [2, 1] gives rank 0 twice rank 1's layers.
        num_microbatches: Number of micro-batches per step. With more of them, the stages are less idle.
        schedule: Order of passes. "1f1b" holds the activations of as many micro-batches as stages, "gpipe" of all. In a
            "v", rank 0 has both ends of the model, so it also computes while a step begins and ends; it holds more
            micro-batches, as far as memory allows, and each rank may compute gradients of parameters later than those
            that other ranks wait for. "auto" takes "1f1b" unless another order is predicted to be more than 2 % faster,
            and where `splits` or `speeds` give the stages. In such an order, two ranks may share the layer between
            them: each runs it for some of the micro-batches. If its steps take longer than those of "1f1b" would, it
            changes to that. With several `replicas`, the order of each is planned, the first rank of each has both ends
            in a "v", and no layers are shared.
        loss_reduction: How the training loss is reduced over a batch, "mean" or "sum".
        num_loss_terms: Function that takes a micro-batch and returns the number of terms over which the training loss
            is averaged, or the sum of their weights. Give it if these terms are not the samples but, for example,
            tokens without padding. In YAML it is an import path, for example my_package.count_tokens.
        max_memory_bytes: Memory that each rank may use, one number for all or one per rank. By default it is 92 % of
            what a GPU has for this process, and unlimited on processors. Only stages found by timing respect it.
        min_gain: Minimum predicted gain that justifies moving layers to other ranks, or samples to other replicas,
            while the training runs, because a device has become slower or faster; 0.05 is 5 % more samples/s.
        watch_steps: Number of training steps per window while watching for such changes. The ranks exchange a few
            numbers after each window, at most about four times per second. 0 leaves layers and samples where they are.
            Stages given by ``splits`` or ``speeds`` are not watched.
        verbose: Whether to print the stages that were found, the predictions for them, and what moves.
        replicas: Pipelines that train the model side by side, each on its part of every batch. "auto" asks for as many
            as are predicted to be fastest, a number for that many, and a list holds the ranks of each, for example
            [[0, 3], [1, 2]], first the one with its last stage. Each has stages of its own, and gets samples in
            proportion to its throughput.
        start_method: How ranks are started. "popen" runs the script again; the others are those of multiprocessing.
        timeout: How long ranks wait for each other.
        process_group_backend: How ranks communicate, "gloo" or "nccl"; by default it fits the accelerator.
        cluster_environment: Lightning's plugin that knows the ranks; by default that of the current cluster.
        checkpoint_io: Lightning's plugin that writes and reads checkpoints.
        precision_plugin: Lightning's plugin for the Trainer's ``precision``; the Trainer sets it.
        accelerator: Accelerator of the devices; the Trainer sets it.
        parallel_devices: Devices of the ranks on this machine; the Trainer sets them.
        **unknown: Refused with an error that suggests the name that was probably meant.

    Raises:
        ConfigurationError: An argument breaks its rule.

    Attributes:
        plan: The stages; None before set-up, and with several replicas.
        replica_plan: The replicas and their stages; None before set-up, and if there is one pipeline.
        findings: The measurements and predictions; None if nothing was measured, and with several replicas.
        replica_findings: The same for replicas.
        changes: The changes of stages, and of the shares of replicas, during the training.

    Example::

        trainer = Trainer(strategy=HeteroPipelineStrategy(num_microbatches=8), devices=2)
    """

    strategy_name = "hetero_pipeline"

    def __init__(
        self,
        splits: Literal["auto"] | list[int] = "auto",
        speeds: list[float] | None = None,
        num_microbatches: int = 4,
        schedule: WantedSchedule = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        num_loss_terms: Callable[[Any], float] | None = None,
        max_memory_bytes: int | list[int] | None = None,
        min_gain: float = 0.05,
        watch_steps: int = 10,
        verbose: bool = True,
        replicas: int | Literal["auto"] | list[list[int]] = 1,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        timeout: timedelta | None = default_pg_timeout,
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        **unknown: Any,
    ) -> None:
        arguments.check_at_least("num_microbatches", num_microbatches, 1)
        check_division(splits, speeds, schedule, replicas)
        arguments.check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        arguments.check_num_loss_terms(num_loss_terms, loss_reduction)
        arguments.check_caps("max_memory_bytes", max_memory_bytes, by_name=False)
        arguments.check_at_least("min_gain", min_gain, 0, whole=False)
        arguments.check_at_least("watch_steps", watch_steps, 0)
        arguments.check_bool("verbose", verbose)
        # not all of DDP's arguments, because no DDP uses them here
        launching: dict[str, Any] = {
            "accelerator": accelerator,
            "parallel_devices": parallel_devices,
            "cluster_environment": cluster_environment,
            "checkpoint_io": checkpoint_io,
            "precision_plugin": precision_plugin,
            "process_group_backend": process_group_backend,
            "timeout": timeout,
            "start_method": start_method,
        }
        self._check_keywords(
            {**launching, **unknown}, not_wrapped="ranks have different layers, so no gradients are averaged"
        )
        super().__init__(**launching)
        self.splits = splits
        self.speeds = speeds
        self.num_microbatches = num_microbatches
        self.schedule = schedule
        self.loss_reduction = loss_reduction
        self.num_loss_terms = num_loss_terms
        self.max_memory_bytes = max_memory_bytes
        self.min_gain = min_gain
        self.watch_steps = watch_steps
        self.verbose = verbose
        self.replicas = replicas
        self.renew()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def check_world_size(self, world_size: int) -> None:
        arguments.check_splits(self.splits, world_size)
        check_replicas(self.replicas, world_size)
        if self.speeds is not None:
            arguments.check_numbers("speeds", self.speeds, world_size)
        arguments.check_caps("max_memory_bytes", self.max_memory_bytes, 1, world_size, by_name=False)

    @override
    def renew(self) -> None:
        super().renew()
        self._data: PipelineData | None = None
        self._runtime: Runtime | None = None
        self._batches = 0
        self._step_gradients: Gradients = []

    @override
    def begin_with(self, trainer: Trainer, model: LightningModule) -> None:
        self._data = PipelineData(trainer)
        # All ranks work on the same batches, so none may get its own sampler; test_pipeline.py compares the order.
        samplers_stay(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            callbacks = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
            refuse_training(model, callbacks, self.precision_plugin.precision, self.world_size)

    @override
    def setup_distributed(self) -> None:
        with isolate_rng():  # DDP seeds again here; a single process does not, and its shuffling must be the same
            super().setup_distributed()

    @override
    @failure_of_peers()
    def setup(self, trainer: Trainer) -> None:
        # as DDPStrategy.setup, without wrapping and synchronising the whole module
        assert self.accelerator is not None
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")  # all ranks log the same values
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self._module)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        if self.world_size > 1:
            refuse_tensor_hooks(self._module)
        plan = self._begin_with(len(layers_of(self._module).layers))
        self._batches = 0
        self._watcher, self._accumulates = None, False
        self._runtime = Runtime(
            self._module,
            plan,
            rank=self.global_rank,
            device=self.root_device,
            schedule=self._first_schedule(),
            split_layers=next((f.split_layers for f in (self.findings, self.replica_findings) if f is not None), ()),
            num_microbatches=self.num_microbatches,
            loss_weights=partial(loss_weights, loss_reduction=self.loss_reduction, num_loss_terms=self.num_loss_terms),
        )

    def _first_schedule(self) -> Orders:
        """Return the order of the passes of the stages to begin with."""
        if self.replica_findings is not None and self.replica_plan == self.replica_findings.plan:
            return self.replica_findings.orders
        if self.findings is not None and self.findings.order is not None and self.plan == self.findings.plan:
            return self.findings.order
        return known_schedule(self.schedule)

    @override
    def _context_of(self, *, training: bool) -> AbstractContextManager[None]:
        return self.precision_plugin.train_step_context() if training else self.precision_plugin.val_step_context()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.world_size > 1:
            refuse_optimizers(self.optimizers)
        if self.replica_plan is not None:
            refuse_foreign_parameters(self._module, self.optimizers)

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        self._running.clip_whole_model(self.precision_plugin)

    @override
    @failure_of_peers()
    def process_dataloader(self, dataloader: object) -> object:
        dataloader = super().process_dataloader(dataloader)
        return dataloader if self._data is None else self._data.process(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self._batches += 1
        # hooks that change a batch at random must change it in the same way on all ranks
        with seeded(self._running.seed, self._batches):
            return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.world_size > 1:
            refuse_tensor_hooks(self._module)  # registered in hooks
        if self.global_rank:  # dropout of one stage must not repeat that of another; rank 0 shuffles
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        elif self._data is not None:
            self._data.go_on()

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    @failure_of_peers()
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare(self._module.training_step, args, training=True)
        running, accumulated = self._running, self._module.trainer.accumulate_grad_batches
        with (
            self.precision_plugin.train_step_context(),
            taken_aside(running.placement.parameters) as gradients,
        ):
            output = running.steps.train(self._module.training_step, args, accumulated)
        self._step_gradients = gradients
        self._finish()
        return output

    @override
    @failure_of_peers()
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        for arrived in [copies.send() for copies in self._running.placement.copies]:
            arrived()
        self._accumulates = False
        return output

    @override
    @failure_of_peers()
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Hand the optimisers the gradients that the stages have computed within the step."""
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        gradients, self._step_gradients = self._step_gradients, []
        put_back(with_tied_combined(gradients, self._running.placement, self._running.take_sums()))
        return self.precision_plugin.post_backward(loss, self._module)

    @override
    @failure_of_peers()
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare(self._module.validation_step, args, training=False)
        with self.precision_plugin.val_step_context():
            return self._running.steps.evaluate(self._module.validation_step, args, logs=True)

    @override
    @failure_of_peers()
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare(self._module.test_step, args, training=False)
        with self.precision_plugin.test_step_context():
            return self._running.steps.evaluate(self._module.test_step, args, logs=True)

    @override
    @failure_of_peers()
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare(self._module.predict_step, args, training=False)
        with self.precision_plugin.predict_step_context():
            return self._running.steps.evaluate(self._module.predict_step, args, logs=False)

    @property
    @override
    def is_alone(self) -> bool:
        # code that one rank runs alone must run as on one device: the peers would not answer
        return super().is_alone or (self._runtime is not None and self._runtime.metrics.is_alone)

    @property
    @override
    def runtime(self) -> Runtime | None:
        return self._runtime

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return ``tensor`` as it is, as on one device: every rank has every sample."""
        return tensor

    def record_step(self) -> None:
        """Record when each stage computes what; every rank must call this at the same point."""
        self._running.pipeline.record()

    def recorded_step(self) -> Timeline:
        """Return what was recorded; every rank must call this at the same point."""
        return self._running.pipeline.stop_recording()

    @override
    def loaders_state(self) -> Any:
        return [] if self._data is None else self._data.state()  # None in the process that has spawned the ranks

    @override
    def load_loaders_state(self, state: Any) -> None:
        if self._data is not None:
            self._data.load(state)

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        module, runtime = self.lightning_module, self._runtime
        stays = module is not None and self._failed
        if runtime is not None:
            runtime.close(complete=not stays)
        if stays:
            self._runtime = None
        with not_moved_to_cpu(self._module) if stays else nullcontext():
            super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _running(self) -> Runtime:
        assert self._runtime is not None
        return self._runtime
