"""Work of known duration on a device, and the duration of blocks of steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_hetero.distributed.torch_private import sleep_on_device

__all__ = ["BlockClock", "Pause"]

_CYCLES_TO_CALIBRATE = 50_000_000


class Pause:
    """Work of known duration: kernels that count clock cycles on a GPU, sleep on a processor.

    Args:
        device: Device that works.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._cycles_per_s = 0.0
        if self._on_gpu:
            for _ in range(2):  # the first one wakes the device, whose clock is slow while it is idle
                start = self._mark()
                sleep_on_device(_CYCLES_TO_CALIBRATE)
                end = self._mark()
                end.synchronize()
                self._cycles_per_s = _CYCLES_TO_CALIBRATE / (start.elapsed_time(end) / 1e3)

    def __call__(self, seconds: float) -> None:
        """Keep the device busy for about this many seconds."""
        begin = self._mark()
        if self._on_gpu:
            sleep_on_device(int(self._cycles_per_s * seconds))
        else:
            time.sleep(seconds)
        self._spans.append((begin, self._mark()))

    def seconds(self) -> list[float]:
        """Return how long each pause has really taken, as the device has measured it."""
        if not self._on_gpu:
            return [end - begin for begin, end in self._spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._spans]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class BlockClock(Callback):
    """Measures blocks of steps; at the end of each, the host waits for the device, so that a block is whole.

    Args:
        steps: Number of steps per block.
        skipped: Number of steps before the first block.
    """

    def __init__(self, steps: int, skipped: int) -> None:
        self.steps, self.skipped = steps, skipped
        self._done = 0
        self._ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time at the end of a block."""
        self._done += 1
        if self._done >= self.skipped and (self._done - self.skipped) % self.steps == 0:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._ends.append(time.perf_counter())

    def seconds_per_step(self) -> list[float]:
        """Return the mean step of each block."""
        return [(end - begin) / self.steps for begin, end in zip(self._ends, self._ends[1:], strict=False)]
