"""Run a user's steps on a model that is split over ranks.

The user's step calls the model once. On the first stage, the step runs up to that call, whose arguments enter the
pipeline. On the last stage, the step runs from its beginning, and the call returns the pipeline's output. In training,
the last stage runs the step for each micro-batch; in validation, test and prediction, it runs the step once, on the
joined outputs of the whole batch. Of several replicas, each trains on its part of the batch, and the first one alone
evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
from lightning_hetero.distributed.pipeline.structure import Call, tensors_of
from lightning_hetero.distributed.torch_private import BatchNorm
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common.overridden import overridden
from lightning_hetero.plugin.pipeline.hooks.traces import StepTraces
from lightning_hetero.plugin.pipeline.layers import Layers
from lightning_hetero.plugin.pipeline.metrics import PipelineMetrics
from lightning_hetero.plugin.pipeline.replicas.left_behind import LeftBehind
from lightning_hetero.plugin.pipeline.replicas.seat import Seat
from lightning_hetero.plugin.pipeline.results.recording import StepRecord, StepRecorder, repeat
from lightning_hetero.plugin.pipeline.results.telling import Telling, named_arguments
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.log_capture import LogCapture, silent_log
from lightning_hetero.plugin.step.metrics import discarded_metrics
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

_SETTINGS = (
    "`hetero_pipeline` with `replicas` cannot train with a step that changes settings of an optimiser, or which"
    " parameters are trained, to other values for each micro-batch. Change them in a hook, or use `replicas=1`."
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

    @property
    def size(self) -> int:
        """Number of samples in this micro-batch."""
        return -(-self.samples // self.micro_batches)


class PipelineStep:
    """The steps of one rank.

    Args:
        module: The user's LightningModule.
        layers: The model that its steps call, and its layers.
        pipeline: The pipeline that runs the layers.
        seat: The place of this rank among the replicas.
        left_behind: Compares what steps leave in the module, with replicas; None without.
        passes_done: Function that is called when this rank has finished the passes of a training step.
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
        seat: Seat,
        left_behind: LeftBehind | None,
        passes_done: Callable[[], None],
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
        self._seat = seat
        self._left_behind = left_behind
        self._passes_done = passes_done
        self._leads = pipeline.is_last and seat.number == 0
        self._telling = Telling(module, metrics, traces, seat.leader, leads=self._leads)
        self.recorded_log = self._telling.recorded_log
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

    def use(self, pipeline: Pipeline, seat: Seat, left_behind: LeftBehind | None) -> None:
        """Run the layers with another pipeline from now on; the leader stays the same."""
        self._pipeline, self._seat, self._left_behind = pipeline, seat, left_behind

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
        if self._left_behind is not None:
            self._left_behind.refuse_one_pipeline()
        self.traces.begin()
        sizes, own = self._seat.divided(samples_in(batch), self._micro_batches, self._fewest_samples)
        self.samples = sum(sizes)
        parts = self._split(batch, sizes)
        weights = self._loss_weights(parts, sizes)
        calls: list[dict[str, Any]] = []
        values = self._metrics.batch_values
        log = LogCapture(lambda *a, **kw: calls.append(named_arguments(a, kw)), batch_value_of=values.of)
        recorder = StepRecorder(self._module, self._metrics, log)
        record = recorder.record
        with ExitStack() as stack:
            if self._leads:
                stack.enter_context(overridden(self._module, "log", log))
                stack.enter_context(values.of_step() if len(sizes) > 1 else nullcontext())
            elif self._pipeline.is_last:
                stack.enter_context(recorder.recording())

            def loss_of_part(number: int, output: Any) -> Tensor:
                i = own[number]
                log.samples, log.weight = sizes[i], weights[i]
                values.next_micro_batch(sizes[i] / self.samples)
                recorder.next_micro_batch()
                returned = self._finished(step, parts[i], rest, output, i)
                loss = loss_of(returned)
                log.note_loss(loss)
                record.outputs.append(detached_output(returned))
                if not weights[i]:  # a mean over no terms, whose gradient may not be a number
                    outputs_with_graph = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
                    return sum((weighted(tensor.sum(), 0.0) for tensor in outputs_with_graph), loss.new_zeros(()))
                return loss * (weights[i] / accumulated_batches)

            compared = nullcontext() if self._left_behind is None else self._left_behind.compared(own, recorder.refuse)
            with self.prepared(), compared:
                self._pipeline.train(len(own), self._calls(step, parts, rest, own), loss_of_part)
                self._passes_done()
            if self._leads:
                self._hear_replicas(record, log, sizes, weights)
                values.finish()
        record.losses |= log.losses
        if not self._leads:
            if self._pipeline.is_last:
                record.settings = self.traces.settings()
                record.sent(self._seat.leader, self._module.device)
            return self._telling.hear()
        log.flush()
        return self._telling.tell(combined_output(record.outputs, sizes, weights), calls)

    def _hear_replicas(self, own: StepRecord, log: LogCapture, sizes: Sequence[int], weights: Sequence[float]) -> None:
        """Add what the last ranks of the other replicas have recorded."""
        settings = self.traces.settings()
        refusal = own.refusal
        for source in self._seat.others:
            heard = StepRecord.received(source, self._module.device)
            first = len(own.outputs)
            these = slice(first, first + len(heard.outputs))
            own.outputs += heard.outputs
            repeat(heard, self._metrics, log, sizes[these], weights[these], self.samples)
            refusal = refusal or heard.refusal
            if heard.outputs:
                self._module.trainer.should_stop |= heard.settings[0]
                refusal = refusal or (_SETTINGS if heard.settings[1:] != settings[1:] else None)
        if refusal is not None:
            self._telling.refuse(refusal)

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
            found: list[Any] = []
            if self._seat.number == 0:
                parts = self._split(batch, sizes)
                with self.prepared():
                    found = self._pipeline.evaluate(len(parts), self._calls(step, parts, rest, range(len(parts))))
            if not self._leads:
                returned = self._telling.hear()
                if isinstance(returned, _InOnePiece):
                    self._in_one_piece = True
                    continue
                return returned
            if len(sizes) > 1 and not can_be_joined(found, sizes):
                # for example the loss that a model has computed from the labels, a mean over unknown terms
                self._in_one_piece = True
                self._telling.tell(_InOnePiece(), [])
                continue
            calls: list[dict[str, Any]] = []
            with self._telling.recorded(calls) if logs else nullcontext(), self.prepared():
                returned = self._finished(step, batch, rest, joined_output(found), 0)
            return self._telling.tell(returned, calls)

    def example(self, step: Step, args: tuple[Any, ...], *, training: bool, parts: int | None = None) -> Example:
        """Return the first micro-batch of a step on every rank, of ``parts``; every rank must call this together."""
        batch, *rest = args
        sizes = sizes_of_micro_batches(samples_in(batch), parts or self._micro_batches, self._fewest_samples)
        part = self._split(batch, sizes)[0]
        given = None
        if self._pipeline.is_first and self._seat.number == 0:
            with self.prepared():
                call = self._inputs(step, part, rest, 0)
            given = _on_cpu((call.args, call.kwargs))
        given = move_data_to_device(broadcast_from(given, self._seat.first_rank), self._module.device)
        assert given is not None

        def loss_of_output(output: Any) -> Tensor:
            undone = self.traces.undone(whole_step=True)
            with discarded_metrics(self._module), silent_log(self._module), undone, self.prepared():
                return loss_of(self._finished(step, part, rest, output, 0))

        loss = loss_of_output if training and self._pipeline.is_last else None
        return Example(Call(*given), loss, sum(sizes), len(sizes), training)

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

    def _calls(self, step: Step, parts: Sequence[Any], rest: Sequence[Any], own: Sequence[int]) -> list[Call]:
        """Return the arguments with which the step calls the model for micro-batches, if this stage needs them."""
        if not self._pipeline.needs_calls:
            return []
        return [self._inputs(step, parts[number], rest, number) for number in own]

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


def _on_cpu(value: Any) -> Any:
    return move_data_to_device(value, torch.device("cpu"))


def _no_call(step: Step) -> str:
    return f"`hetero_pipeline` needs {step.__name__!r} to call the model exactly once, got no call."


def _refuse_generating(*_: Any, **__: Any) -> Any:
    raise UnsupportedFeatureError(
        "`hetero_pipeline` cannot call `generate` within a step, which calls the model many times. Generate after the"
        " run, when every rank has the whole model, or load the checkpoint on one device."
    )
