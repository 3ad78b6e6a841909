"""List the devices of this machine."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from lightning_hetero.balance.device_report import DeviceReport
from lightning_hetero.hardware.accelerators import accelerator_reports, unused_devices
from lightning_hetero.hardware.nvml import Nvml
from lightning_hetero.hardware.processor import LoadMeter, processor_report

__all__ = ["Machine", "machine_here"]


@dataclass(frozen=True)
class Machine:
    """A machine and its devices.

    Attributes:
        host: its name.
        devices: the accelerators that this process may use, and the processor last.
        notes: sentences on devices that are here but cannot be used.
    """

    host: str
    devices: tuple[DeviceReport, ...]
    notes: tuple[str, ...] = ()


def machine_here(load: LoadMeter, nvml: Nvml | None = None, root: Path = Path("/")) -> Machine:
    """Return what this machine has.

    Args:
        load: a meter that was made a while ago.
        nvml: what asks NVIDIA's driver.
        root: where ``proc`` and ``sys`` are.
    """
    nvml = nvml or Nvml()
    accelerators, notes = accelerator_reports(nvml)
    visible = sum(report.vendor == "NVIDIA" for report in accelerators)
    notes += unused_devices(nvml, visible, root)
    return Machine(socket.gethostname(), (*accelerators, processor_report(load, root)), tuple(notes))
