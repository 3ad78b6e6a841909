"""Measure a rank's own time: the time that a step takes without waiting for other ranks.

The timer is a stopwatch.  It stops wherever the rank may be waiting for others: from its last local gradient until the
gradients are combined, and wherever the training loop or a layer communicates, in a forward pass, in a backward pass or
outside of them.  A step's own time is what the stopwatch measured between the last gradients of two consecutive steps.
So it includes the optimiser, the callbacks, the waiting for data, the transfer, and the forward and backward passes;
the rest of the time between those gradients is waiting.  Only durations of a single clock are used; clocks are never
compared.

If a backward pass runs others inside it (reentrant checkpointing), ranks wait for each other in an inner one, and hooks
on the parameters mark the last gradient.  The first step, which is not counted, shows whether that is so.

On a device that has events the marks are events in the current stream.  They are read when the timings are requested,
steps later.  A collective runs in this stream, or the stream waits for the one in which it runs; so what lies between
the mark before a collective and the mark after the wait for it is the waiting and the transfer.

A host that launches a step's work more slowly than its device does it leaves gaps between the kernels.  How much of
them lies in a rank's own time depends on how far its host has run ahead, and so on how long the rank has waited for
others: own times of ranks could not be compared.  A step whose host begins only when the device has ended the step
before (:meth:`StepTimer.wait_for_device`) holds all gaps, as the slowest rank's does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from lightning_hetero.balance.types import StepTiming
from lightning_hetero.distributed.torch_private import current_backward_pass, queue_after_backward

__all__ = ["Clock", "CudaClock", "EventClock", "HostClock", "StepTimer", "clock_of"]


class Clock(Protocol):
    """Marks moments and measures the time between two of them."""

    def mark(self) -> Any:
        """Return a mark of the current moment; must not wait for the device."""
        ...

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks; may wait until the device has passed the second one."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until the device has passed ``mark``."""
        ...


class HostClock:
    """A clock that reads the processor's monotonic time."""

    def mark(self) -> float:
        """Return the current reading in seconds."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Return the seconds between two readings."""
        return end - start

    def wait(self, mark: float) -> None:
        """Return at once: the processor has passed it."""


