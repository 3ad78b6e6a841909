"""``hetero_fsdp``: sharded training in which each device holds as much of the model as its memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetero.distributed.collectives import all_gather_numbers
from lightning_hetero.distributed.group.failure import announce, failure_of_peers
from lightning_hetero.distributed.shards.engine import ShardEngine
from lightning_hetero.distributed.shards.reductions import total_norm
from lightning_hetero.distributed.shards.state import (
    part_of_optimizer_state,
    whole_optimizer_state,
    whole_state,
    whole_values,
)
from lightning_hetero.distributed.shards.units import find_units
from lightning_hetero.distributed.step_timer import StepTimer, clock_of
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.first_listener import listening_first
from lightning_hetero.plugin.common.lightning_private import accumulates, with_synchronised_layers
from lightning_hetero.plugin.common.overridden import overridden, overridden_method
from lightning_hetero.plugin.common.parts_of_model import not_moved_to_cpu, refuse_saving
from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
from lightning_hetero.plugin.fsdp.activations import Activations
from lightning_hetero.plugin.fsdp.refusals import refuse_module, refuse_optimizers, refuse_training, warn_of_kept
from lightning_hetero.plugin.fsdp.weights import model_memory, weights_of_memory

__all__ = ["HeteroFSDPStrategy"]

_WHY_ONE = (
    "the ranks gather parameters together in every forward and backward pass, so all must have the same number of them"
)
_NO_DDP = "no DDP wraps the module: each rank holds a part of it"


class HeteroFSDPStrategy(HeteroDDPStrategy):
    """Sharded training for unequal devices: parameters are divided by memory, and samples by speed.

    Parameters, gradients and the states of the optimiser are divided among the ranks in parts of unequal size. A unit
    of the model, for example a transformer block, is whole on all ranks only while it is used. Everything else is as
    with ``hetero_ddp``: the same global batches, the same gradients, the same checkpoints.

    Args:
        shard_weights: How the model is divided among the ranks. "auto" divides it by the memory that each device has
            left, and equally on processors. A list gives one number per rank: with [2, 1], rank 0 holds two thirds. A
            rank with 0 holds nothing, but takes part in the training. A mapping gives one number per device name.
        units: Modules whose parameters are gathered together. "auto" takes the children of lists and sequences of
            modules. A list names their classes, for example [TransformerBlock]. All other parameters are whole during
            a step.
        activation_bytes: Memory in bytes that the activations of one sample take, for `shard_weights="auto"`. It leaves
            room on the devices that get more samples. 0 measures it: with the module's `example_input_array`, and in
            the first training step for the next training with this strategy.
        find_unused_parameters: Whether the ranks agree in every step which unit comes next and which parameters were
            used. Set it if a step does not use all trained parameters, or if units are skipped or used in another
            order on some ranks or in some steps. It costs time: units cannot be gathered ahead.
        reshard_after_forward: Whether a unit is released after its forward pass and gathered again for the backward
            pass. False gathers it only once, but then the whole model is in memory during a step.
        reduce_every_batch: Whether gradients are reduced after every batch if Trainer(accumulate_grad_batches=...)
            accumulates several. False reduces them once, but then each rank holds all gradients, whole.
        **kwargs: Further arguments of HeteroDDPStrategy, and of Lightning's DDPStrategy.

    Raises:
        ConfigurationError: An argument breaks its rule. Rules that depend on the number of ranks are checked when the
            Trainer is constructed.

    Example:
        Let rank 0 hold two thirds of the model, and rank 1 process three quarters of the samples::

            strategy = HeteroFSDPStrategy(shard_weights=[2, 1], shares=[1, 3])
            trainer = Trainer(strategy=strategy, devices=2)
    """

    strategy_name = "hetero_fsdp"
    why_one_micro_batch = _WHY_ONE

    def __init__(
        self,
        shard_weights: Literal["auto"] | list[float] | dict[str, float] = "auto",
        units: Literal["auto"] | list[type[nn.Module]] = "auto",
        activation_bytes: float = 0.0,
        find_unused_parameters: bool = False,
        reshard_after_forward: bool = True,
        reduce_every_batch: bool = True,
        **kwargs: Any,
    ) -> None:
        arguments.check_shard_weights(shard_weights)
        _check_units(units)
        arguments.check_at_least("activation_bytes", activation_bytes, 0, whole=False)
        arguments.check_bool("find_unused_parameters", find_unused_parameters)
        arguments.check_bool("reshard_after_forward", reshard_after_forward)
        arguments.check_bool("reduce_every_batch", reduce_every_batch)
        if kwargs.get("micro_batch_size") is not None:
            raise ConfigurationError(
                f"`micro_batch_size` must be None for HeteroFSDPStrategy, got {kwargs['micro_batch_size']!r}, because"
                f" {_WHY_ONE}. Use `max_batch_size`, which limits the mini-batch itself."
            )
        self.shard_weights: str | Sequence[float] | Mapping[str, float] = shard_weights
        self.units = units
        self.activation_bytes = activation_bytes
        self.find_unused_parameters = find_unused_parameters
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_batch = reduce_every_batch
        self._activations = Activations()
        super().__init__(**kwargs)

    @override
    def _check_keywords(self, keywords: Mapping[str, Any], not_wrapped: str = _NO_DDP) -> None:
        super()._check_keywords(keywords, not_wrapped)

    @override
    def renew(self) -> None:
        super().renew()
        self.scope.frozen_stay = False
        self.micro_batches.before_communication = self._settle
        self.engine: ShardEngine | None = None
        self._weights: tuple[float, ...] = ()
        self._buffers_follow = True
        self._overrides = ExitStack()

    # ---- set-up ----------------------------------------------------------------------------------------------------

    @override
    def check_world_size(self, world_size: int) -> None:
        super().check_world_size(world_size)
        arguments.check_shard_weights(self.shard_weights, world_size)

    @override
    def begin_with(self, trainer: Trainer, model: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_training(trainer.callbacks, self.world_size)  # type: ignore[attr-defined]  # public, not annotated
        super().begin_with(trainer, model)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.timer = _ShardTimer(clock_of(self.root_device))
        arguments.shard_weights_of_ranks(self.shard_weights, self.profiles)
        if self.lightning_module is not None:
            self._overrides.enter_context(listening_first(self.trainer, self._module, _EndOfPrediction(self)))

    @override
    def setup(self, trainer: Trainer) -> None:
        # as DDPStrategy.setup, with shards instead of a wrapper
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        refuse_module(self._module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.model = with_synchronised_layers(self, self._module)
        self.precision_plugin.convert_module(self._module)
        self.model_to_device()
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        precision = self.precision_plugin
        self._overrides.enter_context(overridden(precision, "clip_grad_by_norm", self._clip_by_norm))
        self._overrides.enter_context(overridden_method(precision, "backward", self._backward_of_shards))

    @override
    def model_to_device(self) -> None:
        module = self._module
        units = find_units(module, self.units)
        given = arguments.shard_weights_of_ranks(self.shard_weights, self.profiles)
        self._model_memory = model_memory(module, units)
        self._weights = tuple(given or self._weights_by_memory())
        self.engine = ShardEngine(
            module,
            units,
            self._weights,
            self.root_device,
            waiting=self._waiting,
            fail=self._announce,
            find_unused_parameters=self.find_unused_parameters,
            reshard_after_forward=self.reshard_after_forward,
        )
        self.engine.frees_casts = self.reshard_after_forward and isinstance(self.precision_plugin, MixedPrecision)
        warn_of_kept(module, self.engine.leaves)

    def _weights_by_memory(self) -> tuple[float, ...]:
        known, samples = self._activations, self._expected_samples()
        if self.memory is not None:
            of_example = known.begin_training(self._module, self.precision_plugin)
            samples = samples or of_example
        # a rank that had no sample has measured nothing
        measured = max(all_gather_numbers(known.bytes_per_sample or 0.0))
        activations = (self.activation_bytes or measured) * samples
        return weights_of_memory(self._model_memory, self.memory, activations, self.world_size)

    def _expected_samples(self) -> float:
        """Return how many samples this rank gets, as the last training or the arguments say; 0 if they do not."""
        if self._activations.samples is not None:
            return self._activations.samples[self.global_rank]
        shares = arguments.shares_of_ranks(self.shares, self.profiles)
        return (self.global_batch_size or 0) * shares[self.global_rank] / sum(shares)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        refuse_optimizers(self.optimizers, self._running.shards, self._weights, self.root_device)

    def _settle(self) -> None:
        if self.engine is not None and not self.is_alone:
            self.engine.settle()

    def _waiting(self) -> AbstractContextManager[None]:
        return self.timer.waiting()

    def _announce(self, reason: str) -> None:
        announce(f"rank {self.global_rank}: {reason}")

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the norm of the whole model; the ranks communicate once, and not for each parameter."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with self.timer.waiting():
            norm = total_norm([p.grad for p in parameters], self.root_device)
        nn.utils.clip_grads_with_norm_(parameters, clip_val, norm)

    # ---- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        engine, is_automatic = self._running, self._module.automatic_optimization
        of_several = is_automatic and accumulates(self.trainer)
        engine.reduces = self.reduce_every_batch or not of_several
        follow, self._buffers_follow = self._buffers_follow, not of_several  # as DDP, whose `no_sync` leaves them alone
        self.timer.pause()
        self._activations.begin_step(self.memory if self.shard_weights == "auto" else None)
        with failure_of_peers(), engine.step("train", backward_follows=is_automatic, buffers_follow=follow):
            return super().training_step(*args, **kwargs)

    @override
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.timer.resume()  # all ranks have the root
        return super()._forward(*args, **kwargs)

    def _backward_of_shards(self, backward: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run a backward pass; the parts have their gradients before any hook looks at them."""
        partial_use = not self._module.automatic_optimization
        engine = self._running
        self._activations.end_forward(self.memory, engine.most_whole_bytes, self.training_slice)
        if (inputs := kwargs.get("inputs")) is not None:
            leaves = {id(shard): leaf for shard, leaf in zip(engine.shards, engine.leaves, strict=True)}
            named = [inputs] if isinstance(inputs, Tensor) else inputs
            kwargs["inputs"] = [leaves.get(id(parameter), parameter) for parameter in named]
        with engine.backward(partial_use=partial_use, muted=self.loss_weight == 0.0):
            backward(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self.engine is not None:
            self.engine.refresh()  # a module that optimises manually may use it again in the same step
        return output

    @override
    def _muted(self) -> AbstractContextManager[None]:
        return nullcontext()  # the engine mutes the whole parameters

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._running.synchronise_buffers()  # as DDP, which passes validation steps through its own forward

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with failure_of_peers(), self._running.step("validate"):
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with failure_of_peers(), self._running.step("test"):
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with failure_of_peers(), self._running.step("predict"):
            return super().predict_step(*args, **kwargs)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.world_size > 1 and (self._failed or self.is_alone):
            refuse_saving(self.strategy_name, None if self._failed else sys.exc_info()[1], self.on_exception)
        if self.engine is None:
            return super().lightning_module_state_dict()
        with failure_of_peers(), self.engine.in_parts():
            return whole_state(self._module, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return whole_optimizer_state(inner, keep=self.is_global_zero)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict(part_of_optimizer_state(optimizer, saved))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.engine is not None and not self.is_alone:  # what hooks have added
            checkpoint = whole_values(checkpoint, keep=self.is_global_zero)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    # ---- the end ---------------------------------------------------------------------------------------------------

    @override
    def teardown(self) -> None:
        if self.counts_samples and (schedule := self.plan_schedule) is not None:
            self._activations.samples = schedule.at(max(self.fetched_through, 0)).samples
        engine, self.engine = self.engine, None
        self._overrides.close()
        complete = not self._failed and not self.is_alone
        if engine is not None:
            if complete:
                engine.close()
                engine.restore()
                engine.leave_group()
            else:
                engine.remove_hooks()
        stays = engine is not None and not complete
        with not_moved_to_cpu(self._module) if stays else nullcontext():
            super().teardown()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _running(self) -> ShardEngine:
        assert self.engine is not None
        return self.engine


class _ShardTimer(StepTimer):
    """A timer whose waits are all marked: gathering and reducing parameters mark them themselves."""

    @override
    def enable(self, parameters: Any = ()) -> None:
        super().enable()


class _EndOfPrediction(Callback):
    """Serves ranks that have more batches to predict."""

    def __init__(self, strategy: HeteroFSDPStrategy) -> None:
        self._strategy = strategy

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._strategy.engine is not None:
            with failure_of_peers():
                self._strategy.engine.drain()


def _check_units(units: Any) -> None:
    if units == "auto":
        return
    is_list = isinstance(units, Sequence) and not isinstance(units, str)
    if not is_list or not units or not all(isinstance(u, type) and issubclass(u, nn.Module) for u in units):
        raise ConfigurationError(
            f'`units` must be "auto" or a list of classes of modules, got {units!r}. For example [TransformerBlock].'
        )
