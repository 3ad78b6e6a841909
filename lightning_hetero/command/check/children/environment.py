"""Versions, devices, and whether each device runs a kernel and is known to its driver."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lightning_hetero import __version__
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding
from lightning_hetero.hardware.nvml import Nvml

__all__ = ["environment"]

# The driver keeps a part of the memory that it reports.
_MEMORY_TOLERANCE = 0.1


def environment(_: Rank, nvml: Nvml | None = None) -> Finding:
    """Return versions and devices; the figure is the number of CUDA devices that work."""
    nvml = nvml or Nvml()
    devices = [_device(number, nvml) for number in range(torch.cuda.device_count())]
    problems = [f"cuda:{d['number']}: {d['problem']}" for d in devices if d["problem"]]
    notes = [f"cuda:{d['number']}: {d['note']}" for d in devices if d["note"]]
    working = sum(not device["problem"] for device in devices)
    details = {"versions": _versions(nvml), "devices": devices, "architectures": torch.cuda.get_arch_list()}
    note = "; ".join(problems or notes) or (
        "CUDA devices work" if devices else "no CUDA device: ranks on the processor"
    )
    return Finding("FAIL" if problems else "PASS", float(working), "devices", None, note, details)


def _versions(nvml: Nvml) -> dict[str, str]:
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
    return {
        "lightning_hetero": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        "rocm": torch.version.hip or "-",
        "lightning": _version("lightning"),
        "nccl": nccl or "-",
        "driver": nvml.driver_version() or "-",
        "system": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _device(number: int, nvml: Nvml) -> dict[str, Any]:
    found: dict[str, Any] = {"number": number, "name": "?", "problem": "", "note": ""}
    try:
        properties = torch.cuda.get_device_properties(number)
        total = properties.total_memory
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": total,
            "bf16": torch.version.hip is not None or properties.major >= 8,
        }
        if float(torch.ones(8, device=f"cuda:{number}").sum()) != 8.0:
            found["problem"] = "a sum on it is wrong"
        if torch.version.hip is None:
            found |= _compared(f"GPU-{getattr(properties, 'uuid', None)}", total, nvml)
    except (RuntimeError, AssertionError) as error:
        found["problem"] = (str(error).splitlines() or [type(error).__name__])[0]
    return found


def _compared(uuid: str, total: int, nvml: Nvml) -> dict[str, Any]:
    """Return what the driver says of the device with this UUID, and how it differs from what torch says."""
    of_driver = nvml.total_bytes(uuid)
    if of_driver is None:
        # as for a part of a device (MIG)
        return {"uuid": uuid, "note": "NVIDIA's driver does not answer, so its free memory is asked of torch"}
    if abs(of_driver - total) > _MEMORY_TOLERANCE * total:
        problem = f"torch says {total / 2**30:.1f} GiB, NVIDIA's driver {of_driver / 2**30:.1f} GiB of the same UUID"
        return {"uuid": uuid, "problem": problem}
    return {"uuid": uuid}
