"""Ask the NVIDIA driver about devices; no other file imports pynvml.

Training needs nothing from here.  If the library, the driver or a permission is missing, or if the device is a part of
another one (MIG), the answer is None, and one debug message gives the reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeVar

__all__ = ["Nvml", "NvmlLibrary"]

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)

# bits of nvmlDeviceGetCurrentClocksThrottleReasons; 0x1, an idle device, is not worth a note
_THROTTLE_REASONS = {
    0x002: "clocks set by a user",
    0x004: "power limit",
    0x008: "slowed down by the hardware",
    0x010: "clocks synchronised with other devices",
    0x020: "heat",
    0x040: "heat, detected by the hardware",
    0x080: "power brake",
    0x100: "clocks set for the display",
}


class NvmlLibrary(Protocol):
    """The part of pynvml that is used; tests substitute a driver that the machine lacks."""

    NVMLError: type[Exception]
    NVMLLibraryMismatchError: type[Exception]
    NVML_CLOCK_SM: int
    NVML_TEMPERATURE_GPU: int

    def nvmlInit(self) -> None:  # noqa: N802  # pynvml's name, as below
        """Connect to the driver."""
        ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        """Return the device with this UUID."""
        ...

    def nvmlDeviceGetNumGpuCores(self, handle: Any) -> int:  # noqa: N802
        """Return the number of CUDA cores."""
        ...

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, clock: int) -> int:  # noqa: N802
        """Return the highest rate of a clock in MHz."""
        ...

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        """Return the memory of the device in bytes: ``total``, ``used`` and ``free``."""
        ...

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """Return the number of devices, including hidden ones."""
        ...

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        """Return the version of the driver."""
        ...

    def nvmlDeviceGetClockInfo(self, handle: Any, clock: int) -> int:  # noqa: N802
        """Return the current rate of a clock in MHz."""
        ...

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:  # noqa: N802
        """Return the reasons why the clocks are not higher, one bit per reason."""
        ...

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        """Return the percentage of the recent past in which a kernel ran (``gpu``)."""
        ...

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        """Return a temperature in degrees Celsius."""
        ...

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        """Return the processes that compute, with ``pid`` and ``usedGpuMemory`` in bytes or None."""
        ...

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        """Return the processes that draw, with ``pid`` and ``usedGpuMemory`` in bytes or None."""
        ...


class Nvml:
    """Access to the driver, which knows devices by UUID (``"GPU-..."``) whatever ``CUDA_VISIBLE_DEVICES`` says.

    Args:
        library: Library that talks to the driver; pynvml by default.
    """

    def __init__(self, library: NvmlLibrary | None = None) -> None:
        self._given = library
        self._refused: set[tuple[str, str]] = set()

    def nominal_speed(self, uuid: str) -> float | None:
        """Return the number of CUDA cores times their highest clock, in 10^9 per second; None if unknown.

        It compares devices before anything is measured, only as roughly as data sheets do, because the cores of two
        generations differ.
        """

        def speed(library: NvmlLibrary, handle: Any) -> float | None:
            cores = library.nvmlDeviceGetNumGpuCores(handle)
            clock_mhz = library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM)
            return cores * clock_mhz / 1e3 or None

        return self._ask(uuid, "speed", speed)

    def free_bytes(self, uuid: str) -> int | None:
        """Return the free memory of the device; None if unknown."""
        return self._ask(uuid, "memory", lambda library, handle: int(library.nvmlDeviceGetMemoryInfo(handle).free))

    def total_bytes(self, uuid: str) -> int | None:
        """Return the total memory of the device; None if unknown."""
        return self._ask(uuid, "size", lambda library, handle: int(library.nvmlDeviceGetMemoryInfo(handle).total))

    def clock_mhz(self, uuid: str) -> int | None:
        """Return the current clock rate of the cores; None if unknown."""
        return self._ask(
            uuid, "clock", lambda library, handle: library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)
        )

    def max_clock_mhz(self, uuid: str) -> int | None:
        """Return the highest clock rate of the cores; None if unknown."""
        return self._ask(
            uuid,
            "highest clock",
            lambda library, handle: library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM),
        )

    def throttled(self, uuid: str) -> tuple[str, ...] | None:
        """Return why the clocks are throttled, one phrase per reason; empty if they are not, None if unknown."""

        def reasons(library: NvmlLibrary, handle: Any) -> tuple[str, ...]:
            bits = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            return tuple(phrase for bit, phrase in _THROTTLE_REASONS.items() if bits & bit)

        return self._ask(uuid, "throttle reasons", reasons)

    def utilisation(self, uuid: str) -> float | None:
        """Return the fraction of the recent past in which a kernel ran, 0 to 1; None if unknown."""
        return self._ask(
            uuid, "utilisation", lambda library, handle: library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        )

    def temperature_c(self, uuid: str) -> int | None:
        """Return the temperature in degrees Celsius; None if unknown."""
        return self._ask(
            uuid,
            "temperature",
            lambda library, handle: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU),
        )

    def other_processes(self, uuid: str) -> tuple[int, int | None] | None:
        """Return the number of other processes on the device, and the bytes that they hold; None if unknown."""

        def users(library: NvmlLibrary, handle: Any) -> tuple[int, int | None]:
            running = [
                *library.nvmlDeviceGetComputeRunningProcesses(handle),
                *library.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ]
            # a process that both computes and draws is listed twice
            held = {process.pid: process.usedGpuMemory for process in running if process.pid != os.getpid()}
            known = [bytes_held for bytes_held in held.values() if bytes_held is not None]
            return len(held), sum(known) if len(known) == len(held) else None

        return self._ask(uuid, "processes", users)

    def device_count(self) -> int:
        """Return the driver's number of devices, whatever ``CUDA_VISIBLE_DEVICES`` says; 0 if unknown."""
        library = self._library
        if library is None:
            return 0
        try:
            return library.nvmlDeviceGetCount()
        except library.NVMLError as error:
            _log.debug("NVML does not report the number of devices: %s", error)
            return 0

    def driver_version(self) -> str | None:
        """Return the version of the driver; None if unknown."""
        library = self._library
        if library is None:
            return None
        try:
            return library.nvmlSystemGetDriverVersion()
        except library.NVMLError as error:
            _log.debug("NVML does not report the driver's version: %s", error)
            return None

    def _ask(self, uuid: str, what: str, question: Callable[[NvmlLibrary, Any], Answer | None]) -> Answer | None:
        library = self._library
        if library is None:
            return None
        try:
            return question(library, library.nvmlDeviceGetHandleByUUID(uuid))
        except (library.NVMLError, library.NVMLLibraryMismatchError) as error:  # old drivers cause the latter
            if (uuid, what) not in self._refused:
                _log.debug("NVML does not report the %s of %s: %s", what, uuid, error)
            self._refused.add((uuid, what))
            return None

    @cached_property
    def _library(self) -> NvmlLibrary | None:
        """The library, connected to the driver; None if that is impossible."""
        try:
            library = self._given or _pynvml()
        except ImportError as error:
            _log.debug("NVML is not used: %s", error)
            return None
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            _log.debug("NVML is not used: %s", error)
            return None
        return library


def _pynvml() -> NvmlLibrary:
    import pynvml  # imported here, because most machines with this package need no driver

    library: NvmlLibrary = pynvml
    return library
