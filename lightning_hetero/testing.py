"""Simulate mixed hardware by slowing down chosen ranks, to try the package and to test it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_hetero.balance.types import StepTime
from lightning_hetero.distributed.pipeline.passes.deferred import put_off_with
from lightning_hetero.distributed.pipeline.structure import flatten, unflatten
from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.lightning_packages import with_either_trainer
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.pipeline.layers import layers_of

__all__ = ["SlowDown", "SlowLayers"]

# On most networks the forward pass takes a third of a training step, the backward pass two thirds.
_FORWARD_PART = 1 / 3
_MOST_LATE_S = 0.002  # of a sleep, that the next ones make up for; a busy machine may be later


@with_either_trainer
class SlowDown(Callback):
    """Makes the training steps of each rank take ``factors[rank]`` times as long, under any strategy.

    By default a rank sleeps after each stretch of its own work, ``factor - 1`` times as long as the stretch lasted. It
    does so in the forward pass, and in the backward pass before each gradient reaches DDP, like a device that is slower
    by that factor. The accuracy depends on how steady the machine is.

    With ``seconds_per_sample`` every rank becomes a device of known speed: a step of n samples lasts
    ``factor * (overhead_s + seconds_per_sample * n)`` including its real work, as long as the real work is shorter.
    That is accurate to a few per cent even on a busy machine, so use it for comparisons.

    Where ranks wait for each other inside a forward or backward pass, as in synchronised batch normalisation, a rank
    counts its waiting as work of its own and sleeps less or more than it should.

    Args:
        factors: How many times as long each rank takes for a step, one positive number per rank. Without
            ``seconds_per_sample`` every factor must be at least 1.
        seconds_per_sample: Seconds that one sample takes on a device of factor 1. By default steps take as long as
            their real work, multiplied by the factor.
        overhead_s: Seconds that each step takes in addition on a device of factor 1, whatever its number of samples.
            Needs ``seconds_per_sample``.

    Raises:
        ConfigurationError: If an argument is invalid.

    Example:
        >>> slow_second_rank = SlowDown(factors=[1, 2])
        >>> ten_ms_and_two_ms_per_sample = SlowDown(factors=[1, 2], seconds_per_sample=0.002, overhead_s=0.010)

    Add it to the callbacks of a Trainer::

        trainer = Trainer(strategy="hetero_ddp", accelerator="cpu", devices=2, callbacks=[SlowDown([1, 2])])
    """

    def __init__(
        self, factors: Sequence[float], seconds_per_sample: float | None = None, overhead_s: float = 0.0
    ) -> None:
        if isinstance(factors, str) or not isinstance(factors, Sequence) or not factors:
            raise ConfigurationError(f"`factors` must be one number per rank, got {factors!r}. For example [1, 2].")
        if seconds_per_sample is not None:
            arguments.check_positive("seconds_per_sample", seconds_per_sample)
        arguments.check_at_least("overhead_s", overhead_s, 0, whole=False)
        for rank, factor in enumerate(factors):
            arguments.check_at_least(f"factors[{rank}]", factor, 0 if seconds_per_sample else 1, whole=False)
        super().__init__()
        self.factors = list(factors)
        self.step_time = None if seconds_per_sample is None else StepTime(overhead_s, seconds_per_sample)
        if self.step_time is None and overhead_s:
            raise ConfigurationError(
                f"`overhead_s` must be 0 without `seconds_per_sample`, got {overhead_s}. Give both."
            )
        self._factor = 1.0
        self._started = 0.0
        self._duration_s = 0.0
        self._stretched = 0.0
        self._hooks: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if len(self.factors) != trainer.world_size:
            raise ConfigurationError(
                f"`factors` must have one number per rank ({trainer.world_size}),"
                f" got {len(self.factors)}: {self.factors}."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hooks()
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        total, done = sum(p.numel() for p in parameters), 0
        # The backward pass computes the gradients of the last layers first.
        for parameter in reversed(parameters):
            done += parameter.numel()
            part = _FORWARD_PART + (1 - _FORWARD_PART) * done / total
            self._hooks.append(parameter.register_hook(self._gradient_hook(part)))

    def _gradient_hook(self, part: float) -> Any:
        def hook(_: torch.Tensor) -> None:
            self._wait(part)

        return hook

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._factor = self.factors[trainer.global_rank]
        self._started = self._stretched = time.perf_counter()
        if self.step_time is not None:
            self._duration_s = self._factor * self.step_time.seconds(_samples_in(batch))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._wait(_FORWARD_PART)

    def _wait(self, part: float) -> None:
        """Sleep until ``part`` of the step's time has passed, or in proportion to the work since the last sleep."""
        now = time.perf_counter()
        if self.step_time is not None:
            pause_s = self._started + self._duration_s * part - now
        else:
            pause_s = (self._factor - 1) * (now - self._stretched)
        if pause_s > 0:
            time.sleep(pause_s)
        self._stretched = time.perf_counter()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@with_either_trainer
