"""Exchange values and their gradients between stages on different ranks, whatever their shapes are.

Before the tensors of a micro-batch, their description goes through the host group, as a number if the receiver has seen
it before.  So neither shapes nor structures have to be the same for all micro-batches, and the receiver allocates what
it needs.  Two ranks exchange messages in the order in which the sender's order of passes makes them; a receiver that
needs a later one first keeps the earlier ones.  Processors receive gradients, whose shapes are known, ahead of their
use.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.balance.pipeline.orders.order import Message
from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.pipeline.passes.channels import channel
from lightning_hetero.distributed.pipeline.structure import Description, flatten, unflatten

__all__ = ["Exchange", "Received", "Sent", "as_outputs"]

_DESCRIPTIONS_KEPT = 64  # lengths of sequences in use; beyond, they are told again
_GRADIENTS_AHEAD = 2
_FORWARD, _BACKWARD = 1, 2  # tags of descriptions, which must not be taken for tensors


class Exchange:
    """Messages of the stages of one rank to and from those of other ranks.

    Args:
        rank: This rank.
        device: Device of this rank's tensors.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._told: dict[int, list[Description]] = {}  # by target
        self._heard: dict[int, list[Any]] = {}  # by source
        self._expected: dict[int, deque[Message]] = {}  # by source, in its order
        self._arriving: dict[Message, _Arriving] = {}
        self._sent: dict[tuple[int, int], Sent] = {}  # values whose gradients come back, by stage and micro-batch
        self._posted: list[_Posted] = []
        self._ahead = _gradients_ahead(device)

    def begin(self, expected: Mapping[int, Sequence[Message]]) -> None:
        """Expect the messages of a step, or of an evaluation, by source and in its order."""
        self._expected = {source: deque(messages) for source, messages in expected.items()}

    def receive(self, source: int, message: Message) -> Received:
        """Return the value of a micro-batch from the stage before."""
        arriving = self._taken(source, message)
        assert arriving.description is not None
        return Received(arriving.tensors, arriving.description)

    def send(self, target: int, message: Message, value: Any, *, with_graph: bool) -> Sent:
        """Send a value, nested tensors, to the stage after.

        Args:
            target: Rank of that stage.
            message: What the value is.
            value: The value.
            with_graph: Whether gradients come back.
        """
        tensors, structure = flatten(value)
        sent = Sent(tensors, Description.of(tensors, structure))
        self._tell(target, sent.description)
        sent.posted = self._post_sends(target, [t.detach().contiguous() for t in tensors])
        if with_graph:
            self._sent[message.stage - 1, message.micro_batch] = sent
        return sent

    def receive_gradients(self, source: int, message: Message) -> list[Tensor | None]:
        """Return the gradients of those tensors that require one in the value that this rank has sent."""
        arriving = self._taken(source, message)
        self._settle(self._sent.pop((message.stage, message.micro_batch)).posted)  # the value was received, then
        there = arriving.there
        if there is None:
            return [*arriving.tensors]
        return [
            gradient if is_there else None for gradient, is_there in zip(arriving.tensors, there.tolist(), strict=True)
        ]

    def send_gradients(self, target: int, received: Received) -> None:
        """Send the gradients of a received value to the stage before."""
        gradients = received.gradients
        if len(gradients) > 1:
            there = torch.tensor([gradient is not None for gradient in gradients])
            self._posted.append(_Posted(dist.isend(there, target, group=host_group(), tag=_BACKWARD), there))
        self._post_sends(
            target,
            [
                torch.zeros_like(t) if gradient is None else gradient.contiguous()
                for t, gradient in zip(received.wanted, gradients, strict=True)
            ],
        )

    def finish(self) -> None:
        """Wait until everything has been sent."""
        self._settle(self._posted)
        self._posted = []

    # ---- receiving -------------------------------------------------------------------------------------------------

    def _taken(self, source: int, message: Message) -> _Arriving:
        """Wait for a message, after having posted the receives of all that the source sends before it."""
        expected = self._expected[source]
        while message not in self._arriving:
            self._post_receive(source, expected.popleft())
        arriving = self._arriving.pop(message)
        ahead = 0
        while expected and ahead < self._ahead and self._is_known(expected[0]):
            self._post_receive(source, expected.popleft())
            ahead += 1
        arriving.wait()
        return arriving

    def _is_known(self, message: Message) -> bool:
        return message.is_gradient and (message.stage, message.micro_batch) in self._sent

    def _post_receive(self, source: int, message: Message) -> None:
        if message.is_gradient:
            wanted = self._sent[message.stage, message.micro_batch].wanted
            arriving = _Arriving([torch.empty(t.shape, dtype=t.dtype, device=self._device) for t in wanted])
            if len(wanted) > 1:
                arriving.there = torch.empty(len(wanted), dtype=torch.bool)
                arriving.works.append(dist.irecv(arriving.there, source, group=host_group(), tag=_BACKWARD))
        else:
            description: Description = self._hear(source)
            like = zip(description.shapes, description.dtypes, strict=True)
            arriving = _Arriving([torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in like])
            arriving.description = description
        group = channel(source, self._rank)
        arriving.works += [dist.irecv(t, source, group=group) for t in arriving.tensors if t.numel()]
        self._arriving[message] = arriving

    # ---- sending ---------------------------------------------------------------------------------------------------

    def _post_sends(self, target: int, tensors: Sequence[Tensor]) -> list[_Posted]:
        group = channel(self._rank, target)
        posted = [_Posted(dist.isend(t, target, group=group), t) for t in tensors if t.numel()]
        self._posted = [*(one for one in self._posted if not one.is_over()), *posted]
        return posted

    @staticmethod
    def _settle(posted: Iterable[_Posted]) -> None:
        for one in posted:
            one.wait()

    # ---- descriptions ----------------------------------------------------------------------------------------------

    def _tell(self, target: int, description: Description) -> None:
        """Tell the stage after what comes: the number of a description, and its length if it is new."""
        told = self._told.setdefault(target, [])
        known = description in told
        if not known and len(told) == _DESCRIPTIONS_KEPT:
            told.clear()
        packed = b"" if known else pickle.dumps(description)
        number = told.index(description) if known else len(told)
        self._send_on_host(target, torch.tensor([number, len(packed)]))
        if not known:
            self._send_on_host(target, torch.frombuffer(bytearray(packed), dtype=torch.uint8))
            told.append(description)

    def _send_on_host(self, target: int, message: Tensor) -> None:
        self._posted.append(_Posted(dist.isend(message, target, group=host_group(), tag=_FORWARD), message))

    def _hear(self, source: int) -> Any:
        heard = self._heard.setdefault(source, [])
        header = torch.empty(2, dtype=torch.int64)
        dist.recv(header, src=source, group=host_group(), tag=_FORWARD)
        number, length = header.tolist()
        if length:
            packed = torch.empty(length, dtype=torch.uint8)
            dist.recv(packed, src=source, group=host_group(), tag=_FORWARD)
            if number == 0:
                heard.clear()
            heard.append(pickle.loads(packed.numpy().tobytes()))
        return heard[number]


