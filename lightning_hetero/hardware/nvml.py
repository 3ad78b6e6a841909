"""What the NVIDIA driver knows about a device; the only file that imports pynvml.

Nothing here is needed for training: where the library, the driver or a permission is missing, or the device is a part
of another (MIG), the answer is None, and one debug line says why.
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

# bits of nvmlDeviceGetCurrentClocksThrottleReasons; 0x1, an idle device, is no reason to mention
_THROTTLE_REASONS = {
    0x002: "clocks set by a user",
    0x004: "power limit",
    0x008: "slowed down by the hardware",
    0x010: "clocks kept in step with other devices",
    0x020: "heat",
    0x040: "heat, noticed by the hardware",
    0x080: "power brake",
    0x100: "clocks set for the display",
}


class NvmlLibrary(Protocol):
    """The part of pynvml that is used; tests put a driver here that the machine lacks."""

    NVMLError: type[Exception]
    NVMLLibraryMismatchError: type[Exception]
    NVML_CLOCK_SM: int
    NVML_TEMPERATURE_GPU: int

    def nvmlInit(self) -> None:  # noqa: N802  # pynvml's name, as below
        """Connect to the driver."""
        ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        """Return the device of that identity."""
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
        """Return the number of devices, hidden ones too."""
        ...

    def nvmlDeviceGetClockInfo(self, handle: Any, clock: int) -> int:  # noqa: N802
        """Return the present rate of a clock in MHz."""
        ...

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:  # noqa: N802
        """Return why the clocks are not higher, one bit a reason."""
        ...

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        """Return, in percent, when a kernel ran lately (``gpu``)."""
        ...

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        """Return a temperature in degrees Celsius."""
        ...

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        """Return the processes that compute: ``pid`` and ``usedGpuMemory`` in bytes or None."""
        ...

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any) -> list[Any]:  # noqa: N802
        """Return the processes that draw, likewise."""
        ...


class Nvml:
    """Asks the driver about devices by their UUID (``"GPU-..."``), whatever ``CUDA_VISIBLE_DEVICES`` says.

    Args:
        library: what speaks to the driver; pynvml by default.
    """

    def __init__(self, library: NvmlLibrary | None = None) -> None:
        self._given = library
        self._refused: set[tuple[str, str]] = set()

    def nominal_speed(self, uuid: str) -> float | None:
        """Return the device's CUDA cores times their highest clock, in 10^9 a second; None where unknown.

        It compares devices before anything is measured, as roughly as data sheets do: cores of two generations differ.
        """

        def speed(library: NvmlLibrary, handle: Any) -> float | None:
            cores = library.nvmlDeviceGetNumGpuCores(handle)
            clock_mhz = library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM)
            return cores * clock_mhz / 1e3 or None

        return self._ask(uuid, "speed", speed)

    def free_bytes(self, uuid: str) -> int | None:
        """Return the memory of the device that no process has; None where unknown."""
        return self._ask(uuid, "memory", lambda library, handle: int(library.nvmlDeviceGetMemoryInfo(handle).free))

    def total_bytes(self, uuid: str) -> int | None:
        """Return the memory of the device; None where unknown."""
        return self._ask(uuid, "size", lambda library, handle: int(library.nvmlDeviceGetMemoryInfo(handle).total))

    def clock_mhz(self, uuid: str) -> int | None:
        """Return the present clock of the cores; None where unknown."""
        return self._ask(
            uuid, "clock", lambda library, handle: library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)
        )

    def max_clock_mhz(self, uuid: str) -> int | None:
        """Return the highest clock of the cores; None where unknown."""
        return self._ask(
            uuid,
            "highest clock",
            lambda library, handle: library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM),
        )

    def throttled(self, uuid: str) -> tuple[str, ...] | None:
        """Return why the clocks are held back, one phrase a reason; None where unknown, empty where they are not."""

        def reasons(library: NvmlLibrary, handle: Any) -> tuple[str, ...]:
            bits = library.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            return tuple(phrase for bit, phrase in _THROTTLE_REASONS.items() if bits & bit)

        return self._ask(uuid, "throttle reasons", reasons)

    def utilisation(self, uuid: str) -> float | None:
        """Return the part of the last moment, 0 to 1, in which a kernel ran; None where unknown."""
        return self._ask(
            uuid, "utilisation", lambda library, handle: library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        )

    def temperature_c(self, uuid: str) -> int | None:
        """Return the temperature in degrees Celsius; None where unknown."""
        return self._ask(
            uuid,
            "temperature",
            lambda library, handle: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU),
        )

    def others(self, uuid: str) -> tuple[int, int | None] | None:
        """Return how many other processes have memory of the device, and how many bytes; None where unknown."""

        def users(library: NvmlLibrary, handle: Any) -> tuple[int, int | None]:
            running = [
                *library.nvmlDeviceGetComputeRunningProcesses(handle),
                *library.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ]
            # one process may compute and draw; its memory is told twice then
            held = {process.pid: process.usedGpuMemory for process in running if process.pid != os.getpid()}
            known = [bytes_held for bytes_held in held.values() if bytes_held is not None]
            return len(held), sum(known) if len(known) == len(held) else None

        return self._ask(uuid, "processes", users)

    def device_count(self) -> int:
        """Return how many devices the driver has, whatever ``CUDA_VISIBLE_DEVICES`` says; 0 where it does not tell."""
        library = self._library
        if library is None:
            return 0
        try:
            return library.nvmlDeviceGetCount()
        except library.NVMLError as error:
            _log.debug("NVML does not tell the number of devices: %s", error)
            return 0

    def _ask(self, uuid: str, what: str, question: Callable[[NvmlLibrary, Any], Answer | None]) -> Answer | None:
        library = self._library
        if library is None:
            return None
        try:
            return question(library, library.nvmlDeviceGetHandleByUUID(uuid))
        except (library.NVMLError, library.NVMLLibraryMismatchError) as error:  # the latter from old drivers
            if (uuid, what) not in self._refused:
                _log.debug("NVML does not tell the %s of %s: %s", what, uuid, error)
            self._refused.add((uuid, what))
            return None

    @cached_property
    def _library(self) -> NvmlLibrary | None:
        """The library, connected to the driver; None where that cannot be."""
        try:
            library = self._given or _pynvml()
        except ImportError as error:
            _log.debug("NVML is not asked: %s", error)
            return None
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            _log.debug("NVML is not asked: %s", error)
            return None
        return library


def _pynvml() -> NvmlLibrary:
    import pynvml  # here, since most machines that import this package ask no driver

    library: NvmlLibrary = pynvml
    return library