class SlowLayers(Callback):
    """Makes each layer of a pipeline take ``factors[rank]`` times as long on each rank, under ``hetero_pipeline``.

    By default a rank sleeps after each layer's forward pass in proportion to the time that it took, and twice as long
    before the layer's backward pass. Where gradients of parameters are computed later than those of inputs, half of the
    latter pause is taken there. With ``seconds_per_sample`` every rank becomes a device of known speed: a layer's
    forward and backward pass for n samples together last ``factor * seconds_per_sample * n``, as long as the real work
    is shorter.

    Args:
        factors: How many times as long each rank takes for a layer, one positive number per rank. Without
            ``seconds_per_sample`` every factor must be at least 1. Change the attribute to have a device become slower
            or faster.
        seconds_per_sample: Seconds that a layer's forward and backward pass together take for one sample on a device of
            factor 1: one number for all layers, or one per layer. By default layers take as long as their real work,
            multiplied by the factor.

    Raises:
        ConfigurationError: If an argument is invalid.

    Example:
        >>> slow_second_rank = SlowLayers(factors=[1, 2])
        >>> three_ms_per_sample = SlowLayers(factors=[1, 2], seconds_per_sample=0.003)

    Add it to the callbacks of a Trainer::

        trainer = Trainer(strategy="hetero_pipeline", accelerator="cpu", devices=2, callbacks=[SlowLayers([1, 2])])
    """

    def __init__(self, factors: Sequence[float], seconds_per_sample: float | Sequence[float] | None = None) -> None:
        arguments.check_numbers("factors", factors)
        if isinstance(seconds_per_sample, Sequence) and not isinstance(seconds_per_sample, str):
            arguments.check_numbers("seconds_per_sample", seconds_per_sample, of="layer")
        elif seconds_per_sample is not None:
            arguments.check_positive("seconds_per_sample", seconds_per_sample)
        for rank, factor in enumerate(factors):
            if seconds_per_sample is None:
                arguments.check_at_least(f"factors[{rank}]", factor, 1, whole=False)
        super().__init__()
        self.factors = list(factors)
        self.seconds_per_sample = seconds_per_sample
        self._hooks: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        arguments.check_numbers("factors", self.factors, trainer.world_size)
        layers = [_hooked(layer) for layer in layers_of(pl_module).layers]
        seconds = self.seconds_per_sample
        if seconds is not None and not isinstance(seconds, Sequence):
            seconds = [seconds] * len(layers)
        if seconds is not None and len(seconds) != len(layers):
            raise ConfigurationError(
                f"`seconds_per_sample` must be one number, or one per layer ({len(layers)}), got {len(seconds)}"
                f" numbers."
            )
        self._remove_hooks()
        factor = partial(self._factor_of, trainer.global_rank)
        sleeper = _Sleeper()
        for number, layer in enumerate(layers):
            slow = _SlowLayer(layer, factor, None if seconds is None else seconds[number], sleeper)
            self._hooks += [layer.register_forward_pre_hook(slow.begin), layer.register_forward_hook(slow.end)]

    def _factor_of(self, rank: int) -> float:
        return self.factors[rank]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _hooked(layer: nn.Module) -> nn.Module:
    """Return the module whose calls are those of a layer."""
    modules: Any = getattr(layer, "modules_of_layer", None)
    return layer if modules is None else modules[-1]