class EventClock:
    """A clock that records events in the current stream of the current device.

    Args:
        event: Function that returns an event which measures time.
    """

    def __init__(self, event: Callable[[], Any]) -> None:
        self._event = event

    def mark(self) -> Any:
        """Record an event and return it."""
        event = self._event()
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Wait until the device has passed both events, and return the seconds between them."""
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wait(self, mark: Any) -> None:
        """Wait until the device has passed ``mark``."""
        mark.synchronize()


class CudaClock(EventClock):
    """A clock that records events in the current stream of the current CUDA device."""

    def __init__(self) -> None:
        super().__init__(_cuda_event)


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def clock_of(
    device: torch.device,
    strategy: str = "hetero_ddp",
    way_out: str = "Give the shares, for example HeteroDDPStrategy(shares=[1, 2])",
) -> Clock:
    """Return the clock of a device; warn if that is only the host's, because the device's events do not measure time.

    Args:
        device: Device of this rank, which is the current one.
        strategy: Name of the strategy that measures.
        way_out: What the warning proposes.
    """
    if device.type == "cpu":
        return HostClock()
    if device.type == "cuda":
        return CudaClock()
    try:
        clock = EventClock(partial(torch.get_device_module(device).Event, enable_timing=True))
        clock.seconds(clock.mark(), clock.mark())
    except Exception as error:  # whatever a backend raises for what it does not have
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        warnings.warn(
            f"`{strategy}`: events of {device} do not measure time ({reason}), so the host's clock measures this rank:"
            f" it sees how long the host takes to launch a step, not how long the device works. {way_out}.",
            stacklevel=2,
        )
        return HostClock()
    return clock


_Span = tuple[Any, Any]


@dataclass
class _Step:
    samples: int = 0
    own: list[_Span] = field(default_factory=list)
    whole: _Span | None = None


class StepTimer:
    """Measures the steps of one rank; does nothing until it is enabled.

    Args:
        clock: Clock that marks the moments.
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
        self._nested: bool | None = None  # None until a step was examined
        self._pass: int | None = None  # the watched backward pass while it runs
        self._waits = 0
        self._last_gradient: tuple[Any, list[_Span]] | None = None  # its mark, and the own time up to it
        self._gradient_hooks: list[RemovableHandle] = []

    @property
    def enabled(self) -> bool:
        """Whether steps are measured."""
        return self._enabled

    def enable(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        """Begin to measure; the current step is incomplete and is not counted.

        Args:
            parameters: Trained parameters. They carry a hook during the first step, and longer only if backward passes
                turn out to be nested.
        """
        if not self._enabled:
            self.disable()
            self._enabled = True
            if self._nested is not False:
                hooked = (parameter for parameter in parameters if parameter.requires_grad)
                self._gradient_hooks = [parameter.register_hook(self._note_gradient) for parameter in hooked]

    def disable(self) -> None:
        """Stop measuring, and discard steps that were not read."""
        self._enabled = False
        self._since = self._ready = self._ready_in_step_before = self._last_gradient = self._pass = None
        self._running = []
        self._step = _Step()
        self._measured = []
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = []

    def resume(self) -> None:
        """Start the stopwatch: from here on the rank works."""
        if self._enabled and self._since is None and not self._waits:
            self._since = self._clock.mark()

    def pause(self) -> None:
        """Stop the stopwatch: from here on the rank may wait for others."""
        if self._enabled and self._since is not None:
            self._running.append((self._since, self._clock.mark()))
            self._since = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Stop the stopwatch in this context, in which the rank may wait for others; nothing starts it there."""
        was_running = self._since is not None
        self.pause()
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1
            if was_running:
                self.resume()

    def watch_backward(self, loss: torch.Tensor) -> None:
        """Note the moment at which the next backward pass has computed its last gradient.

        Args:
            loss: Loss whose ``backward`` method will be called.
        """
        if self._enabled and loss.requires_grad:
            loss.register_hook(self._queue_gradients_ready)

    def _queue_gradients_ready(self, gradient: torch.Tensor) -> None:  # noqa: ARG002  # autograd passes it
        # DDP queues its wait for the peers later in the pass; tests/distributed/test_step_timer.py checks the order
        queue_after_backward(self.gradients_ready)
        self._pass = current_backward_pass()

    def _note_gradient(self, gradient: torch.Tensor) -> None:  # noqa: ARG002  # autograd passes it
        if self._pass is None:  # of a pass of its own, in which no rank waits
            return
        if current_backward_pass() != self._pass:
            self._nested = True
        mark = self._clock.mark()
        # layers may communicate later in the pass, when DDP has waited
        self._last_gradient = mark, [*self._running, *([] if self._since is None else [(self._since, mark)])]

    def backward_interrupted(self) -> None:
        """Note that an error has ended the watched backward pass, and that its gradients are computed in other ways."""
        self._pass = self._last_gradient = None

    def gradients_ready(self) -> None:
        """Note that the last local gradient has been computed."""
        self._pass = None
        if not self._enabled:
            return
        noted, self._last_gradient = self._last_gradient, None
        if self._nested and noted is not None:
            self._ready, self._running = noted
        else:
            self._ready = self._clock.mark()
            if self._since is not None:
                self._running.append((self._since, self._ready))
        self._since = None
        self._step.own += self._running
        self._running = []

    def finish_step(self, samples: int, keep: bool = True) -> None:
        """End the measurement of a step.

        Args:
            samples: Number of samples that the rank processed in it.
            keep: Whether the step counts as measured.
        """
        if not self._enabled:
            return
        self._pass = None
        step, self._step = self._step, _Step()
        begin, end = self._ready_in_step_before, self._ready
        self._ready_in_step_before, self._ready = end, None
        # The first step lacks the time before the timer was enabled.
        if keep and begin is not None and end is not None:
            step.samples, step.whole = samples, (begin, end)
            self._measured.append(step)
        if end is not None and not self._nested:
            self._nested = False
            self._remove_hooks()

    def wait_for_device(self) -> None:
        """Wait until the device has ended its work, so that the host does not run ahead in the next step."""
        if self._enabled:
            self._clock.wait(self._clock.mark())

    def take(self) -> list[StepTiming]:
        """Return the steps measured since the last call; waits until the device has done the latest of them."""
        measured, self._measured = self._measured, []
        return [self._timing(step) for step in measured]

    def _timing(self, step: _Step) -> StepTiming:
        assert step.whole is not None
        own_s = sum(self._clock.seconds(start, end) for start, end in step.own)
        return StepTiming(step.samples, own_s, max(self._clock.seconds(*step.whole) - own_s, 0.0))
