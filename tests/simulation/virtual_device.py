"""Ranks whose devices work asynchronously to their hosts, with a clock that the real StepTimer reads.

A host launches work and runs ahead of its device, which does the work in order. Marks are events of the device. An
all-reduce begins when the devices of all ranks have come to it. Only times are simulated: the timer, the tuning session
and the solver are those of real trainings.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from simulation.ranks import SimulatedRanks

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.tuning.session import StepFacts
from lightning_hetero.balance.types import BatchLimits, BatchPlan, PlanSchedule
from lightning_hetero.distributed.step_timer import StepTimer

__all__ = ["VirtualRank", "VirtualRun", "train_virtually"]

_RUN_AHEAD_STEPS = 50
_BACKWARD = 2 / 3  # of the work of a step


@dataclass(frozen=True)
class VirtualRank:
    """The work of one rank in a step.

    Attributes:
        host_s: Seconds in which the host launches the work of a step, whatever the mini-batch.
        overhead_s: Seconds of the device per step.
        seconds_per_sample: Seconds of the device per sample.
        synchronises: Whether the host waits for the device at the end of each step, as a progress bar, a scaler or
            ``.item()`` makes it.
    """

    host_s: float
    overhead_s: float
    seconds_per_sample: float
    synchronises: bool = False


class _Device:
    """The timelines of a host and its device; also the clock of the rank."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self._ends_of_steps: deque[float] = deque(maxlen=_RUN_AHEAD_STEPS)

    def launch(self, host_s: float, device_s: float) -> None:
        """Launch work in many small pieces: the device cannot end it before the host has launched all of it."""
        begin = self.host
        self.host += host_s
        self.device = max(max(self.device, begin) + device_s, self.host)

    def end_step(self) -> None:
        """Wait where the host is too far ahead."""
        if len(self._ends_of_steps) == _RUN_AHEAD_STEPS:
            self.host = max(self.host, self._ends_of_steps[0])
        self._ends_of_steps.append(self.device)

    def mark(self) -> float:
        return max(self.device, self.host)

    def seconds(self, start: float, end: float) -> float:
        self.wait(end)
        return end - start

    def wait(self, mark: float) -> None:
        self.host = max(self.host, mark)


@dataclass(frozen=True)
class VirtualRun:
    """The outcome of a simulated training.

    Attributes:
        step_s: Seconds of each step.
        changes: Changes of plan, as pairs of the first step and the plan.
        plan: The last plan.
    """

    step_s: tuple[float, ...]
    changes: tuple[tuple[int, BatchPlan], ...]
    plan: BatchPlan

    def seconds_per_step(self, last: int) -> float:
        """Return the mean over the last steps."""
        return sum(self.step_s[-last:]) / last


def _meet(devices: Sequence[_Device], timers: Sequence[StepTimer], communication_s: float) -> None:
    with ExitStack() as waiting:
        for timer in timers:
            waiting.enter_context(timer.waiting())
        end = max(device.mark() for device in devices) + communication_s
        for device in devices:
            device.device = end
    for device in devices:
        device.wait(end)  # torch reads how many ranks have samples


def train_virtually(
    ranks: Sequence[VirtualRank],
    global_batch_size: int,
    steps: int,
    *,
    jitter: float = 0.01,
    seed: int = 0,
    communication_s: float = 0.2e-3,
    stall: tuple[int, int, float] = (-1, 1, 0.0),
    meetings: int = 0,
    tuned: bool = True,
) -> VirtualRun:
    """Train on virtual devices.

    Args:
        ranks: The work of each rank.
        global_batch_size: Number of samples that are divided, at first equally.
        steps: Number of training steps.
        jitter: Standard deviation of the times of hosts and devices, relative.
        seed: Seed of the jitter.
        communication_s: Seconds of an all-reduce.
        stall: A rank, and every how many steps its host waits how long for data.
        meetings: Number of times in a step at which the devices wait for each other before the last gradient, and their
            hosts for them, as in synchronised batch normalisation.
        tuned: Whether the shares are tuned.
    """
    rng = random.Random(seed)
    equal = proportional_plan([1.0] * len(ranks), global_batch_size, min_samples=1)
    simulated = SimulatedRanks(PlanSchedule.constant(equal), BatchLimits(), asynchronous=True)
    devices = [_Device() for _ in ranks]
    timers = [StepTimer(device) for device in devices]
    simulated.timers = timers
    if tuned:
        simulated.begin(0)
    ends, before = [], 0.0
    for step in range(steps):
        plan = simulated.schedule.at(step)
        work = []
        for r, (rank, device, timer, n) in enumerate(zip(ranks, devices, timers, plan.samples, strict=True)):
            host_s = rank.host_s * max(0.2, rng.gauss(1, jitter))
            device_s = (rank.overhead_s + rank.seconds_per_sample * n) * max(0.2, rng.gauss(1, jitter))
            work.append((host_s / (meetings + 1), device_s / (meetings + 1)))
            timer.resume()
            if r == stall[0] and step % stall[1] == 0:
                device.host += stall[2]
        for part in range(meetings + 1):
            for device, (host_s, device_s) in zip(devices, work, strict=True):
                device.launch(host_s * (1 - _BACKWARD), device_s * (1 - _BACKWARD))
                device.launch(host_s * _BACKWARD, device_s * _BACKWARD)
            if part < meetings:
                _meet(devices, timers, communication_s)
        for timer in timers:
            timer.gradients_ready()
        end = max(device.device for device in devices) + communication_s
        for rank, device, timer in zip(ranks, devices, timers, strict=True):
            device.device = end
            timer.resume()
            device.end_step()
            if rank.synchronises:
                device.wait(device.device)
        ends.append(end - before)
        before = end
        if tuned:
            simulated.end_step(StepFacts(step, simulated.schedule, global_batch_size, step, math.inf), ())
    return VirtualRun(tuple(ends), tuple(simulated.session.changes), simulated.schedule.plans[-1])
