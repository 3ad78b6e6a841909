"""Run micro-batches through stages of layers on several ranks, with ``torch.distributed.pipelining``.

That package is used with static shapes only: its inference of shapes runs layers on uninitialised memory, and its
schedules keep the shapes of their first batch.  So each kind of micro-batch gets its own stages and schedule, whose
boundaries one forward pass finds, and micro-batches of another size run in another schedule.  The inputs of the first
stage and whatever the loss needs are looked up by the number of the micro-batch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.balance.pipeline.simulation import Pass, Timeline
from lightning_hetero.balance.pipeline.stages import Kind, Schedule, StagePlan
from lightning_hetero.distributed.collectives import all_gather, all_wait
from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.pipeline.structure import StageBoundary, flatten, unflatten
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["KINDS_KEPT", "Pipeline"]

# Full and ragged batches of training and evaluation. Each kind has memory of its own for what it receives.
KINDS_KEPT = 4

# Before, stages could not exchange integers in training, and there had to be as many micro-batches as stages.
_TORCH_NEEDED = "2.13"

LossOf = Callable[[int, Any], Tensor]


class Pipeline:
    """One rank's part of a pipeline.

    Args:
        layers: Layers of this rank's stage.
        plan: Stages of all ranks.
        schedule: Order of forward and backward passes. "1f1b" needs at least as many micro-batches as stages; with
            fewer, "gpipe" is used.
        rank: This rank.
        device: Device of this rank's layers.
    """

    def __init__(
        self, layers: Sequence[nn.Module], plan: StagePlan, schedule: Schedule, rank: int, device: torch.device
    ) -> None:
        if torch.__version__ < _TORCH_NEEDED:
            raise UnsupportedFeatureError(
                f"A pipeline needs PyTorch {_TORCH_NEEDED} or later, got {torch.__version__}. Update it on every node,"
                f" or train with `hetero_ddp`."
            )
        self._layers = list(layers)
        self._plan = plan
        self._schedule = schedule
        self._stage = plan.stage_of(rank)
        self._device = device
        self._kinds: OrderedDict[Hashable, tuple[_Stage, Any]] = OrderedDict()
        self._recorded: list[Pass] | None = None
        self._record_from_s = 0.0
        self._micro_batches_before = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which gets the inputs of the pipeline."""
        return self._stage == 0

    @property
    def first_rank(self) -> int:
        """The rank of the first stage."""
        return self._plan.ranks[0]

    @property
    def last_rank(self) -> int:
        """The rank of the last stage."""
        return self._plan.ranks[-1]

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which computes the output."""
        return self._stage == self._plan.num_stages - 1

    def train(self, kind: Hashable, count: int, inputs: Sequence[Any], loss_of: LossOf) -> None:
        """Run forward and backward passes of ``count`` micro-batches of one shape, and accumulate gradients.

        Args:
            kind: A value that determines the shapes at the boundaries; the same on all ranks.
            count: Number of micro-batches.
            inputs: Arguments of the first layer for each micro-batch; empty on all stages but the first.
            loss_of: Function that returns the loss of a micro-batch, given its number and the last layer's output; used
                on the last stage.
        """
        stage, schedule = self._prepared(("train", kind, count), count, inputs, training=True)
        stage.loss_of = loss_of
        numbers = torch.arange(count)
        with stage.fed(inputs):
            schedule.step(
                *((numbers,) if self.is_first else ()),
                target=numbers if self.is_last else None,
                return_outputs=False,
            )
        self._micro_batches_before += count

    def record(self) -> None:
        """Start to record when passes begin and end; every rank must call this at the same point.

        Recording waits for the device at the end of each pass. Ranks do not compare clocks: each counts from this call.
        """
        timed_call(all_wait, self._device)  # the device has finished, too
        self._recorded, self._record_from_s, self._micro_batches_before = [], time.perf_counter(), 0

    def stop_recording(self) -> Timeline:
        """Stop recording and return the passes of all ranks; every rank must call this at the same point."""
        own, self._recorded = self._recorded or [], None
        passes = [one for part in all_gather(own) for one in part]
        return Timeline(tuple(sorted(passes, key=lambda one: (one.end_s, one.stage))))

    def _observed(self, kind: Kind, run: Callable[..., Any], number: int, *args: Any, **kwargs: Any) -> Any:
        """Run a forward or backward pass of a micro-batch, and record it if passes are being recorded."""
        if self._recorded is None:
            return run(number, *args, **kwargs)
        start_s = time.perf_counter() - self._record_from_s
        result, seconds = timed_call(lambda: run(number, *args, **kwargs), self._device)
        micro_batch = self._micro_batches_before + number
        self._recorded.append(Pass(self._stage, kind, micro_batch, start_s, start_s + seconds))
        return result

    def close(self) -> None:
        """Release the stages and schedules.

        They hold the process group. If one of them outlives the group, the process sometimes ends with an error.
        """
        self._kinds.clear()

    def evaluate(self, kind: Hashable, count: int, inputs: Sequence[Any]) -> list[Any]:
        """Run forward passes of ``count`` micro-batches of one shape.

        Args:
            kind: A value that determines the shapes at the boundaries; the same on all ranks.
            count: Number of micro-batches.
            inputs: Arguments of the first layer for each micro-batch; empty on all stages but the first.

        Returns:
            The outputs of the last layer for each micro-batch; empty on all stages but the last.
        """
        stage, schedule = self._prepared(("evaluate", kind, count), count, inputs, training=False)
        with stage.fed(inputs):
            schedule.eval(*((torch.arange(count),) if self.is_first else ()), return_outputs=False)
            return stage.outputs

    def _prepared(self, key: Hashable, count: int, inputs: Sequence[Any], *, training: bool) -> tuple[_Stage, Any]:
        if key in self._kinds:
            self._kinds.move_to_end(key)
            return self._kinds[key]
        # importing it takes a while, which those who train otherwise need not wait
        from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

        before, after = self._boundaries(inputs[0] if inputs else None)
        module = _Stage(self._layers, before, after if training or not self.is_last else None, first=self.is_first)
        stage = _observed_stage()(
            module,
            self._stage,
            self._plan.num_stages,
            self._device,
            input_args=_index() if self.is_first else before.examples(),
            output_args=after.examples() if module.after is not None else _index(),
        )
        # Public, but not documented: which rank has which stage. By default stage s is on rank s.
        stage.stage_index_to_group_rank = dict(enumerate(self._plan.ranks))
        stage.observe = self._observed
        if not training:
            schedule: Any = ScheduleGPipe(stage, count)
        else:
            kind = Schedule1F1B if self._schedule == "1f1b" and count >= self._plan.num_stages else ScheduleGPipe
            # Losses already contain the weights of their micro-batches.
            schedule = kind(stage, count, loss_fn=module.loss, scale_grads=False)
        self._kinds[key] = (module, schedule)
        if len(self._kinds) > KINDS_KEPT:
            self._kinds.popitem(last=False)
        return self._kinds[key]

    def _boundaries(self, example: Any) -> tuple[StageBoundary, StageBoundary]:
        """Find what this stage receives and sends, by one forward pass of a micro-batch through all stages."""
        ranks, stage = self._plan.ranks, self._stage
        if not self.is_first:
            received: list[Any] = [None]
            dist.recv_object_list(received, src=ranks[stage - 1], group=host_group())
            tensors, structure, requires_grad = received[0]
            moved = [t.to(self._device).requires_grad_(needs) for t, needs in zip(tensors, requires_grad, strict=True)]
            example = unflatten(moved, structure)
        # Ordinary tensors with a graph, even in inference mode: the pipeline must know which of them carry gradients.
        cuda = [self._device] if self._device.type == "cuda" else []  # by default, all devices of the machine
        with torch.inference_mode(False), torch.enable_grad(), _evaluating(self._layers), torch.random.fork_rng(cuda):
            output = run_layers(self._layers, _as_ordinary(example), first=self.is_first)
        tensors, structure = flatten(output)
        if not self.is_last:
            sent = ([t.detach().cpu() for t in tensors], structure, [t.requires_grad for t in tensors])
            dist.send_object_list([sent], dst=ranks[stage + 1], group=host_group())
        return StageBoundary.of(() if self.is_first else example), StageBoundary.of(output)


class _Stage(nn.Module):
    """The layers of a stage, with flat tensors as inputs and outputs."""

    def __init__(
        self, layers: Sequence[nn.Module], before: StageBoundary, after: StageBoundary | None, *, first: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.before = before
        self.after = after
        self.first = first
        self.inputs: Sequence[Any] = ()
        self.outputs: list[Any] = []
        self.loss_of: LossOf | None = None

    @contextmanager
    def fed(self, inputs: Sequence[Any]) -> Iterator[None]:
        self.inputs, self.outputs = inputs, []
        try:
            yield
        finally:
            self.inputs, self.outputs, self.loss_of = (), [], None

    def forward(self, *tensors: Tensor) -> Any:
        value = self.inputs[int(tensors[0])] if self.first else unflatten(tensors, self.before.structure)
        output = run_layers(self.layers, value, first=self.first)
        if self.after is None:
            self.outputs.append(output)
            return _index()
        found, structure = flatten(output)
        if structure != self.after.structure or tuple(tuple(t.shape) for t in found) != self.after.shapes:
            raise UnsupportedFeatureError(
                f"The shapes between the stages of a pipeline must depend only on those of the batch, got"
                f" {[tuple(t.shape) for t in found]} where a batch of the same shape had {list(self.after.shapes)}."
                f" Truncate or pad samples in the collate function instead of in the step."
            )
        flat = tuple(t.contiguous() for t in found)
        return flat[0] if len(flat) == 1 else flat

    def loss(self, output: Any, number: Tensor) -> Tensor:
        assert self.loss_of is not None
        assert self.after is not None
        tensors = output if isinstance(output, tuple) else (output,)
        return self.loss_of(int(number), unflatten(tensors, self.after.structure))


@cache
def _observed_stage() -> Any:
    """Return a stage class whose passes can be timed without waiting, since the schedule waits before it calls them."""
    from torch.distributed.pipelining import PipelineStage

    class ObservedStage(PipelineStage):
        observe: Any

        # Public; the test of the recorder fails if a schedule does not call these methods.
        def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
            return self.observe("forward", super().forward_one_chunk, *args, **kwargs)

        def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
            return self.observe("backward", super().backward_one_chunk, *args, **kwargs)

    return ObservedStage


def run_layers(layers: Any, value: Any, *, first: bool) -> Any:
    """Call one layer after the other; the first layer of the model gets ``value`` as its arguments."""
    for number, layer in enumerate(layers):
        value = layer(*value) if first and number == 0 else layer(value)
    return value


def _index() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def _as_ordinary(value: Any) -> Any:
    tensors, structure = flatten(value)
    # Outside inference mode, the clone of an inference tensor is an ordinary tensor.
    return unflatten([t.clone() if t.is_inference() else t for t in tensors], structure)


@contextmanager
def _evaluating(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Switch off randomness and running statistics in this context."""
    training = [(module, module.training) for layer in layers for module in layer.modules()]
    for module, _ in training:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
