"""List the devices of this machine."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from lightning_hetero.balance.device_report import DeviceReport
from lightning_hetero.hardware.accelerators import accelerator_reports, unused_devices
from lightning_hetero.hardware.nvml import Nvml
from lightning_hetero.hardware.processor import LoadMeter, processor_report

__all__ = ["Machine", "describe_machine"]


@dataclass(frozen=True)
class Machine:
    """A machine and its devices.

    Attributes:
        host: Name of the machine.
        devices: Accelerators that this process may use, followed by the processor.
        notes: Notes on devices of the machine that cannot be used.
    """

    host: str
    devices: tuple[DeviceReport, ...]
    notes: tuple[str, ...] = ()


def describe_machine(load: LoadMeter, nvml: Nvml | None = None, root: Path = Path("/")) -> Machine:
    """Describe this machine and its devices.

    Args:
        load: Load meter, which averages from its creation until now.
        nvml: Access to NVIDIA's driver.
        root: Folder that contains ``proc`` and ``sys``.
    """
    nvml = nvml or Nvml()
    accelerators, notes = accelerator_reports(nvml)
    visible = sum(report.vendor == "NVIDIA" for report in accelerators)
    notes += unused_devices(nvml, visible, root)
    return Machine(socket.gethostname(), (*accelerators, processor_report(load, root)), tuple(notes))
