"""Run micro-batches through stages of layers on several ranks.

Each rank computes the passes of its stages in its order.  A layer that two stages share is run by the one or the other,
as the plan says for the micro-batch.  Nothing is assumed about what two stages exchange: see ``messages.py``.  The
arguments of the model, and whatever the loss needs, are looked up by the number of the micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.balance.pipeline.orders.order import Action, Message, Order, forward_order, known_order
from lightning_hetero.balance.pipeline.orders.proof import verify_order
from lightning_hetero.balance.pipeline.simulation import Pass, Timeline
from lightning_hetero.balance.pipeline.stages import Schedule, StagePlan
from lightning_hetero.distributed.collectives import all_gather, all_wait
from lightning_hetero.distributed.pass_timer import PassTimer
from lightning_hetero.distributed.pipeline.chain import LayerCalls
from lightning_hetero.distributed.pipeline.messages import Exchange, Received, Sent
from lightning_hetero.distributed.pipeline.passes.channels import open_channels
from lightning_hetero.distributed.pipeline.passes.deferred import DeferredGradients, Job
from lightning_hetero.distributed.pipeline.passes.sharing import foreign_hook
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["Pipeline"]

LossOf = Callable[[int, Any], Tensor]


class Pipeline:
    """One rank's part of a pipeline; every rank must make one at the same point.

    Args:
        calls: The layers of the model and how they are called.
        plan: Stages of all ranks.
        schedule: Order of the passes: the name of a known one, or an order for as many micro-batches as a step has at
            most.
        rank: This rank, in the numbering of the plan.
        device: Device of this rank's layers.
        timer: Timer of this rank's passes in training; None if they are never timed.
        split_layers: Numbers of the layers whose backward pass an order may split; None for all.
        members: The ranks of the run that belong to this pipeline. The plan and ``rank`` number them from 0. None if
            all ranks do.

    Raises:
        ConfigurationError: The ranks would wait for each other for ever in the order that is given.
    """

    def __init__(
        self,
        calls: LayerCalls,
        plan: StagePlan,
        schedule: Schedule | Order,
        rank: int,
        device: torch.device,
        timer: PassTimer | None = None,
        split_layers: Collection[int] | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        if isinstance(schedule, Order):
            verify_order(schedule)
        self._calls = calls
        self._plan = plan
        self._schedule = schedule
        self._rank = rank
        self._stages = plan.stages_of(rank)
        self._device = device
        self._timer = timer
        self._members = range(plan.world_size) if members is None else members
        self._rank_of_stage = [self._members[of_stage] for of_stage in plan.ranks]
        if plan.num_stages > 1:
            open_channels(self._rank_of_stage, device)
        self._exchange = Exchange(self._members[rank], device)
        self._parts: dict[tuple[int, bool], _Part] = {}
        self._deferred = DeferredGradients(
            calls.layers[number] for number in plan.layers_of(rank) if split_layers is None or number in split_layers
        )
        self._shared = [calls.layers[number] for number in plan.layers_of(rank) if number in plan.shared]
        self._recorded: list[Pass] | None = None
        self._record_from_s = 0.0
        self._micro_batches_before = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which gets the inputs of the pipeline."""
        return 0 in self._stages

    @property
    def is_recording(self) -> bool:
        """Whether passes are being recorded, which takes time itself."""
        return self._recorded is not None

    @property
    def needs_calls(self) -> bool:
        """Whether a stage of this rank needs the arguments with which the step calls the model."""
        return any(self._calls.needs_call(self._plan.held(stage)) for stage in self._stages)

    @property
    def first_rank(self) -> int:
        """The rank of the run that has the first stage."""
        return self._rank_of_stage[0]

    @property
    def last_rank(self) -> int:
        """The rank of the run that has the last stage."""
        return self._rank_of_stage[-1]

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which computes the output."""
        return self._is_last(self._stages[-1])

    def train(self, count: int, calls: Sequence[Call], loss_of: LossOf) -> None:
        """Run forward and backward passes of ``count`` micro-batches, and accumulate gradients.

        Args:
            count: Number of micro-batches.
            calls: Arguments of the model for each micro-batch; may be empty on stages that do not need them.
            loss_of: Function that returns the loss of a micro-batch, given its number and the last layer's output; used
                on the last stage. Losses already contain the weights of their micro-batches.
        """
        part = self._part(count, training=True)
        self._verify_shared()
        self._exchange.begin(part.expected)
        running: dict[tuple[int, int], _Running] = {}
        with self._deferred.installed() if part.is_split else nullcontext():
            for action in part.actions:
                place = (action.stage, action.micro_batch)
                if action.kind == "forward":
                    running[place] = self._run_forward(action, calls, loss_of)
                elif action.kind == "input":
                    with self._deferred.put_off() as jobs:
                        self._run_backward(action, running.pop(place))
                    running[place] = _Running(None, None, jobs=jobs)
                elif action.kind == "backward":
                    self._run_backward(action, running.pop(place))
                else:
                    self._observed(action, running.pop(place).compute)
        self._exchange.finish()
        self._micro_batches_before += count

    def _verify_shared(self) -> None:
        for layer in self._shared:
            hook = foreign_hook(layer)
            if hook is not None:
                raise UnsupportedFeatureError(
                    f"Two ranks of `hetero_pipeline` share a layer, and each runs it for some of the micro-batches, but"
                    f" the hook {hook!r} was registered on it after the first step. Register it before the training, or"
                    f' use schedule="v" or "1f1b", with which no layer is shared.'
                )

    def _part(self, count: int, *, training: bool) -> _Part:
        """Return this rank's part of a step or an evaluation; nearly all of them have the same number."""
        key = count, training
        if key not in self._parts:
            self._parts[key] = _Part.of(self._order(count, training=training), self._rank, self._members)
        return self._parts[key]

    def _order(self, count: int, *, training: bool) -> Order:
        if not training:
            return forward_order(self._plan.ranks, count)
        if isinstance(self._schedule, Order):
            assert count <= self._schedule.micro_batches, "an order is for as many micro-batches as a step may have"
            return self._schedule.first(count)
        return known_order(self._plan.ranks, count, self._schedule)

    def _run_forward(self, action: Action, calls: Sequence[Call], loss_of: LossOf) -> _Running:
        _, stage, i = action
        received = self._received(stage, i)
        call = calls[i] if calls else None
        one: _Running = self._observed(action, lambda: self._forward(stage, i, received, call, loss_of))
        if not self._is_last(stage):
            target = self._rank_of_stage[stage + 1]
            one.sent = self._exchange.send(target, Message(False, stage + 1, i), one.output, with_graph=True)
            one.output = one.sent.wanted
        return one

    def _run_backward(self, action: Action, one: _Running) -> None:
        _, stage, i = action
        gradients = None
        if one.sent is not None:
            message = Message(True, stage, i)
            gradients = self._exchange.receive_gradients(self._rank_of_stage[stage + 1], message)
        self._observed(action, lambda: self._backward(one, gradients))
        if one.received is not None:
            self._exchange.send_gradients(self._rank_of_stage[stage - 1], one.received)

    def _received(self, stage: int, i: int) -> Received | None:
        return self._exchange.receive(self._rank_of_stage[stage - 1], Message(False, stage, i)) if stage else None

    def _is_last(self, stage: int) -> bool:
        return stage == self._plan.num_stages - 1

    def _forward(self, stage: int, i: int, received: Received | None, call: Call | None, loss_of: LossOf) -> _Running:
        value = None if received is None else received.value(with_graph=True)
        output = self._calls.run(self._plan.layers(stage, i), value, call)
        return _Running(received, loss_of(i, output) if self._is_last(stage) else output)

    def _backward(self, one: _Running, gradients: list[Tensor | None] | None) -> None:
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
            The outputs of the last layer for each micro-batch; empty on all ranks but that of the last stage.
        """
        outputs: list[Any] = []
        part = self._part(count, training=False)
        self._exchange.begin(part.expected)
        for _, stage, i in part.actions:
            received = self._received(stage, i)
            value = None if received is None else received.value(with_graph=False)
            output = self._calls.run(self._plan.layers(stage), value, calls[i] if calls else None)
            if self._is_last(stage):
                outputs.append(output)
            else:
                target = self._rank_of_stage[stage + 1]
                self._exchange.send(target, Message(False, stage + 1, i), output, with_graph=False)
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

    def _observed(self, action: Action, run: Callable[[], Any]) -> Any:
        """Compute a pass, and time or record it if that is asked for."""
        if self._recorded is None:
            return run() if self._timer is None else self._timer.time(run)
        start_s = time.perf_counter() - self._record_from_s
        result, seconds = timed_call(run, self._device)
        kind, stage, number = action
        micro_batch = self._micro_batches_before + number
        self._recorded.append(Pass(stage, kind, micro_batch, start_s, start_s + seconds))
        return result


@dataclass(frozen=True)
class _Part:
    """One rank's part of an order.

    Attributes:
        actions: The passes of the rank.
        expected: What the rank receives, by source, in the order in which that rank sends it.
        is_split: Whether backward passes are run in two parts.
    """

    actions: tuple[Action, ...]
    expected: dict[int, list[Message]]
    is_split: bool

    @classmethod
    def of(cls, order: Order, rank: int, members: Sequence[int]) -> _Part:
        """Return the part of a rank, given the ranks of the run that the order numbers."""
        actions = order.actions[rank]
        expected = {members[source]: order.messages(source, rank) for source in range(len(order.actions))}
        return cls(actions, expected, any(action.kind == "weight" for action in actions))


@dataclass
class _Running:
    """A micro-batch between its forward and its backward pass.

    Attributes:
        received: What the stage before has sent; None on the first stage.
        output: The loss on the last stage. On others the output, and once it is sent, its tensors that have a gradient.
        sent: What was sent to the stage after; None on the last stage.
        jobs: Functions that compute what the backward pass has put off.
    """

    received: Received | None
    output: Any
    sent: Sent | None = None
    jobs: list[Job] = field(default_factory=list)

    def compute(self) -> None:
        """Compute what the backward pass has put off, and release what that takes."""
        while self.jobs:
            self.jobs.pop()()