def _gradients_ahead(device: torch.device) -> int:
    """Return how many gradients are received ahead.

    None on an accelerator, where a receive is work of the device: what waits for all its streams, such as the user's
    code or CUDA when it loads a kernel, would wait for a gradient that may depend on a later pass of this rank. The
    host asks for passes before the device runs them, and so for their gradients.
    """
    return _GRADIENTS_AHEAD if device.type == "cpu" else 0


class _Posted:
    """A send that goes on, and what it sends.

    Args:
        work: The send.
        tensor: What it sends.
    """

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work = work
        self._tensor: Tensor | None = tensor

    def is_over(self) -> bool:
        """Return whether the tensor was sent, as far as that is known; gloo tells only those who wait."""
        return self._tensor is None or bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait until the tensor was sent, and release it."""
        if self._tensor is not None:
            self._work.wait()
            self._tensor = None


class _Arriving:
    """A message whose receive was posted.

    Args:
        tensors: Tensors into which it is received.

    Attributes:
        description: Description of a value; None for gradients.
        there: Which gradients there are; None if there is but one.
        works: The receives.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.description: Description | None = None
        self.there: Tensor | None = None
        self.works: list[Any] = []

    def wait(self) -> None:
        """Wait until everything has been received."""
        for work in self.works:
            work.wait()


class Sent:
    """A value that was sent to the stage after.

    Args:
        tensors: Its tensors.
        description: What the receiver was told.

    Attributes:
        description: What the receiver was told.
        wanted: Those of its tensors for which a gradient comes back.
        posted: The sends.
    """

    def __init__(self, tensors: Sequence[Tensor], description: Description) -> None:
        self.description = description
        self.wanted = [t for t in tensors if t.requires_grad]
        self.posted: list[_Posted] = []


class Received:
    """A value from the stage before, and its gradients after a backward pass.

    Args:
        tensors: Its tensors.
        description: What the sender told.

    Attributes:
        wanted: Those of its tensors whose gradients the sender waits for.
        gradients: The gradients of those tensors; None for one on which nothing depends.
    """

    def __init__(self, tensors: Sequence[Tensor], description: Description) -> None:
        self._tensors = tensors
        self._description = description
        self.wanted = [t for t, needs in zip(tensors, description.requires_grad, strict=True) if needs]
        self.gradients: list[Tensor | None] = [None] * len(self.wanted)

    def value(self, *, with_graph: bool) -> Any:
        """Return the value; with ``with_graph``, layers may change its tensors in place."""
        tensors = list(self._tensors)
        if with_graph and self.wanted:
            outputs = iter(as_outputs(self.wanted, self.gradients))
            needs = self._description.requires_grad
            tensors = [next(outputs) if n else t for t, n in zip(tensors, needs, strict=True)]
        return unflatten(tensors, self._description.structure)


def as_outputs(tensors: Sequence[Tensor], gradients: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Return the tensors as outputs of a function, which keeps their gradients in ``gradients``.

    Layers may change an input in place, which autograd forbids for leaves.
    """
    anchor = torch.zeros((), requires_grad=True)
    outputs: Any = _AsOutputs.apply(anchor, list(tensors), gradients)  # type: ignore[no-untyped-call]
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _AsOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: list[Tensor], gradients: list[Tensor | None]) -> Any:  # noqa: ARG004
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.gradients[:] = grads
        return None, None, None
