"""Measure a rank's own time: how long a step takes it, without the waiting for other ranks.

The timer is a stopwatch.  It stands still wherever the rank may be waiting for others: from its last local gradient
until the gradients are combined, and wherever the training loop communicates outside the backward pass.  A step's own
time is what ran between the last gradients of two consecutive steps, so it counts the optimiser, the callbacks, the
waiting for data, the transfer, forward and backward; the rest between those gradients is waiting.  Only durations of
one clock are taken; clocks are never compared.

Where a backward pass runs others inside it (reentrant checkpointing), ranks wait for each other in an inner one, and
hooks on the parameters tell the last gradient.  Whether that is so is found out in a first step, which is not counted.

On CUDA the marks are events in the current stream, read when the timings are asked for, steps later.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from lightning_hetero.balance.types import StepTiming

__all__ = ["Clock", "CudaClock", "HostClock", "StepTimer"]


class Clock(Protocol):
    """Marks moments and measures between two of them."""

    def mark(self) -> Any:
        """Return a mark of this moment; must not wait for the device."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks; may wait until the device has passed the second."""
        ...


class HostClock:
    """The processor's monotonic clock."""

    def mark(self) -> float:
        """Return the present reading in seconds."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two readings."""
        return end - start


class CudaClock:
    """Events in the current stream of the current device."""

    def mark(self) -> torch.cuda.Event:
        """Record an event and return it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the seconds between two events, once the device has passed them."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


_Span = tuple[Any, Any]


@dataclass
class _Step:
    samples: int = 0
    own: list[_Span] = field(default_factory=list)
    whole: _Span | None = None


class StepTimer:
    """The stopwatch of one rank; does nothing while it is not enabled.

    Args:
        clock: what marks the moments.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._enabled = False
        self._since: Any = None
        self._ready: Any = None
        self._ready_in_step_before: Any = None
        self._running: list[_Span] = []
        self._step = _Step()
        self._measured: list[_Step] = []
        self._nested: bool | None = None  # None until a step was looked at
        self._pass = -1
        self._last_gradient: Any = None
        self._gradient_hooks: list[RemovableHandle] = []

    @property
    def enabled(self) -> bool:
        """Whether anything is measured."""
        return self._enabled

    def enable(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        """Begin to measure; the step under way is not whole and will not be counted.

        Args:
            parameters: what is trained; they carry a hook in the first step, and longer only where backward passes
                turn out to be nested.
        """
        if not self._enabled:
            self.disable()
            self._enabled = True
            if self._nested is not False:
                hooked = (parameter for parameter in parameters if parameter.requires_grad)
                self._gradient_hooks = [parameter.register_hook(self._note_gradient) for parameter in hooked]

    def disable(self) -> None:
        """Measure nothing any more and forget what was not read."""
        self._enabled = False
        self._since = self._ready = self._ready_in_step_before = self._last_gradient = None
        self._running = []
        self._step = _Step()
        self._measured = []
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []

    def resume(self) -> None:
        """From here on the rank works."""
        if self._enabled and self._since is None:
            self._since = self._clock.mark()

    def pause(self) -> None:
        """From here on the rank may wait for others."""
        if self._enabled and self._since is not None:
            self._running.append((self._since, self._clock.mark()))
            self._since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In this context the rank may wait for others."""
        was_running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.resume()

    def watch_backward(self, loss: torch.Tensor) -> None:
        """Note the moment at which the coming backward pass has computed its last gradient.

        Args:
            loss: what ``backward`` will be called on.
        """
        if self._enabled and loss.requires_grad:
            loss.register_hook(self._queue_gradients_ready)

    def _queue_gradients_ready(self, gradient: torch.Tensor) -> None:  # noqa: ARG002  # autograd passes it
        # Callbacks of the engine run in the order in which they were queued, once all gradients are computed. DDP
        # waits for its peers in such a callback, which it queues in the midst of the backward pass; this one was
        # queued at its start. Nothing public marks this moment: hooks on parameters cost Python for each of them.
        # tests/distributed/test_step_timer.py fails where the order changes.
        torch.autograd.Variable._execution_engine.queue_callback(self.gradients_ready)
        self._pass = torch._C._current_graph_task_id()

    def _note_gradient(self, gradient: torch.Tensor) -> None:  # noqa: ARG002  # autograd passes it
        # the number of the running pass is private; torch tells nested passes apart by it (graph.py), and the test of
        # the timer under reentrant checkpointing fails without it
        if torch._C._current_graph_task_id() != self._pass:
            self._nested = True
        self._last_gradient = self._clock.mark()

    def gradients_ready(self) -> None:
        """The last local gradient is computed."""
        if not self._enabled:
            return
        noted, self._last_gradient = self._last_gradient, None
        self._ready = noted if self._nested and noted is not None else self._clock.mark()
        if self._since is not None:
            self._running.append((self._since, self._ready))
            self._since = None
        self._step.own += self._running
        self._running = []

    def finish_step(self, samples: int, keep: bool = True) -> None:
        """Close the account of a step.

        Args:
            samples: what the rank processed in it.
            keep: whether the step counts as measured.
        """
        if not self._enabled:
            return
        step, self._step = self._step, _Step()
        begin, end = self._ready_in_step_before, self._ready
        self._ready_in_step_before, self._ready = end, None
        # the first step lacks what came before the timer was enabled
        if keep and begin is not None and end is not None:
            step.samples, step.whole = samples, (begin, end)
            self._measured.append(step)
        if end is not None and not self._nested:
            self._nested = False
            self._remove_hooks()

    def take(self) -> list[StepTiming]:
        """Return the steps measured since the last call; on CUDA this waits for the latest of them."""
        measured, self._measured = self._measured, []
        return [self._timing(step) for step in measured]

    def _timing(self, step: _Step) -> StepTiming:
        assert step.whole is not None
        own_s = sum(self._clock.seconds(start, end) for start, end in step.own)
        return StepTiming(step.samples, own_s, max(self._clock.seconds(*step.whole) - own_s, 0.0))
