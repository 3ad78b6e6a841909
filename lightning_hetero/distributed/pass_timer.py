"""Measure how long the passes of a rank take in a step, and how long the rank waits between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from lightning_hetero.balance.types import StepTiming
from lightning_hetero.distributed.step_timer import Clock

__all__ = ["PassTimer"]

_Result = TypeVar("_Result")


class PassTimer:
    """Adds up the passes of each measured step of one rank; does nothing until a step is begun.

    A stage has what it needs for a pass before the pass begins: on a device that has events, the current stream has
    waited for it. So the marks before and after the pass enclose no waiting for other ranks. They are read when the
    timings are requested, steps later.

    A host that launches a pass more slowly than its device does it leaves gaps between the kernels, and how much of
    them lies in a pass depends on how far the host has run ahead. Measured ``synchronised``, it waits for the device
    before each pass, so that all of them do.

    Args:
        make_clock: Function that returns the clock that marks the moments; called before the first measured step.
    """

    def __init__(self, make_clock: Callable[[], Clock]) -> None:
        self._make_clock = make_clock
        self._runs = self._synchronised = False
        self._spans: list[tuple[Any, Any]] = []
        self._measured: list[tuple[int, bool, list[tuple[Any, Any]]]] = []

    def begin_step(self, *, synchronised: bool = False) -> None:
        """Measure the passes from here on.

        Args:
            synchronised: Whether the host waits for its device before each pass.
        """
        self._runs, self._synchronised, self._spans = True, synchronised, []

    @cached_property
    def _clock(self) -> Clock:
        return self._make_clock()

    def time(self, run: Callable[..., _Result], *args: Any) -> _Result:
        """Return what a pass returns."""
        if not self._runs:
            return run(*args)
        if self._synchronised:
            self._clock.wait(self._clock.mark())
        start = self._clock.mark()
        result = run(*args)
        self._spans.append((start, self._clock.mark()))
        return result

    def end_step(self, samples: int) -> None:
        """End the measurement of a step.

        Args:
            samples: Number of samples in the step.
        """
        if self._runs:
            self._measured.append((samples, self._synchronised, self._spans))
        self._runs, self._spans = False, []

    def discard(self) -> None:
        """Forget everything that was measured."""
        self._runs, self._spans, self._measured = False, [], []

    def take(self) -> list[StepTiming]:
        """Return the steps measured since the last call; waits until the device has done the latest of them.

        The waiting of a step is what passes between its first pass and its last one without a pass. Of synchronised
        steps it is 0, because hosts that wait make a step longer than others.
        """
        measured, self._measured = self._measured, []
        return [StepTiming(samples, *self._own_and_waiting(spans, known=not wait)) for samples, wait, spans in measured]

    def _own_and_waiting(self, spans: Sequence[tuple[Any, Any]], *, known: bool) -> tuple[float, float]:
        own_s = sum(self._clock.seconds(start, end) for start, end in spans)
        if not spans or not known:
            return own_s, 0.0
        return own_s, max(self._clock.seconds(spans[0][0], spans[-1][1]) - own_s, 0.0)
