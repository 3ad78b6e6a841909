"""Describe the device that a rank runs on."""

from __future__ import annotations

import platform
import socket
from pathlib import Path
from typing import Protocol

import torch

from lightning_hetero.balance.types import DeviceProfile

__all__ = ["DeviceProbe", "TorchDeviceProbe"]


class DeviceProbe(Protocol):
    """Anything that can say what a device is; tests put devices here that the machine lacks."""

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return what ``device`` is."""
        ...


class TorchDeviceProbe:
    """Asks torch and, for processors, the operating system."""

    def profile(self, device: torch.device) -> DeviceProfile:
        """Return what ``device`` is; on CUDA this initialises the device."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
        return DeviceProfile(host=socket.gethostname(), device=str(device), name=name)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "cpu"
