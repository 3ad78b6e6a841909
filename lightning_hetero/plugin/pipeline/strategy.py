"""``hetero_pipeline``: the layers of a model are split over devices, as many for each as its speed deserves."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import OnExceptionCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stage_solver import solve_stages, uniform_stages
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.distributed.pipeline.pipeline import Pipeline
from lightning_hetero.distributed.pipeline.placement import TensorPlacement, gather_on_rank_zero
from lightning_hetero.exceptions import ConfigurationError, RankFailedError, UnsupportedFeatureError
from lightning_hetero.hardware.memory import meter_of, state_per_parameter
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.base_strategy import BaseStrategy
from lightning_hetero.plugin.common.console import say
from lightning_hetero.plugin.pipeline.data import PipelineData
from lightning_hetero.plugin.pipeline.layers import layers_of
from lightning_hetero.plugin.pipeline.metrics import PipelineMetrics
from lightning_hetero.plugin.pipeline.planning import PipelineFindings, find_stages
from lightning_hetero.plugin.pipeline.step import PipelineStep
from lightning_hetero.plugin.step.gradients import Gradients, put_back, taken_aside
from lightning_hetero.plugin.step.seeded import seeded

__all__ = ["HeteroPipelineStrategy"]

_log = logging.getLogger(__name__)

_MEMORY_FRACTION = 0.92
_END_OF_EPOCH = tuple(f"on_{stage}_epoch_end" for stage in ("train", "validation", "test", "predict"))


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
        # not all of DDP's arguments: there is no DDP here that would follow them
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
        self._placement: TensorPlacement | None = None
        self._metrics: PipelineMetrics | None = None
        self._pipeline: Pipeline | None = None
        self._steps: PipelineStep | None = None
        self._data: PipelineData | None = None
        self._seed = 0
        self._batches = 0
        self._aside: Gradients = []

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
        # every rank works on the same batches, so none may get a sampler of its own; nothing public says so for a
        # subclass of DDPStrategy. tests/plugin/pipeline/test_pipeline.py compares the order of samples with a process.
        model.trainer._accelerator_connector.use_distributed_sampler = False
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._refuse_what_cannot_be_split(model)

    def _refuse_what_cannot_be_split(self, module: LightningModule) -> None:
        reason = None
        if not module.automatic_optimization:
            reason = "manual optimisation runs backward passes of its own"
        elif self.precision_plugin.precision == "16-mixed":
            reason = (
                'precision "16-mixed" scales the loss, and stages would have to agree when to skip; use "bf16-mixed"'
            )
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]  # public, but not annotated
            name = type(callback).__name__
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                reason = f"{name} copies the whole model, of which a rank has a part"
            if self.world_size > 1 and (
                isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
            ):
                reason = (
                    f"{name} saves where a rank has failed, and the layers of other ranks may be gone then; save while"
                    f" training, with ModelCheckpoint(every_n_train_steps=...)"
                )
        if reason is not None:
            raise UnsupportedFeatureError(f"`hetero_pipeline` cannot train this: {reason}.")

    @override
    def setup_distributed(self) -> None:
        with isolate_rng():  # DDP seeds anew here; a single process does not, and shuffles accordingly
            super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        # as DDPStrategy, without what wraps and synchronises a whole module
        assert self.accelerator is not None
        # all ranks log the same values, so the advice to synchronise them is wrong here
        warnings.filterwarnings("ignore", "It is recommended to use `self.log")
        self.accelerator.setup(trainer)
        self.precision_plugin.convert_module(self._module)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        module = self._module
        _, layers = layers_of(module)
        self.plan = self._first_plan(len(layers))
        self._seed = broadcast_from(torch.initial_seed(), 0)
        self._batches = 0
        self._placement = TensorPlacement(module, layers, self.plan, self.root_device)
        last_rank = self.plan.ranks[-1]
        self._metrics = PipelineMetrics(module, last_rank, is_last=self.global_rank == last_rank)
        self._run_stages_of(self._placement)
        self._run_where_steps_end(module)

    def _run_stages_of(self, placement: TensorPlacement) -> None:
        called, _ = layers_of(self._module)
        if self._pipeline is not None:
            self._pipeline.close()
        self._pipeline = pipeline = Pipeline(
            placement.own_layers, placement.plan, self.schedule, self.global_rank, self.root_device
        )
        self._steps = PipelineStep(
            self._module, called, pipeline, self.num_microbatches, self._loss_weights, self._the_metrics, self._seed
        )

    def _run_where_steps_end(self, module: LightningModule) -> None:
        """Have hooks at the end of an epoch, which use what steps have collected, run where steps have."""

        def where_steps_end(hook: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with self._the_steps.collected() as here:
                    return hook() if here else None

            return run

        for name in _END_OF_EPOCH:
            if is_overridden(name, module):
                # Lightning calls what it finds on the instance
                module.__dict__[name] = where_steps_end(getattr(module, name))

    def _first_plan(self, num_layers: int) -> StagePlan:
        uniform = uniform_stages(num_layers, self.world_size)
        if self.splits != "auto":
            ends = (*self.splits, num_layers)
            if self.splits and self.splits[-1] >= num_layers:
                raise ConfigurationError(
                    f"`splits` must be layers of the model, of which there are {num_layers}, got {self.splits}."
                )
            return StagePlan(uniform.ranks, ends)
        if self.speeds is not None:
            return solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * num_layers, self.speeds))
        found = self.findings
        return found.plan if found is not None and _fits(found.plan, uniform) else uniform

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
        placement = self._the_placement
        example = self._the_steps.example(step, args, training=training)
        with self.precision_plugin.train_step_context() if training else self.precision_plugin.val_step_context():
            self.findings = find_stages(
                placement, layers_of(self._module)[1], example, self.schedule, self.root_device, self._budget_bytes(),
                max((state_per_parameter(optimizer) for optimizer in self.optimizers), default=0.0),
            )  # fmt: skip
        self.plan = self.findings.plan
        if self.plan != placement.plan:
            with torch.inference_mode(False):
                placement.move(self.plan, self.optimizers)
            self._run_stages_of(placement)
        self._tell_findings(self.findings)

    def _budget_bytes(self) -> float | None:
        given = self.max_memory_bytes
        if given is not None:
            return float(given if isinstance(given, int) else given[self.global_rank])
        meter = meter_of(self.root_device)
        use = None if meter is None else meter.read()
        return None if use is None else _MEMORY_FRACTION * use.available_bytes

    def _tell_findings(self, findings: PipelineFindings) -> None:
        if not self.verbose:
            return
        plan = findings.plan
        for sentence in (
            f"{list(plan.layers_of_ranks)} layers a rank, in the order of ranks {list(plan.ranks)}",
            *findings.advice.sentences(),
        ):
            say(self._module.trainer, f"hetero_pipeline: {sentence}")
        warning = findings.advice.warning()
        if warning is not None:
            rank_zero_warn(f"hetero_pipeline: {warning}")

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise UnsupportedFeatureError(
                "`hetero_pipeline` cannot train with LBFGS, which runs the step several times and compares gradients of"
                " all parameters. Use another optimiser."
            )

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        # clipping by norm is of the whole model's norm; Lightning asks the precision plugin for it
        self.precision_plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]

    @override
    def process_dataloader(self, dataloader: object) -> object:
        return self._the_data.process(super().process_dataloader(dataloader))

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self._batches += 1
        with seeded(self._seed, self._batches):  # hooks that change a batch at random change it alike on all ranks
            return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_rank:  # dropout of one stage must not repeat that of another; rank 0 shuffles
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        else:
            self._the_data.go_on()

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        accumulated = self._module.trainer.accumulate_grad_batches
        self._plan_by_measuring(self._module.training_step, args, training=True)
        gradients = taken_aside(self._the_placement.parameters)
        with failure_of_peers(), self.precision_plugin.train_step_context(), gradients as aside:
            output = self._the_steps.train(self._module.training_step, args, accumulated)
        self._aside = aside
        return output

    def _loss_weights(self, parts: Sequence[Any], sizes: Sequence[int]) -> list[float]:
        if self.loss_reduction == "sum":
            return [1.0] * len(parts)
        terms = sizes if self.num_loss_terms is None else [self.num_loss_terms(part) for part in parts]
        return [n / max(sum(terms), 1) for n in terms]

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Put the gradients, which the stages have computed within the step, where optimisers look for them."""
        loss = self.precision_plugin.pre_backward(closure_loss, self._module)
        aside, self._aside = self._aside, []
        put_back(self._combined(aside))
        return self.precision_plugin.post_backward(loss, self._module)

    def _combined(self, gradients: Gradients) -> Gradients:
        """Add up the gradients of parameters that several stages use."""
        found = {id(parameter): gradient for parameter, gradient in gradients}
        shared: Gradients = []
        for parameter, group in self._the_placement.tied:
            if parameter.requires_grad:
                gradient = found.get(id(parameter), torch.zeros_like(parameter))
                dist.all_reduce(gradient, group=group)
                shared.append((parameter, gradient))
        tied = {id(parameter) for parameter, _ in shared}
        return [*((p, g) for p, g in gradients if id(p) not in tied), *shared]

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = [p.grad.square().sum() for p in own if self._the_placement.counts(p)]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.root_device)
        total = total.to(torch.float64) if self.root_device.type == "cpu" else total.float()
        dist.all_reduce(total)
        nn.utils.clip_grads_with_norm_(own, clip_val, total.sqrt())

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.validation_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.val_step_context():
            return self._the_steps.evaluate(self._module.validation_step, args, logs=True)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.test_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.test_step_context():
            return self._the_steps.evaluate(self._module.test_step, args, logs=True)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._plan_by_measuring(self._module.predict_step, args, training=False)
        with failure_of_peers(), self.precision_plugin.predict_step_context():
            return self._the_steps.evaluate(self._module.predict_step, args, logs=False)

    # What one rank runs alone, it runs as one device: its peers would not answer.

    @property
    @override
    def is_alone(self) -> bool:
        return super().is_alone or (self._metrics is not None and self._metrics.is_alone)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return ``tensor``, as on one device: every sample is on every rank."""
        return tensor

    # ---- what a recorder needs ---------------------------------------------------------------------------------------

    def record_step(self) -> None:
        """Note who computes what when from now on; every rank has to call it at the same point."""
        self._the_pipeline.record()

    def recorded_step(self) -> Timeline:
        """Return what was noted; every rank has to call it at the same point."""
        return self._the_pipeline.stop_recording()

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
        self._the_data.load(state)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._refuse_after_failure()
        # the process that has spawned the ranks has no part of the model, but all of it
        return super().lightning_module_state_dict() if self._placement is None else self._placement.state_dict()

    def _refuse_after_failure(self) -> None:
        if self.world_size == 1 or not (self._failed or super().is_alone):
            return
        reason = (
            "`hetero_pipeline` cannot save once a run has failed: the layers of other ranks may be gone. Save while"
            " training, with ModelCheckpoint(every_n_train_steps=...)."
        )
        failure = sys.exc_info()[1]
        if self._failed or failure is None:
            raise RankFailedError(reason)
        # A callback saves, before Lightning tells the strategy. It must not go on as if it had saved, and what the user
        # sees in the end should be why the run has failed.
        self.on_exception(failure)
        _log.error(reason)
        raise failure

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self._the_placement.load(checkpoint["state_dict"], strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        if self._placement is None:
            return state
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = {i: value for i, value in state["state"].items() if self._the_placement.owns(parameters[i])}
        parts = gather_on_rank_zero(own)
        if parts is None:
            return {}
        merged = {i: value for part in reversed(parts) for i, value in part.items()}
        return {**state, "state": {i: merged[i] for i in sorted(merged)}}

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        # torch puts a state where its parameter is, and one that is elsewhere has no place
        own = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {i: state for i, state in saved["state"].items() if self._the_placement.owns(parameters[i])}
            own.append({**saved, "state": states})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own})

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        if self._metrics is not None:
            self._metrics.restore()
        for name in _END_OF_EPOCH if self.lightning_module is not None else ():
            self._module.__dict__.pop(name, None)
        module = self.lightning_module
        if module is not None and self._failed:
            # peers may not come here, so the module stays without what they have, and cannot be moved as a whole
            module.__dict__["cpu"] = lambda: module
            self._placement = None
        elif self._placement is not None:
            self._placement.complete()
        if self._pipeline is not None:
            self._pipeline.close()
        # the placement stays: behind the run, too, a checkpoint may be saved
        self._steps = self._metrics = self._pipeline = None
        try:
            super().teardown()
        finally:
            if module is not None:
                module.__dict__.pop("cpu", None)

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _the_data(self) -> PipelineData:
        assert self._data is not None
        return self._data

    @property
    def _the_placement(self) -> TensorPlacement:
        assert self._placement is not None
        return self._placement

    @property
    def _the_pipeline(self) -> Pipeline:
        assert self._pipeline is not None
        return self._pipeline

    @property
    def _the_metrics(self) -> PipelineMetrics:
        assert self._metrics is not None
        return self._metrics

    @property
    def _the_steps(self) -> PipelineStep:
        assert self._steps is not None
        return self._steps


def _fits(plan: StagePlan, uniform: StagePlan) -> bool:
    """Return whether a plan is of the present ranks and layers."""
    return (plan.num_stages, plan.num_layers) == (uniform.num_stages, uniform.num_layers)
