"""Describe the processor, and the part of it that a container leaves to this process."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from lightning_hetero.balance.device_report import PROCESSOR, DeviceReport
from lightning_hetero.hardware.cgroup import cpu_quota, memory_limit
from lightning_hetero.hardware.processor_name import processor_name

__all__ = ["LoadMeter", "processor_report"]


class LoadMeter:
    """A meter of how busy other processes keep the processor, from the creation of the meter on."""

    def __init__(self) -> None:
        self._busy_s, self._own_s, self._start_s = _busy_s(), _own_s(), time.perf_counter()

    def busy_cores(self) -> float:
        """Return how many cores other processes have kept busy on average; time stolen by a hypervisor counts too."""
        elapsed_s = time.perf_counter() - self._start_s
        others_s = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(others_s, 0.0) / max(elapsed_s, 1e-3)


def processor_report(load: LoadMeter, root: Path = Path("/")) -> DeviceReport:
    """Describe the processor.

    Args:
        load: Load meter, which averages from its creation until now.
        root: Folder that contains ``proc`` and ``sys``.
    """
    logical = psutil.cpu_count() or 1
    quota = cpu_quota(root)
    memory, limit = psutil.virtual_memory(), memory_limit(root)
    limited = limit is not None and limit[0] < memory.total
    total, free = (limit[0], min(limit[1], memory.available)) if limit and limited else (memory.total, memory.available)
    clock_mhz, max_clock_mhz = _clocks_mhz()
    return DeviceReport(
        device=PROCESSOR,
        name=processor_name(root),
        memory_bytes=total,
        free_bytes=free,
        clock_mhz=clock_mhz,
        max_clock_mhz=max_clock_mhz,
        utilisation=round(min(load.busy_cores() / logical, 1.0), 3),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=logical,
        usable_cores=min(float(_allowed_cores(logical)), quota or float(logical)),
    )


def _allowed_cores(logical: int) -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical


def _clocks_mhz() -> tuple[float | None, float | None]:
    """Return the current and the highest clock rate; virtual machines often report one or none."""
    with suppress(Exception):  # psutil passes on any error that the files of this platform cause
        clock = psutil.cpu_freq()
        return (round(clock.current) or None, round(clock.max) or None) if clock else (None, None)
    return None, None


def _busy_s() -> float:
    times = psutil.cpu_times()
    # guest time is already included in user and nice
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(float(getattr(times, name, 0.0)) for name in names)


def _own_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system
