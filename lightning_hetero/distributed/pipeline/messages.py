"""Exchange values and their gradients between neighbouring stages, whatever their shapes are.

Before the tensors of a micro-batch, their description goes through the host group, as a number if the receiver has seen
it before.  So neither shapes nor structures have to be the same for all micro-batches, and the receiver allocates what
it needs.  The order of messages between two stages is that of ``torch.distributed.pipelining``, in which a send and a
receive of the same two ranks are posted as one batch, so NCCL cannot wait in a circle.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.host_group import host_group
from lightning_hetero.distributed.pipeline.structure import Description, flatten, unflatten

__all__ = ["Exchange", "Received", "Sent"]

_DESCRIPTIONS_KEPT = 64  # lengths of sequences in use; beyond, they are told again
_FORWARD, _BACKWARD = 1, 2  # tags of descriptions, which must not be taken for tensors


class Exchange:
    """Messages of one stage to and from its neighbours.

    Args:
        before: Rank of the stage before; None for the first stage.
        after: Rank of the stage after; None for the last stage.
        device: Device of this rank's tensors.
    """

    def __init__(self, before: int | None, after: int | None, device: torch.device) -> None:
        self._before = before
        self._after = after
        self._device = device
        self._told: list[Description] = []
        self._heard: list[Any] = []
        self._posted: list[Any] = []  # work of sends, with what it sends
        self._held: list[Any] = []  # sends that are posted together with the next receives

    def receive(self) -> Received:
        """Return the value of the next micro-batch from the stage before."""
        assert self._before is not None
        description: Description = self._hear()
        tensors = [
            torch.empty(shape, dtype=dtype, device=self._device)
            for shape, dtype in zip(description.shapes, description.dtypes, strict=True)
        ]
        self._wait(
            self._post([*self._taken(), *(dist.P2POp(dist.irecv, t, self._before) for t in tensors if t.numel())])
        )
        return Received(tensors, description)

    def send(self, value: Any, *, hold: bool) -> Sent:
        """Send a value to the stage after.

        Args:
            value: Nested tensors.
            hold: Whether the next message is one from the stage after; both are then posted together.
        """
        assert self._after is not None
        tensors, structure = flatten(value)
        sent = Sent(tensors, Description.of(tensors, structure))
        self._tell(sent.description)
        contiguous = [t.detach().contiguous() for t in tensors]
        self._hold([dist.P2POp(dist.isend, t, self._after) for t in contiguous if t.numel()], hold=hold)
        return sent

    def receive_gradients(self, sent: Sent) -> list[Tensor | None]:
        """Return the gradients of those tensors in ``sent`` that require one."""
        assert self._after is not None
        wanted = sent.wanted
        if not wanted:
            self._posted += self._post(self._taken())
            return []
        gradients = [torch.empty(t.shape, dtype=t.dtype, device=self._device) for t in wanted]
        operations = [dist.P2POp(dist.irecv, g, self._after) for g in gradients if g.numel()]
        self._wait(self._post([*self._taken(), *operations]))
        if len(wanted) == 1:
            return [gradients[0]]
        there = torch.empty(len(wanted), dtype=torch.bool)
        dist.recv(there, src=self._after, group=host_group(), tag=_BACKWARD)
        return [gradient if is_there else None for gradient, is_there in zip(gradients, there.tolist(), strict=True)]

    def send_gradients(self, received: Received, *, hold: bool) -> None:
        """Send the gradients of a received value to the stage before.

        Args:
            received: The value.
            hold: Whether the next message is one from the stage before; both are then posted together.
        """
        assert self._before is not None
        gradients = received.gradients
        if len(gradients) > 1:
            there = torch.tensor([gradient is not None for gradient in gradients])
            self._posted.append((dist.isend(there, self._before, group=host_group(), tag=_BACKWARD), there))
        dense = [
            torch.zeros_like(t) if gradient is None else gradient.contiguous()
            for t, gradient in zip(received.wanted, gradients, strict=True)
        ]
        self._hold([dist.P2POp(dist.isend, g, self._before) for g in dense if g.numel()], hold=hold)

    def finish(self) -> None:
        """Wait until everything has been sent."""
        self._posted += self._post(self._taken())
        self._wait(self._posted)
        self._posted = []

    def _hold(self, operations: list[Any], *, hold: bool) -> None:
        if hold:
            self._held += operations
        else:
            self._posted += self._post(operations)

    def _taken(self) -> list[Any]:
        held, self._held = self._held, []
        return held

    @staticmethod
    def _post(operations: list[Any]) -> list[Any]:
        works = dist.batch_isend_irecv(operations) if operations else []
        return [(work, operations) for work in works]

    @staticmethod
    def _wait(works: Sequence[Any]) -> None:
        for work, _ in works:
            work.wait()

    # ---- descriptions ----------------------------------------------------------------------------------------------

    def _tell(self, description: Description) -> None:
        """Tell the stage after what comes: the number of a description, and its length if it is new."""
        known = description in self._told
        if not known and len(self._told) == _DESCRIPTIONS_KEPT:
            self._told.clear()
        packed = b"" if known else pickle.dumps(description)
        number = self._told.index(description) if known else len(self._told)
        self._send_on_host(torch.tensor([number, len(packed)]))
        if not known:
            self._send_on_host(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
            self._told.append(description)

    def _send_on_host(self, message: Tensor) -> None:
        assert self._after is not None
        self._posted.append((dist.isend(message, self._after, group=host_group(), tag=_FORWARD), message))

    def _hear(self) -> Any:
        header = torch.empty(2, dtype=torch.int64)
        dist.recv(header, src=self._before, group=host_group(), tag=_FORWARD)
        number, length = header.tolist()
        if length:
            packed = torch.empty(length, dtype=torch.uint8)
            dist.recv(packed, src=self._before, group=host_group(), tag=_FORWARD)
            if number == 0:
                self._heard.clear()
            self._heard.append(pickle.loads(packed.numpy().tobytes()))
        return self._heard[number]


class Sent:
    """A value that was sent to the stage after.

    Args:
        tensors: Its tensors.
        description: What the receiver was told.

    Attributes:
        description: What the receiver was told.
        wanted: Those of its tensors for which a gradient comes back.
    """

    def __init__(self, tensors: Sequence[Tensor], description: Description) -> None:
        self.description = description
        self.wanted = [t for t in tensors if t.requires_grad]


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
