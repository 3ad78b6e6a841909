"""Run micro-batches through stages of layers on several ranks.

Each stage runs forward and backward passes of micro-batches in the order of its schedule.  Nothing is assumed about
what two stages exchange: see ``messages.py``.  The arguments of the model, and whatever the loss needs, are looked up
by the number of the micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.balance.pipeline.simulation import Pass, Timeline
from lightning_hetero.balance.pipeline.stages import Kind, Schedule, StagePlan
from lightning_hetero.distributed.collectives import all_gather, all_wait
from lightning_hetero.distributed.pass_timer import PassTimer
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.messages import Exchange, Received, Sent
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["Pipeline"]

# The oldest version on which pipelines have been tried.
_TORCH_NEEDED = "2.13"

LossOf = Callable[[int, Any], Tensor]


class Pipeline:
    """One rank's part of a pipeline.

    Args:
        calls: The layers of the model and how they are called.
        plan: Stages of all ranks.
        schedule: Order of forward and backward passes.
        rank: This rank.
        device: Device of this rank's layers.
        timer: Timer of this rank's passes in training; None if they are never timed.
    """

    def __init__(
        self,
        calls: LayerCalls,
        plan: StagePlan,
        schedule: Schedule,
        rank: int,
        device: torch.device,
        timer: PassTimer | None = None,
    ) -> None:
        if torch.__version__ < _TORCH_NEEDED:
            raise UnsupportedFeatureError(
                f"A pipeline needs PyTorch {_TORCH_NEEDED} or later, got {torch.__version__}. Update it on every node,"
                f" or train with `hetero_ddp`."
            )
        self._calls = calls
        self._plan = plan
        self._schedule = schedule
        self._stage = plan.stage_of(rank)
        self._numbers = plan.layers(self._stage)
        self._device = device
        self._timer = timer
        before = None if self.is_first else plan.ranks[self._stage - 1]
        after = None if self.is_last else plan.ranks[self._stage + 1]
        self._exchange = Exchange(before, after, device)
        self._recorded: list[Pass] | None = None
        self._record_from_s = 0.0
        self._micro_batches_before = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which gets the inputs of the pipeline."""
        return self._stage == 0

    @property
    def is_recording(self) -> bool:
        """Whether passes are being recorded, which takes time itself."""
        return self._recorded is not None

    @property
    def needs_calls(self) -> bool:
        """Whether this stage needs the arguments with which the step calls the model."""
        return self._calls.needs_call(self._numbers)

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

    def train(self, count: int, calls: Sequence[Call], loss_of: LossOf) -> None:
        """Run forward and backward passes of ``count`` micro-batches, and accumulate gradients.

        Args:
            count: Number of micro-batches.
            calls: Arguments of the model for each micro-batch; may be empty on stages that do not need them.
            loss_of: Function that returns the loss of a micro-batch, given its number and the last layer's output; used
                on the last stage. Losses already contain the weights of their micro-batches.
        """
        most = count if self._schedule == "gpipe" else min(self._plan.num_stages - self._stage, count)
        running: dict[int, _Running] = {}
        forward = backward = 0
        while backward < count:
            if forward < count and forward - backward < most:
                received = None if self.is_first else self._exchange.receive()
                call = calls[forward] if calls else None
                one = self._observed("forward", self._forward, forward, received, call, loss_of)
                forward += 1
                if not self.is_last:
                    goes_on = forward < count and forward - backward < most
                    one.sent = self._exchange.send(one.output, hold=not goes_on)
                    one.output = one.sent.wanted
                running[forward - 1] = one
            else:
                one = running.pop(backward)
                gradients = None if one.sent is None else self._exchange.receive_gradients(one.sent)
                self._observed("backward", self._backward, backward, one, gradients)
                backward += 1
                if one.received is not None and one.received.wanted:
                    self._exchange.send_gradients(one.received, hold=forward < count)
                del one
        self._exchange.finish()
        self._micro_batches_before += count

    def _forward(self, number: int, received: Received | None, call: Call | None, loss_of: LossOf) -> _Running:
        value = None if received is None else received.value(with_graph=True)
        output = self._calls.run(self._numbers, value, call)
        return _Running(received, loss_of(number, output) if self.is_last else output)

    def _backward(self, _: int, one: _Running, gradients: list[Tensor | None] | None) -> None:
        if gradients is None:
            one.output.backward()
            return
        pairs = [(t, g) for t, g in zip(one.output, gradients, strict=True) if g is not None]
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, given)

    def evaluate(self, count: int, calls: Sequence[Call]) -> list[Any]:
        """Run forward passes of ``count`` micro-batches.

        Args:
            count: Number of micro-batches.
            calls: Arguments of the model for each micro-batch; may be empty on stages that do not need them.

        Returns:
            The outputs of the last layer for each micro-batch; empty on all stages but the last.
        """
        outputs: list[Any] = []
        for number in range(count):
            value = None if self.is_first else self._exchange.receive().value(with_graph=False)
            output = self._calls.run(self._numbers, value, calls[number] if calls else None)
            if self.is_last:
                outputs.append(output)
            else:
                self._exchange.send(output, hold=False)
        self._exchange.finish()
        return outputs

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

    def _observed(self, kind: Kind, run: Callable[..., Any], number: int, *args: Any) -> Any:
        """Run a forward or backward pass of a micro-batch, and time or record it if that is asked for."""
        if self._recorded is None:
            return run(number, *args) if self._timer is None else self._timer.time(run, number, *args)
        start_s = time.perf_counter() - self._record_from_s
        result, seconds = timed_call(lambda: run(number, *args), self._device)
        micro_batch = self._micro_batches_before + number
        self._recorded.append(Pass(self._stage, kind, micro_batch, start_s, start_s + seconds))
        return result


@dataclass
class _Running:
    """A micro-batch between its forward and its backward pass.

    Attributes:
        received: What the stage before has sent; None on the first stage.
        output: The loss on the last stage. On others the output, and once it is sent, its tensors that have a gradient.
        sent: What was sent to the stage after; None on the last stage.
    """

    received: Received | None
    output: Any
    sent: Sent | None = None
