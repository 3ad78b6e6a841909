"""Describe the device that a rank runs on."""

from __future__ import annotations

import socket
from typing import Protocol

import torch

from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.hardware.nvml import Nvml
from lightning_hetero.hardware.processor_name import processor_name

__all__ = ["DeviceProbe", "TorchDeviceProbe"]


class DeviceProbe(Protocol):
    """Anything that can say what a device is; tests put devices here that the machine lacks."""

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return what ``device`` is."""
        ...


class TorchDeviceProbe:
    """Asks torch, for NVIDIA's devices the driver, and for processors the operating system.

    Args:
        nvml: what asks the driver.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml or Nvml()

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return what ``device`` is; on CUDA this initialises the device."""
        if device.type != "cuda":
            return DeviceProfile(socket.gethostname(), str(device), processor_name())
        # not every build of torch for other vendors' devices tells it
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        return DeviceProfile(
            host=socket.gethostname(),
            device=str(device),
            name=torch.cuda.get_device_name(device),
            nominal_speed=self._nvml.nominal_speed(f"GPU-{uuid}"),
        )