class _Sleeper:
    """Sleeps as long as it should on average: what takes a little longer, the next sleep makes up for.

    That is the sleep itself, and the work between the sleeps of two layers of which one follows the other at once.
    """

    def __init__(self) -> None:
        self._late_s = 0.0
        self._output: tuple[weakref.ref[torch.Tensor], _SlowLayer, float] | None = None  # of a layer, when it ended
        self._working: tuple[_SlowLayer, float] | None = None  # the layer whose backward pass comes next, and when

    def sleep(self, seconds: float) -> None:
        """Sleep for some seconds, less those that were too long before."""
        if seconds <= 0:
            return
        started_s, wanted_s = time.perf_counter(), seconds - self._late_s
        if wanted_s > 0:
            time.sleep(wanted_s)
        self._late_s = min(time.perf_counter() - started_s - wanted_s, _MOST_LATE_S)

    def begins_forward(self, inputs: Sequence[torch.Tensor]) -> _SlowLayer | None:
        """Return the layer that has just computed the input of the next one; None if it is not known."""
        if self._output is None or not inputs or self._output[0]() is not inputs[0]:
            return None
        _, before, ended_s = self._output
        self._add(time.perf_counter() - ended_s)
        return before

    def ends_forward(self, layer: _SlowLayer, outputs: Sequence[torch.Tensor]) -> None:
        """Note the output of a layer."""
        self._output = (weakref.ref(outputs[0]), layer, time.perf_counter()) if outputs else None

    def begins_backward(self, layer: _SlowLayer) -> None:
        """Note that the backward pass of a layer begins."""
        if self._working is not None and self._working[0] is layer:
            self._add(time.perf_counter() - self._working[1])
        self._working = None

    def works_backward(self, before: _SlowLayer | None, work_s: float) -> None:
        """Note that a layer computes its backward pass, for which some seconds are left, and which layer follows."""
        self._working = None if before is None else (before, time.perf_counter() + work_s)

    def _add(self, late_s: float) -> None:
        self._late_s = min(self._late_s + late_s, _MOST_LATE_S)


class _SlowLayer:
    """The emulated device, for one layer.

    Args:
        layer: The layer.
        factor: Function that returns how many times as long the layer takes.
        seconds_per_sample: What it takes for one sample with factor 1; None to sleep in proportion to its work.
        sleeper: What sleeps.
    """

    def __init__(
        self, layer: nn.Module, factor: Callable[[], float], seconds_per_sample: float | None, sleeper: _Sleeper
    ) -> None:
        self.layer = layer
        self.sleeper = sleeper
        self._factor = factor
        self._seconds_per_sample = seconds_per_sample
        self._before: _SlowLayer | None = None
        self._started = 0.0
        self._work_s = inf  # of a forward pass that nothing else has interrupted

    def begin(self, _: Any, inputs: tuple[Any, ...]) -> None:
        if self._seconds_per_sample is not None:
            self._before = self.sleeper.begins_forward(flatten(inputs)[0])
        self._started = time.perf_counter()

    def end(self, _: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        passed_s = time.perf_counter() - self._started
        tensors, structure = flatten(output)
        work_s = 0.0  # of the backward pass
        if self._seconds_per_sample is None:
            pause_s = (self._factor() - 1) * passed_s
            until_s = time.perf_counter() + pause_s
            pause_before_backward_s = 2 * pause_s
        else:
            whole_s = self._factor() * self._seconds_per_sample * len(flatten(inputs)[0][0])
            until_s = self._started + _FORWARD_PART * whole_s
            # the real backward pass takes some twice as long as the forward pass
            self._work_s = min(self._work_s, passed_s)
            work_s = min(2 * self._work_s, (1 - _FORWARD_PART) * whole_s)
            pause_before_backward_s = (1 - _FORWARD_PART) * whole_s - work_s
        first = next((i for i, tensor in enumerate(tensors) if tensor.requires_grad), None)
        if first is not None:
            arguments = (pause_before_backward_s, work_s, self, self._before)
            tensors[first] = _SleepBeforeBackward.apply(tensors[first], *arguments)  # type: ignore[no-untyped-call]
            output = unflatten(tensors, structure)
        self.sleeper.sleep(until_s - time.perf_counter())
        self.sleeper.ends_forward(self, tensors)
        return output


class _SleepBeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, pause_s: float, work_s: float, slow: _SlowLayer, before: _SlowLayer | None
    ) -> torch.Tensor:
        ctx.pause_s, ctx.work_s, ctx.slow, ctx.before = pause_s, work_s, slow, before
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        sleeper = ctx.slow.sleeper
        sleeper.begins_backward(ctx.slow)
        # the gradients of parameters take as long as that of the input, and may be computed later
        is_put_off = put_off_with(ctx.slow.layer, partial(sleeper.sleep, ctx.pause_s / 2))
        part = 0.5 if is_put_off else 1.0
        sleeper.sleep(part * ctx.pause_s)
        sleeper.works_backward(ctx.before, part * ctx.work_s)
        return *gradients, None, None, None, None


def _samples_in(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException as error:
        raise ConfigurationError(
            f"`seconds_per_sample` needs batches with a tensor whose first dimension counts samples, got a batch of"
            f" type {type(batch).__name__}. Leave it out, and the rank's real work is slowed down instead."
        ) from error
