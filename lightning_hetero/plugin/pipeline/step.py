"""Run a user's steps on a model that is split over ranks.

The user's step calls the model once. On the first stage, the step runs up to that call, whose arguments enter the
pipeline. On the last stage, the step runs from its beginning, and the call returns the pipeline's output. In training,
the last stage runs the step for each micro-batch; in validation, test and prediction, it runs the step once, on the
joined outputs of the whole batch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import default_collate

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.distributed.pipeline.pipeline import Pipeline
from lightning_hetero.distributed.pipeline.shared_value import share
from lightning_hetero.distributed.pipeline.structure import Call, tensors_of
from lightning_hetero.distributed.torch_private import BatchNorm
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.pipeline.hooks.traces import StepTraces
from lightning_hetero.plugin.pipeline.layers import Layers
from lightning_hetero.plugin.pipeline.metrics import MetricOf, PipelineMetrics, hosted, portable
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.log_capture import LogCapture, silent_log
from lightning_hetero.plugin.step.metrics import discarded_metrics, set_step_value
from lightning_hetero.plugin.step.no_terms import weighted
from lightning_hetero.plugin.step.seeded import seeded
from lightning_hetero.plugin.step.split_batch import split_batch
from lightning_hetero.plugin.step.step_output import (
    can_be_joined,
    combined_output,
    detached_output,
    joined_output,
    loss_of,
    sizes_of_micro_batches,
)

__all__ = ["Example", "PipelineStep"]

Step = Callable[..., Any]

_USED_BEFORE = (
    "`hetero_pipeline` needs all parameters and buffers that are used before the model is called to be in its layers,"
    " got one that is on the last stage. Make the code that uses it the model's first layer."
)


class _Called(BaseException):
    """The model was called; the code after the call must not run."""

    def __init__(self, given: Call) -> None:
        super().__init__()
        self.given = given


@dataclass(frozen=True)
class _InOnePiece:
    """What the last stage tells the others when the outputs of micro-batches cannot be joined."""


@dataclass(frozen=True)
class Example:
    """The first micro-batch of a step.

    Attributes:
        call: Arguments with which the model is called, the same on every rank.
        loss_of: Function that returns the loss, given the model's output; None on ranks that compute no loss.
        samples: Number of samples in the whole step.
        micro_batches: Number of micro-batches in the whole step.
        training: Whether the step has backward passes.
    """

    call: Call
    loss_of: Callable[[Any], Tensor] | None
    samples: int
    micro_batches: int
    training: bool


class PipelineStep:
    """The steps of one rank.

    Args:
        module: The user's LightningModule.
        layers: The model that its steps call, and its layers.
        pipeline: The pipeline that runs the layers.
        micro_batches: Number of micro-batches per step.
        loss_weights: Function that returns the weight of each micro-batch's loss, given the micro-batches and their
            sizes.
        metrics: The module's metrics.
        seed: Seed of the random numbers of the user's step, the same on all ranks.
        traces: What the steps change in the module and its Trainer.

    Attributes:
        samples: Number of samples in the latest training step.
    """

    def __init__(
        self,
        module: LightningModule,
        layers: Layers,
        pipeline: Pipeline,
        micro_batches: int,
        loss_weights: Callable[[Sequence[Any], Sequence[int]], list[float]],
        metrics: PipelineMetrics,
        seed: int,
        traces: StepTraces,
    ) -> None:
        self._module = module
        self.traces = traces
        self.samples = 0
        self._called = layers.called
        self._pipeline = pipeline
        self._micro_batches = micro_batches
        self._loss_weights = loss_weights
        # in training, batch normalisation refuses a single sample
        normalises = any(isinstance(layer, BatchNorm) for layer in module.modules())
        self._fewest_samples = 2 if normalises else 1
        self._metrics = metrics
        self._seed = seed
        # what transformers keep for generating text would hold the keys and values of every layer
        configs: dict[int, Any] = {id(c): c for part in layers.called.modules() if (c := getattr(part, "config", None))}
        self._caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
        self._times_run = 0
        self._in_one_piece = False
        known = {id(part) for part in module.modules()}
        # layers that `pipeline_layers()` has made, which the module does not reach when it changes its mode
        self._wrappers = [p for layer in layers.layers for p in layer.modules() if id(p) not in known]

    def use(self, pipeline: Pipeline) -> None:
        """Run the layers with another pipeline from now on."""
        self._pipeline = pipeline

    def train(self, step: Step, args: tuple[Any, ...], accumulated_batches: int) -> Any:
        """Run a training step, and accumulate its gradients on the parameters.

        Args:
            step: The user's step.
            args: Arguments of the step, the batch first.
            accumulated_batches: Number of batches whose gradients are accumulated.

        Returns:
            The output that the step would return for the whole batch.
        """
        batch, *rest = args
        self._times_run += 1
        self.traces.begin()
        sizes = sizes_of_micro_batches(samples_in(batch), self._micro_batches, self._fewest_samples)
        self.samples = sum(sizes)
        parts = self._split(batch, sizes)
        weights = self._loss_weights(parts, sizes)
        outputs: list[Any] = []
        calls: list[dict[str, Any]] = []
        values = self._metrics.batch_values
        log = LogCapture(lambda *a, **kw: calls.append(_named_arguments(a, kw)), batch_value_of=values.of)
        captured = overridden(self._module, "log", log) if self._pipeline.is_last else nullcontext()
        of_batch = values.of_step() if self._pipeline.is_last and len(sizes) > 1 else nullcontext()

        def loss_of_part(i: int, output: Any) -> Tensor:
            log.samples, log.weight = sizes[i], weights[i]
            values.next_micro_batch()
            returned = self._finished(step, parts[i], rest, output, i)
            loss = loss_of(returned)
            log.note_loss(loss)
            outputs.append(detached_output(returned))
            if not weights[i]:  # a mean over no terms, whose gradient may not be a number
                outputs_with_graph = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
                return sum((weighted(tensor.sum(), 0.0) for tensor in outputs_with_graph), loss.new_zeros(()))
            return loss * (weights[i] / accumulated_batches)

        with captured, of_batch, self.prepared():
            self._pipeline.train(len(parts), self._calls(step, parts, rest), loss_of_part)
            values.finish()
        if not self._pipeline.is_last:
            return self._hear()
        log.flush()
        return self._tell(combined_output(outputs, sizes, weights), calls)

    def evaluate(self, step: Step, args: tuple[Any, ...], *, logs: bool) -> Any:
        """Run a step without gradients.

        Args:
            step: The user's step.
            args: Arguments of the step, the batch first.
            logs: Whether the step may log.

        Returns:
            The output of the step.
        """
        batch, *rest = args
        self._times_run += 1
        self.traces.begin()
        while True:
            sizes = sizes_of_micro_batches(samples_in(batch), 1 if self._in_one_piece else self._micro_batches)
            parts = self._split(batch, sizes)
            with self.prepared():
                found = self._pipeline.evaluate(len(parts), self._calls(step, parts, rest))
            if not self._pipeline.is_last:
                returned = self._hear()
                if isinstance(returned, _InOnePiece):
                    self._in_one_piece = True
                    continue
                return returned
            if len(sizes) > 1 and not can_be_joined(found, sizes):
                # for example the loss that a model has computed from the labels, a mean over unknown terms
                self._in_one_piece = True
                self._tell(_InOnePiece(), [])
                continue
            calls: list[dict[str, Any]] = []
            recorded = overridden(
                self._module, "log", lambda *given, calls=calls, **named: calls.append(_named_arguments(given, named))
            )
            with recorded if logs else nullcontext(), self.prepared():
                returned = self._finished(step, batch, rest, joined_output(found), 0)
            return self._tell(returned, calls)

    def example(self, step: Step, args: tuple[Any, ...], *, training: bool, parts: int | None = None) -> Example:
        """Return the first micro-batch of a step on every rank, of ``parts``; every rank must call this together."""
        batch, *rest = args
        sizes = sizes_of_micro_batches(samples_in(batch), parts or self._micro_batches, self._fewest_samples)
        part = self._split(batch, sizes)[0]
        given = None
        if self._pipeline.is_first:
            with self.prepared():
                call = self._inputs(step, part, rest, 0)
            given = _on_cpu((call.args, call.kwargs))
        given = move_data_to_device(broadcast_from(given, self._pipeline.first_rank), self._module.device)
        assert given is not None

        def loss_of_output(output: Any) -> Tensor:
            undone = self.traces.undone(whole_step=True)
            with discarded_metrics(self._module), silent_log(self._module), undone, self.prepared():
                return loss_of(self._finished(step, part, rest, output, 0))

        loss = loss_of_output if training and self._pipeline.is_last else None
        return Example(Call(*given), loss, sum(sizes), len(sizes), training)

    @contextmanager
    def recorded_log(self) -> Iterator[Callable[[Callable[[Any], Any]], None]]:
        """Record what a hook logs in this context, which every rank runs.

        Yields:
            Function that logs on every rank what the last stage has recorded, given a function that returns the message
            of the last stage on every rank.
        """
        calls: list[dict[str, Any]] = []

        def pass_on(exchange: Callable[[Any], Any]) -> None:
            told = [{**call, "value": hosted(portable(call["value"], self._metrics.names))} for call in calls]
            heard = exchange(told)
            self._log_heard(heard) if not self._pipeline.is_last else self._log(calls)

        with overridden(self._module, "log", lambda *given, **named: calls.append(_named_arguments(given, named))):
            yield pass_on

    # ---- the user's step -------------------------------------------------------------------------------------------

    def _seeded(self, number: int) -> AbstractContextManager[None]:
        """Make the step draw the same random numbers for a micro-batch on every rank."""
        return seeded(self._seed, self._times_run, number)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Have the layers run as parts of the model in this context."""
        for wrapper in self._wrappers:
            wrapper.training = self._called.training
        with self.traces.running_layers(), ExitStack() as stack:
            for config in self._caching:
                stack.enter_context(overridden(config, "use_cache", False))
            if callable(getattr(self._called, "generate", None)):
                stack.enter_context(overridden(self._called, "generate", _refuse_generating))
            yield

    def _calls(self, step: Step, parts: Sequence[Any], rest: Sequence[Any]) -> list[Call]:
        """Return the arguments with which the step calls the model for each micro-batch, if this stage needs them."""
        if not self._pipeline.needs_calls:
            return []
        return [self._inputs(step, part, rest, number) for number, part in enumerate(parts)]

    def _inputs(self, step: Step, part: Any, rest: Sequence[Any], number: int) -> Call:
        def note(*args: Any, **kwargs: Any) -> Any:
            raise _Called(Call(args, kwargs))

        with ExitStack() as stack:
            stack.enter_context(discarded_metrics(self._module))
            stack.enter_context(self.traces.undone())
            stack.enter_context(self._seeded(number))
            stack.enter_context(self._metrics.alone())
            for context in (silent_log(self._module), overridden(self._called, "forward", note)):
                stack.enter_context(context)
            try:
                step(part, *rest)
            except _Called as call:
                return self._checked(call.given)
            except RuntimeError as error:
                if re.search(r"\bmeta\b", str(error)) is None:  # the device of tensors without memory
                    raise
                raise UnsupportedFeatureError(_USED_BEFORE) from error
        raise UnsupportedFeatureError(_no_call(step))

    @staticmethod
    def _checked(call: Call) -> Call:
        if any(tensor.requires_grad or tensor.is_meta for tensor in tensors_of((call.args, call.kwargs))):
            raise UnsupportedFeatureError(_USED_BEFORE)
        return call

    def _finished(self, step: Step, part: Any, rest: Sequence[Any], output: Any, number: int) -> Any:
        calls = 0

        def returned(*_: Any, **__: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise UnsupportedFeatureError(
                    f"`hetero_pipeline` needs {step.__name__!r} to call the model exactly once, got a second call."
                )
            return output

        with overridden(self._called, "forward", returned), self._seeded(number), self._metrics.alone():
            finished = step(part, *rest)
        if not calls:
            raise UnsupportedFeatureError(_no_call(step))
        return finished

    def _split(self, batch: Any, sizes: Sequence[int]) -> list[Any]:
        if len(sizes) == 1:
            return [batch]
        loader = self._module.trainer.train_dataloader
        return split_batch(batch, sizes, lists_are_fields=getattr(loader, "collate_fn", None) is default_collate)

    # ---- what the other ranks learn --------------------------------------------------------------------------------

    def _tell(self, returned: Any, calls: list[dict[str, Any]]) -> Any:
        """Tell every rank the output of a step and what it has logged; log that here."""
        told = [{**call, "value": portable(call["value"], self._metrics.names)} for call in calls]
        self._shared((returned, told, self.traces.found()))
        self._log(calls)
        return returned

    def _hear(self) -> Any:
        returned, calls, traces = self._shared(None)
        self.traces.take(traces)
        self._log_heard(calls)
        return move_data_to_device(returned, self._module.device)

    def _log(self, calls: Sequence[dict[str, Any]]) -> None:
        for call in calls:
            self._module.log(**call)

    def _log_heard(self, calls: Sequence[dict[str, Any]]) -> None:
        for call in calls:
            if not call.get("rank_zero_only"):
                self._module.log(**{**call, "value": self._local(call["value"])})

    def _shared(self, value: Any) -> Any:
        return share(value, self._pipeline.last_rank, self._module.device)

    def _local(self, value: Any) -> Any:
        if isinstance(value, MetricOf):
            metric: Any = self._module.get_submodule(value.name)
            set_step_value(metric, move_data_to_device(value.in_step, self._module.device))
            return metric
        if isinstance(value, Mapping):
            return {key: self._local(entry) for key, entry in value.items()}
        return value.to(self._module.device) if isinstance(value, Tensor) else value


def _on_cpu(value: Any) -> Any:
    return move_data_to_device(value, torch.device("cpu"))


def _no_call(step: Step) -> str:
    return f"`hetero_pipeline` needs {step.__name__!r} to call the model exactly once, got no call."


def _named_arguments(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a ``self.log`` call by name; all ranks log the same value, so nothing is reduced."""
    arguments = dict(inspect.signature(LightningModule.log).bind(None, *given, **named).arguments)
    del arguments["self"]
    return {**arguments, "sync_dist": False}


def _refuse_generating(*_: Any, **__: Any) -> Any:
    raise UnsupportedFeatureError(
        "`hetero_pipeline` cannot call `generate` within a step, which calls the model many times. Generate after the"
        " run, when every rank has the whole model, or load the checkpoint on one device."
    )
