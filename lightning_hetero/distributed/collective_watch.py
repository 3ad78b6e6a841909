"""See the collectives that other people's code starts, before they run.

torch must be watched where all Python code passes: at the methods of process groups, whatever function has called them.
DDP itself communicates in C++ and does not pass here. A step that makes no collective pays nothing.

Layers communicate too: in synchronised batch normalisation every rank waits for the slowest one, in the forward and in
the backward pass. On a device torch runs a backward pass in another thread than the one that has started it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.distributed.calling_line import is_of_library
from lightning_hetero.distributed.torch_private import (
    collective_methods,
    current_backward_pass,
    functional_resolvers,
    running_function,
)

__all__ = ["Collective", "CollectiveWatch", "refused_collectives"]

# They synchronise statistics, metrics, gradients or the states of optimisers, and are right for unequal mini-batches.
# Lightning's own collectives pass through the strategy.
_EXEMPT = (
    "lightning_hetero.",
    "lightning.pytorch.loops.",
    "lightning.pytorch.trainer.",
    "pytorch_lightning.loops.",
    "pytorch_lightning.trainer.",
    "torchmetrics.metric.",
    "torch.nn.modules.",
    "torch.nn.parallel.",
    "torch.distributed.optim.",
    "torch.distributed.algorithms.",
    "torch.distributed.checkpoint.",
)
# The tensors of all ranks must have one shape.
_OF_ONE_SHAPE = ("allreduce", "allgather", "_allgather", "all_gather", "broadcast", "reduce", "_reduce")


@dataclass(frozen=True)
class Collective:
    """A collective that is about to run.

    Attributes:
        name: Name of the function that the user's code has called.
        line: File and line of that call.
        group: The process group; None if it is unknown.
        tensors: The tensors of this rank; empty if they are unknown.
        needs_one_shape: Whether the tensors of all ranks must have one shape.
        moves_tensors: Whether the ranks exchange tensors, and do not only wait for each other.
        shapes_agree: Whether the tensors of all ranks are known to have one shape.
    """

    name: str
    line: str
    group: dist.ProcessGroup | None = None
    tensors: tuple[Tensor, ...] = ()
    needs_one_shape: bool = False
    moves_tensors: bool = True
    shapes_agree: bool = False

    @property
    def is_of_all_ranks(self) -> bool:
        """Whether all ranks take part, as far as is known."""
        return self.needs_one_shape and self.group is not None and self.group.size() == dist.get_world_size()

    @property
    def is_floating(self) -> bool:
        """Whether numbers are combined that a gradient or a mean may depend on; counts and texts are integers."""
        return not self.tensors or any(t.is_floating_point() or t.is_complex() for t in self.tensors)


Notice = Callable[[Collective], None]


class CollectiveWatch:
    """Calls a function before each collective that the training starts while it is watched.

    Args:
        waiting: Function that returns the context in which the training waits for other ranks in a collective, watched
            or not; None where nobody asks for how long it waits.
    """

    def __init__(self, waiting: Callable[[], AbstractContextManager[Any] | None]) -> None:
        self._waiting = waiting
        self._notice: Notice | None = None
        self._thread = 0  # a data loader or a logger may communicate in another one
        self._compiled: list[int] = []
        self._of_layers: set[type] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the process groups of this process; costs nothing where no collective is made."""
        self._thread = threading.get_ident()
        with _wrapped(self._calling, self._resolving), _wrapped_wait(self._waiting_in):
            yield

    @property
    def _is_of_training(self) -> bool:
        """Whether this thread is the training's: the one that trains, or the one of its backward pass on a device."""
        return self._thread == threading.get_ident() or current_backward_pass() != -1

    @contextmanager
    def watching(self, notice: Notice | None) -> Iterator[None]:
        """Call ``notice`` before each collective of this context; None to let them pass."""
        before, self._notice = self._notice, notice
        self._compiled.clear()
        try:
            yield
            if notice is not None and self._compiled:
                notice(Collective("a collective", "a compiled function"))
        finally:
            self._notice = before
            self._compiled.clear()

    def _calling(self, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if not self._is_of_training:
                return original(group, *args, **kwargs)
            if self._notice is not None:
                tensors = tuple(_tensors_in((args, kwargs)))
                self._note(group, tensors, method.startswith(_OF_ONE_SHAPE), method != "barrier")
            with self._waiting() or nullcontext():  # some collectives wait before they return, others in their `Work`
                return original(group, *args, **kwargs)

        return call

    def _waiting_in(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wait(*args: Any, **kwargs: Any) -> Any:
            waiting = self._waiting()
            if waiting is None or not self._is_of_training:
                return original(*args, **kwargs)
            with waiting:
                return original(*args, **kwargs)

        return wait

    def _resolving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        compiled = self._compiled

        @wraps(original)
        def resolve(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                compiled.append(1)  # the compiler repeats that in every call of what it compiles
            elif self._is_of_training:
                self._note()
            return original(*args, **kwargs)

        return resolve

    def _note(
        self,
        group: dist.ProcessGroup | None = None,
        tensors: tuple[Tensor, ...] = (),
        needs_one_shape: bool = False,
        moves_tensors: bool = True,
    ) -> None:
        notice = self._notice
        called = None if notice is None else self._user_call(sys._getframe(2))
        if notice is not None and called is not None:
            with self.watching(None):  # what `notice` exchanges itself
                notice(Collective(*called, group, tensors, needs_one_shape, moves_tensors))

    def _user_call(self, frame: FrameType | None) -> tuple[str, str] | None:
        """Return the function that the user's code has called, and the line; None if no user has called it."""
        name, called = "", None
        functions: set[type] = set()  # of autograd, which have led to the call
        while frame is not None:
            module = f"{frame.f_globals.get('__name__', '')}."
            if module.startswith(_EXEMPT) and not (called and module.startswith("torch.nn.modules.")):
                return called
            if not is_of_library(frame):
                if isinstance(frame.f_locals.get("self"), nn.SyncBatchNorm | torch.optim.Optimizer):
                    # of the user's: it synchronises statistics, or parameters that are equal on all ranks
                    self._of_layers |= functions
                    return None
                called = called or (name, f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if module.startswith("torch.distributed.") and not module.startswith("torch.distributed.c10d_logger."):
                name = frame.f_code.co_name
            if (function := running_function(frame)) is not None:
                if function in self._of_layers:  # in its backward pass no layer is seen
                    return None
                functions.add(function)
            frame = frame.f_back
        return called


@contextmanager
def refused_collectives(refuse: Callable[[], None]) -> Iterator[None]:
    """Call ``refuse`` before each collective of this thread in this context, whoever starts it."""
    here = threading.get_ident()

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                refuse()
            return original(*args, **kwargs)

        return call

    with _wrapped(lambda _, method: refusing(method), refusing):
        yield


@contextmanager
def _wrapped(
    method: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    resolver: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Wrap everything that collectives pass in this context: methods of process groups, and resolvers of groups."""
    functional, resolvers = functional_resolvers()
    # as the classes hold them, because those of torch do not bind as Python's functions do
    methods = [(cls, name, vars(cls)[name]) for cls in _groups() for name in collective_methods() if name in vars(cls)]
    for name, original in resolvers.items():
        setattr(functional, name, resolver(original))
    for cls, name, _ in methods:
        setattr(cls, name, method(name, getattr(cls, name)))
    try:
        yield
    finally:
        for name, original in resolvers.items():
            setattr(functional, name, original)
        for cls, name, original in methods:
            setattr(cls, name, original)


def _groups(base: type[Any] = dist.ProcessGroup) -> Iterator[type[Any]]:
    """Yield the classes of process groups, among them those that a library has written in Python."""
    yield base
    for cls in base.__subclasses__():
        yield from _groups(cls)


@contextmanager
def _wrapped_wait(wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Wrap the wait for a collective in this context."""
    original = vars(dist.Work)["wait"]
    setattr(dist.Work, "wait", wrapper(dist.Work.wait))  # noqa: B010  # a method, for the type checker
    try:
        yield
    finally:
        setattr(dist.Work, "wait", original)  # noqa: B010


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors_in(entry)
