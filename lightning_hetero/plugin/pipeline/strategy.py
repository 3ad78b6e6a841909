"""``hetero_pipeline``: the layers of a model are split over devices, as many for each as its speed deserves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
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
from lightning_hetero.balance.pipeline.stages import Schedule, StagePlan
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.hardware.memory import state_per_parameter
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.base_strategy import BaseStrategy
from lightning_hetero.plugin.common.lightning_private import samplers_stay
from lightning_hetero.plugin.pipeline.data import PipelineData
from lightning_hetero.plugin.pipeline.gradients import with_tied_combined
from lightning_hetero.plugin.pipeline.layers import layers_of
from lightning_hetero.plugin.pipeline.optimizer_state import gathered_state, own_state
from lightning_hetero.plugin.pipeline.planning import (
    PipelineFindings,
    budget_bytes,
    find_stages,
    first_plan,
    report_findings,
)
from lightning_hetero.plugin.pipeline.refusals import refuse_optimizers, refuse_saving, refuse_training
from lightning_hetero.plugin.pipeline.runtime import Runtime, not_moved_to_cpu
from lightning_hetero.plugin.step.gradients import Gradients, put_back, taken_aside
from lightning_hetero.plugin.step.loss_weights import loss_weights
from lightning_hetero.plugin.step.seeded import seeded

__all__ = ["HeteroPipelineStrategy"]


class HeteroPipelineStrategy(BaseStrategy):
    """Model-parallel training in which a device twice as fast gets twice the layers.

    ``self.model`` of the LightningModule is an ``nn.Sequential``, or it or the module defines ``pipeline_layers()``,
    the list of layers that are called one after the other. Steps call the model exactly once. Layers exchange tensors,
    in tuples, lists and dicts. The last stage runs on rank 0, where losses are computed; it loads the data. What a step
    has returned and logged is known to all ranks; what it collects in the module is on rank 0, so hooks of the module
    at the end of an epoch run there, and all ranks log what they log.

    Args:
        splits: Where the layers are divided: a list has the first layer of every stage but the first, so that [4] gives
            the first stage four layers and the second one the others. "auto" times every layer on every rank before the
            first step, and takes the division that is predicted to be fastest; with ``speeds`` it gives each rank
            layers in proportion to them instead.
        speeds: How fast each rank is, one positive number a rank, rank 0 first, so that [2, 1] gives rank 0 twice the
            layers of rank 1.
        num_microbatches: In how many parts a batch goes through the stages; more of them leave the stages less idle.
        schedule: "1f1b" holds the activations of as many micro-batches as there are stages, "gpipe" of all.
        loss_reduction: "mean" if the training loss is a mean over the batch, "sum" if it is a sum.
        num_loss_terms: Counts the terms that the training loss averages over, given a micro-batch, where that is not
            the number of samples: tokens that are not padding. In YAML it is an import path, for example
            my_package.count_tokens.
        max_memory_bytes: What each rank may hold, a number for all or one a rank; None for 92 % of what a GPU has for
            this process, and for no limit on processors. Only what is measured is planned accordingly.
        verbose: Whether to print the stages that were found, and what is predicted of them.
        start_method: How ranks are started: "popen" runs the script again on each; the others are those of Python's
            multiprocessing.
        timeout: How long ranks wait for each other.
        process_group_backend: What ranks talk through, "gloo" or "nccl"; by default what suits the accelerator.
        cluster_environment: Lightning's plugin that knows the ranks; by default the one of the cluster it runs on.
        checkpoint_io: Lightning's plugin that writes and reads checkpoints.
        precision_plugin: Lightning's plugin for the Trainer's ``precision``, which sets it.
        accelerator: Of the devices; the Trainer sets it.
        parallel_devices: Of the ranks on this machine; the Trainer sets them.
        **unknown: Refused, with the name that was probably meant.

    Raises:
        ConfigurationError: an argument breaks its rule.

    Attributes:
        plan: The stages; None before set-up.
        findings: What was measured and is predicted; None where nothing was measured.
    """

    strategy_name = "hetero_pipeline"

    def __init__(
        self,
        splits: Literal["auto"] | list[int] = "auto",
        speeds: list[float] | None = None,
        num_microbatches: int = 4,
        schedule: Schedule = "1f1b",
        loss_reduction: Literal["mean", "sum"] = "mean",
        num_loss_terms: Callable[[Any], int] | None = None,
        max_memory_bytes: int | list[int] | None = None,
        verbose: bool = True,
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
        arguments.check_choice("schedule", schedule, ("1f1b", "gpipe"))
        arguments.check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        arguments.check_splits(splits)
        if speeds is not None:
            arguments.check_numbers("speeds", speeds)
        if splits != "auto" and speeds is not None:
            raise ConfigurationError("`speeds` must be None where `splits` says how the layers are divided. Give one.")
        arguments.check_num_loss_terms(num_loss_terms, loss_reduction)
        arguments.check_caps("max_memory_bytes", max_memory_bytes, by_name=False)
        arguments.check_bool("verbose", verbose)
        # not all of DDP's arguments: no DDP is here to follow them
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
        self.verbose = verbose
        self.plan: StagePlan | None = None
        self.findings: PipelineFindings | None = None
        self._data: PipelineData | None = None
        self._runtime: Runtime | None = None
        self._batches = 0
        self._step_gradients: Gradients = []

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def check_world_size(self, world_size: int) -> None:
        arguments.check_splits(self.splits, world_size)
        if self.speeds is not None:
            arguments.check_numbers("speeds", self.speeds, world_size)
        arguments.check_caps("max_memory_bytes", self.max_memory_bytes, 1, world_size, by_name=False)

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._data = PipelineData(model.trainer)
        # Every rank works on the same batches, so none may get a sampler of its own.
        # tests/plugin/pipeline/test_pipeline.py compares the order of samples with that of a single process.
        samplers_stay(model.trainer)
        if model.trainer.state.fn == TrainerFn.FITTING:
            callbacks = model.trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
            refuse_training(model, callbacks, self.precision_plugin.precision, self.world_size)

    @override
    def setup_distributed(self) -> None:
        with isolate_rng():  # DDP seeds anew here; a single process does not, and shuffles accordingly
            super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        # as DDPStrategy, without what wraps and synchronises a whole module
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
        _, layers = layers_of(self._module)
        found = None if self.findings is None else self.findings.plan
        self.plan = first_plan(len(layers), self.world_size, self.splits, self.speeds, found)
        self._batches = 0
        self._runtime = Runtime(
            self._module,
            self.plan,
            rank=self.global_rank,
            device=self.root_device,
            schedule=self.schedule,
            num_microbatches=self.num_microbatches,
            loss_weights=partial(loss_weights, loss_reduction=self.loss_reduction, num_loss_terms=self.num_loss_terms),
        )

    def _plan_by_measuring(self, step: Any, args: tuple[Any, ...], *, training: bool) -> None:
        """Change to the best stages before the first step that is not a check of the validation loop."""
        if (
            self.splits != "auto"
            or self.speeds is not None
            or self.world_size == 1
            or self._module.trainer.sanity_checking
            or (self.findings is not None and (self.findings.training or not training))
        ):
            return
        running = self._running
        example = running.steps.example(step, args, training=training)
        with self.precision_plugin.train_step_context() if training else self.precision_plugin.val_step_context():
            self.findings = find_stages(
                running.placement,
                running.layers,
                example,
                self.schedule,
                self.root_device,
                budget_bytes(self.max_memory_bytes, self.global_rank, self.root_device),
                max((state_per_parameter(optimizer) for optimizer in self.optimizers), default=0.0),
            )
        self.plan = self.findings.plan
        if self.plan != running.placement.plan:
            running.move(self.plan, self.optimizers)
        if self.verbose:
            report_findings(self._module.trainer, self.findings)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        refuse_optimizers(self.optimizers)

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        self._running.clip_whole_model(self.precision_plugin)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self._loaders.process(super().process_dataloader(dataloader))

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self._batches += 1
        with seeded(
            self._running.seed, self._batches
        ):  # hooks that change a batch at random change it alike on all ranks
            return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_rank:  # dropout of one stage must not repeat that of another; rank 0 shuffles
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        else:
            self._loaders.go_on()

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        accumulated = self._module.trainer.accumulate_grad_batches
        self._plan_by_measuring(self._module.training_step, args, training=True)
        running = self._running
        with (
            failure_of_peers(),
            self.precision_plugin.train_step_context(),
            taken_aside(running.placement.parameters) as gradients,
        ):
            output = running.steps.train(self._module.training_step, args, accumulated)
        self._step_gradients = gradients
        return output

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Put the gradients, which the stages have computed within the step, where optimisers look for them."""
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        gradients, self._step_gradients = self._step_gradients, []
        put_back(with_tied_combined(gradients, self._running.placement))
        return self.precision_plugin.post_backward(loss, self._module)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.validation_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.val_step_context():
            return self._running.steps.evaluate(self._module.validation_step, args, logs=True)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.test_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.test_step_context():
            return self._running.steps.evaluate(self._module.test_step, args, logs=True)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.predict_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.predict_step_context():
            return self._running.steps.evaluate(self._module.predict_step, args, logs=False)

    @property
    @override
    def is_alone(self) -> bool:
        # what one rank runs alone, it runs as one device: its peers would not answer
        return super().is_alone or (self._runtime is not None and self._runtime.metrics.is_alone)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return ``tensor``, as on one device: every sample is on every rank."""
        return tensor

    def record_step(self) -> None:
        """Note who computes what when; every rank has to call it at the same point."""
        self._running.pipeline.record()

    def recorded_step(self) -> Timeline:
        """Return what was noted; every rank has to call it at the same point."""
        return self._running.pipeline.stop_recording()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def loaders_state(self) -> Any:
        return [] if self._data is None else self._data.state()  # as in the process that has spawned the ranks

    @override
    def load_loaders_state(self, state: Any) -> None:
        self._loaders.load(state)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.world_size > 1 and (self._failed or super().is_alone):
            refuse_saving(None if self._failed else sys.exc_info()[1], self.on_exception)
        # the process that has spawned the ranks has no part of the model, but all of it
        runtime = self._runtime
        return super().lightning_module_state_dict() if runtime is None else runtime.placement.state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self._running.placement.load(checkpoint["state_dict"], strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        runtime = self._runtime
        return optimizer.state_dict() if runtime is None else gathered_state(optimizer, runtime.placement)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        own = [
            own_state(optimizer, saved, self._running.placement)
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own})

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        module, runtime = self.lightning_module, self._runtime
        stays = module is not None and self._failed
        if runtime is not None:
            if not stays:
                runtime.placement.complete()
            runtime.close()  # the placement stays: after the run, too, a checkpoint may be saved
        if stays:
            self._runtime = None
        with not_moved_to_cpu(self._module) if stays else nullcontext():
            super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _loaders(self) -> PipelineData:
        assert self._data is not None
        return self._data

    @property
    def _running(self) -> Runtime:
        assert self._runtime is not None
        return self._runtime
