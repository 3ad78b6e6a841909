"""Train a small network on a device for a few seconds to measure its speed.

Every step is a full one: forward pass, backward pass, optimiser.  Batch sizes are interleaved, so that a lasting
disturbance affects all of them, and the times of each size are reduced to their median.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch
from torch import nn

from lightning_hetero.balance.device_report import Measurement
from lightning_hetero.balance.line_fit import fit_line, relative_spread
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware.timed_call import timed_call

__all__ = ["Workload", "measure_device"]

_FIRST_SIZE = 8
_LARGEST_SIZE = 2048
_SIZES = 4
_MIN_ROUNDS, _ROUNDS, _MAX_ROUNDS = 3, 8, 200
# Fraction of the time that the search for the sizes may take; the rest is for rounds.
_SEARCH_PART = 0.3
_CHANNELS, _WIDTH, _CLASSES = 3, 32, 10

Step = Callable[[], object]


class Workload(Protocol):
    """A network to train; tests substitute work of known duration."""

    description: str

    def step(self, samples: int) -> Step:
        """Return a function that runs a training step with ``samples`` samples."""
        ...


class _ReferenceNetwork:
    """Four convolutions, trained by gradient descent with momentum on random images.

    Args:
        device: Device to train on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._network = nn.Sequential(
            *(nn.Conv2d(_CHANNELS, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, _CLASSES)),
        ).to(device)
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=1e-3, momentum=0.9)
        count = torch.get_num_threads()
        threads = f", {count} {'thread' if count == 1 else 'threads'}" if device.type == "cpu" else ""
        self.description = f"four convolutions on {_CHANNELS}x{_WIDTH}x{_WIDTH}, float32, SGD{threads}"

    def step(self, samples: int) -> Step:
        """Return a function that runs a training step with ``samples`` samples."""
        inputs = torch.rand(samples, _CHANNELS, _WIDTH, _WIDTH, device=self._device)
        targets = torch.randint(_CLASSES, (samples,), device=self._device)

        def step() -> None:
            self._optimizer.zero_grad()
            nn.functional.cross_entropy(self._network(inputs), targets).backward()
            self._optimizer.step()

        return step


def measure_device(device: torch.device, seconds: float, workload: Workload | None = None) -> Measurement:
    """Measure the speed of a device, in about ``seconds``, or in the time of twelve steps if that is longer.

    Args:
        device: Device to measure; this process allocates memory on it.
        seconds: Approximate duration of the measurement.
        workload: Network to train; a small convolutional network by default.

    Raises:
        UnsupportedFeatureError: The device failed, or has too little memory even for the smallest sizes.
    """
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            workload = workload or _ReferenceNetwork(device)
            times_s = _times(workload, _sizes(workload, device, seconds), device, (1 - _SEARCH_PART) * seconds)
    except (RuntimeError, MemoryError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnsupportedFeatureError(f"{device} could not be measured: {reason}.") from error
    finally:
        if device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    line, largest = fit_line(times_s), max(times_s)
    return Measurement(
        overhead_s=line.overhead_s,
        seconds_per_sample=line.seconds_per_sample,
        samples_per_s=float(f"{largest / median(times_s[largest]):.4g}"),
        spread=round(relative_spread(times_s[largest]), 4),
        workload=f"{workload.description}, {min(times_s)} to {largest} samples per step",
    )


def _sizes(workload: Workload, device: torch.device, seconds: float) -> list[int]:
    """Return doubling sizes; a step of the largest takes long enough, or it is the limit, or just fits into memory."""
    # each smaller size takes half the time, so a round takes less than twice the time of its largest step
    enough_s = (1 - _SEARCH_PART) * seconds / (2 * _ROUNDS)
    largest = _FIRST_SIZE
    try:
        while largest <= _LARGEST_SIZE:
            step = workload.step(largest)
            step()  # the first step of a size may take longer
            # the minimum of two, so that one disturbance does not keep all sizes small
            if min(timed_call(step, device)[1] for _ in range(2)) > enough_s / 2:
                break
            largest *= 2
        else:
            largest //= 2
    except (torch.cuda.OutOfMemoryError, MemoryError):
        if largest == _FIRST_SIZE:
            raise
        largest //= 2
    return [largest >> k for k in reversed(range(_SIZES))]


def _times(workload: Workload, sizes: list[int], device: torch.device, seconds: float) -> dict[int, list[float]]:
    """Return the seconds of each repetition of each size."""
    steps = {size: workload.step(size) for size in sizes}
    for step in steps.values():
        step()
    times_s: dict[int, list[float]] = {size: [] for size in sizes}
    start_s = time.perf_counter()
    for count in range(_MAX_ROUNDS):
        if count >= _MIN_ROUNDS and time.perf_counter() - start_s > seconds:
            break
        for size, step in steps.items():
            times_s[size].append(timed_call(step, device)[1])
    return times_s
