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
    """A source of device profiles; tests substitute devices that the machine lacks."""

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return the profile of ``device``."""
        ...


class TorchDeviceProbe:
    """A probe that asks torch, the driver for NVIDIA's devices, and the operating system for processors.

    Args:
        nvml: Access to NVIDIA's driver.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = nvml or Nvml()

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return the profile of ``device``; on CUDA this initialises the device."""
        if device.type != "cuda":
            return DeviceProfile(socket.gethostname(), str(device), processor_name())
        # builds of torch for other vendors may lack it
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        return DeviceProfile(
            host=socket.gethostname(),
            device=str(device),
            name=torch.cuda.get_device_name(device),
            nominal_speed=self._nvml.nominal_speed(f"GPU-{uuid}"),
        )
