"""Measure how much device memory a process has used and how much it could use."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.hardware.nvml import Nvml

__all__ = [
    "CudaMemoryMeter",
    "MemoryMeter",
    "MemoryUse",
    "fits",
    "is_nearly_full",
    "meter_of",
    "state_per_parameter",
]

# Contexts and workspaces of CUDA's libraries take some hundred megabytes, and convolutions may need gigabytes.
_NEARLY_FULL_FRACTION = 0.05
_NEARLY_FULL_BYTES = 2**29

_USUAL_STATE = 2.0  # Adam and its variants


@dataclass(frozen=True)
class MemoryUse:
    """A reading of the memory of one device.

    Attributes:
        resident_bytes: Memory that this process holds now, between two steps.
        peak_bytes: Largest memory that this process has held since the meter was restarted.
        available_bytes: Memory that this process could hold: its allocated plus free memory.
    """

    resident_bytes: int
    peak_bytes: int
    available_bytes: int


class MemoryMeter(Protocol):
    """A reader of a device's memory; tests substitute devices that the machine lacks."""

    def restart(self) -> None:
        """Reset the peak; must not wait for the device."""
        ...

    def read(self) -> MemoryUse | None:
        """Return the memory use since the restart, None if unknown; must not wait for the device."""
        ...


class CudaMemoryMeter:
    """A meter that asks torch's allocator for this process's memory, and the driver for free memory.

    Args:
        device: CUDA device to read.
        nvml: Access to NVIDIA's driver; if it cannot answer, torch is asked instead.
    """

    def __init__(self, device: torch.device, nvml: Nvml | None = None) -> None:
        self._device = device
        self._nvml = nvml or Nvml()
        self._uuid = f"GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', None)}"

    def restart(self) -> None:
        """Reset the peak."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> MemoryUse:
        """Return the memory use since the restart."""
        free = self._nvml.free_bytes(self._uuid)
        if free is None:
            free = torch.cuda.mem_get_info(self._device)[0]
        return MemoryUse(
            resident_bytes=torch.cuda.memory_allocated(self._device),
            peak_bytes=torch.cuda.max_memory_allocated(self._device),
            available_bytes=free + torch.cuda.memory_reserved(self._device),
        )


def meter_of(device: torch.device) -> MemoryMeter | None:
    """Return the meter of a device; None for a processor, whose memory is shared with everything else."""
    return CudaMemoryMeter(device) if device.type == "cuda" else None


def is_nearly_full() -> bool:
    """Return whether the driver has little memory left on the current CUDA device; False if it does not answer.

    Libraries allocate from the driver, so memory that torch's allocator caches does not help them.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    with suppress(RuntimeError):  # after some errors a device no longer answers
        free, total = torch.cuda.mem_get_info()
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()  # not in all versions
        limited = fraction * total - torch.cuda.memory_reserved()
        return bool(min(free, limited) < max(_NEARLY_FULL_BYTES, _NEARLY_FULL_FRACTION * total))
    return False


def fits(size_bytes: int, device: torch.device) -> bool:
    """Return whether a device has much more free memory than ``size_bytes``; False if it does not say.

    Memory that torch's allocator has reserved and does not use is free on CUDA devices.
    """
    if (meter := meter_of(device)) is not None:
        use = meter.read()
        free_bytes = 0 if use is None else use.available_bytes - use.resident_bytes
    else:
        info = getattr(torch.get_device_module(device), "mem_get_info", None)  # not every device has it
        free_bytes = 0 if info is None else info(device)[0]
    return bool(2 * size_bytes < free_bytes - _NEARLY_FULL_BYTES)


def state_per_parameter(optimizer: Optimizer) -> float:
    """Return how many numbers an optimiser keeps per trained number, measured on a small parameter."""
    parameter = nn.Parameter(torch.zeros(8, 8))
    with suppress(Exception):  # not every optimiser can be created from its defaults
        twin = type(optimizer)([parameter], **optimizer.defaults)
        parameter.grad = torch.ones_like(parameter)
        twin.step()
        kept = [v for v in twin.state[parameter].values() if isinstance(v, torch.Tensor) and v.dim()]
        return sum(value.numel() for value in kept) / parameter.numel()
    return _USUAL_STATE
