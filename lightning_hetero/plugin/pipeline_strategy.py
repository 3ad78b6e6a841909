"""``hetero_pipeline``: the layers of a model are split over devices, as many for each as its speed deserves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_hetero.balance.stage_solver import solve_stages, uniform_stages
from lightning_hetero.balance.stages import LayerCosts, Schedule, StagePlan
from lightning_hetero.distributed.pipeline import Pipeline
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.plugin import arguments
from lightning_hetero.plugin.gradients import Gradients, put_back, taken_aside
from lightning_hetero.plugin.pipeline_model import PipelineModel, gather_on_zero, layers_of
from lightning_hetero.plugin.pipeline_step import PipelineStep
from lightning_hetero.plugin.rank_zero_batches import RankZeroBatches

__all__ = ["HeteroPipelineStrategy"]


class HeteroPipelineStrategy(DDPStrategy):
    """Model-parallel training in which a device twice as fast gets twice the layers.

    ``self.model`` of the LightningModule is an ``nn.Sequential``, or it or the module defines ``pipeline_layers()``,
    the list of layers that are called one after the other. Steps call the model exactly once. Layers exchange tensors,
    in tuples, lists and dicts. The last stage runs on rank 0, where losses are computed and logged; it loads the data.

    Args:
        splits: Where the layers are divided: a list has the first layer of every stage but the first, so that [4] gives
            the first stage four layers and the second one the others. "auto" gives each rank layers in proportion to
            ``speeds``, equal numbers without them.
        speeds: How fast each rank is, one positive number a rank, rank 0 first, so that [2, 1] gives rank 0 twice the
            layers of rank 1.
        num_microbatches: In how many parts a batch goes through the stages; more of them leave the stages less idle.
        schedule: "1f1b" holds the activations of as many micro-batches as there are stages, "gpipe" of all.
        loss_reduction: "mean" if the training loss is a mean over the batch, "sum" if it is a sum.
        num_loss_terms: Counts the terms that the training loss averages over, given a micro-batch, where that is not
            the number of samples: tokens that are not padding.
        **strategy_kwargs: Arguments of Lightning's DDPStrategy that launch processes: ``start_method``, ``timeout``,
            ``process_group_backend``.

    Raises:
        ConfigurationError: an argument breaks its rule.
    """

    def __init__(
        self,
        splits: Literal["auto"] | list[int] = "auto",
        speeds: list[float] | None = None,
        num_microbatches: int = 4,
        schedule: Schedule = "1f1b",
        loss_reduction: Literal["mean", "sum"] = "mean",
        num_loss_terms: Callable[[Any], int] | None = None,
        **strategy_kwargs: Any,
    ) -> None:
        arguments.check_at_least("num_microbatches", num_microbatches, 1)
        arguments.check_choice("schedule", schedule, ("1f1b", "gpipe"))
        arguments.check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        arguments.check_splits(splits)
        if speeds is not None:
            arguments.check_numbers("speeds", speeds)
        if splits != "auto" and speeds is not None:
            raise ConfigurationError("`speeds` must be None where `splits` says how the layers are divided. Give one.")
        if num_loss_terms is not None and not callable(num_loss_terms):
            raise ConfigurationError(f"`num_loss_terms` must be callable with a batch or None, got {num_loss_terms!r}.")
        super().__init__(**strategy_kwargs)
        self.splits = splits
        self.speeds = speeds
        self.num_microbatches = num_microbatches
        self.schedule = schedule
        self.loss_reduction = loss_reduction
        self.num_loss_terms = num_loss_terms
        self.plan: StagePlan | None = None
        self._part: PipelineModel | None = None
        self._steps: PipelineStep | None = None
        self._aside: Gradients = []
        self._failed = False

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def set_world_ranks(self) -> None:
        # The Trainer's constructor calls this as soon as the number of ranks is known: no process is launched yet.
        world_size = self.num_nodes * self.num_processes
        arguments.check_splits(self.splits, world_size)
        if self.speeds is not None:
            arguments.check_numbers("speeds", self.speeds, world_size)
        super().set_world_ranks()

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        # every rank works on the same batches, so none may get a sampler of its own; nothing public says so for a
        # subclass of DDPStrategy. tests/plugin/test_pipeline.py compares the order of samples with one process.
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
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                reason = f"{type(callback).__name__} copies the whole model, of which a rank has a part"
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
        self.plan = self._plan_of(len(layers))
        self._part = PipelineModel(module, self.plan, self.global_rank)
        self._part.keep_own(self.root_device)
        pipeline = Pipeline(self._part.layers, self.plan, self.schedule, self.global_rank, self.root_device)
        self._steps = PipelineStep(
            module, self._part.called, pipeline, self.plan.ranks[-1], self.num_microbatches, self._loss_weights
        )
        self._failed = False

    def _plan_of(self, num_layers: int) -> StagePlan:
        uniform = uniform_stages(num_layers, self.world_size)
        if self.splits != "auto":
            ends = (*self.splits, num_layers)
            if self.splits and self.splits[-1] >= num_layers:
                raise ConfigurationError(
                    f"`splits` must be layers of the model, of which there are {num_layers}, got {self.splits}."
                )
            return StagePlan(uniform.ranks, ends)
        if self.speeds is None:
            return uniform
        return solve_stages(LayerCosts.of_speeds([(1.0, 2.0)] * num_layers, self.speeds))

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
        return RankZeroBatches(dataloader) if self.world_size > 1 else dataloader

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_rank:  # dropout of one stage must not repeat that of another; rank 0 shuffles
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        accumulated = self._module.trainer.accumulate_grad_batches
        with self.precision_plugin.train_step_context(), taken_aside(self._the_part.parameters) as aside:
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
        for parameter, group in self._the_part.tied:
            if parameter.requires_grad:
                gradient = found.get(id(parameter), torch.zeros_like(parameter))
                dist.all_reduce(gradient, group=group)
                shared.append((parameter, gradient))
        tied = {id(parameter) for parameter, _ in shared}
        return [*((p, g) for p, g in gradients if id(p) not in tied), *shared]

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = [p.grad.square().sum() for p in own if self._the_part.counts(p)]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.root_device)
        total = total.to(torch.float64) if self.root_device.type == "cpu" else total.float()
        dist.all_reduce(total)
        nn.utils.clip_grads_with_norm_(own, clip_val, total.sqrt())

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._the_steps.evaluate(self._module.validation_step, args, logs=True)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._the_steps.evaluate(self._module.test_step, args, logs=True)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._the_steps.evaluate(self._module.predict_step, args, logs=False)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._the_part.state_dict()

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self._the_part.load(checkpoint["state_dict"], strict=strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = {i: value for i, value in state["state"].items() if not parameters[i].is_meta}
        parts = gather_on_zero(own)
        if parts is None:
            return {}
        merged = {i: value for part in reversed(parts) for i, value in part.items()}
        return {**state, "state": {i: merged[i] for i in sorted(merged)}}

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        # peers of a rank that failed may not come here
        if self._part is not None and not self._failed:
            self._part.complete()
        self._part = self._steps = None
        super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _the_part(self) -> PipelineModel:
        assert self._part is not None
        return self._part

    @property
    def _the_steps(self) -> PipelineStep:
        assert self._steps is not None
        return self._steps
