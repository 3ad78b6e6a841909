"""What the NVIDIA driver knows about a device; the only file that imports pynvml.

Nothing here is needed for training: where the library, the driver or a permission is missing, or the device is a part
of another (MIG), the answer is None, and one debug line says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, TypeVar

__all__ = ["Nvml", "NvmlLibrary"]

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)


class NvmlLibrary(Protocol):
    """The part of pynvml that is used; tests put a driver here that the machine lacks."""

    NVMLError: type[Exception]
    NVML_CLOCK_SM: int

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

    def _ask(self, uuid: str, what: str, question: Callable[[NvmlLibrary, Any], Answer | None]) -> Answer | None:
        library = self._library
        if library is None:
            return None
        try:
            return question(library, library.nvmlDeviceGetHandleByUUID(uuid))
        except library.NVMLError as error:
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
