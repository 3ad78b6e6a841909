"""Describe the accelerators that torch can use, and report those that it cannot.

Nothing here allocates memory on a device: a probe must not take memory from a running training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_hetero.balance.device_report import DeviceReport
from lightning_hetero.hardware.nvml import Nvml

__all__ = ["accelerator_reports", "unused_devices"]

_AMD_VENDOR_ID = "4098"
_VENDORS = {"xpu": "Intel", "mps": "Apple"}


def accelerator_reports(nvml: Nvml) -> tuple[list[DeviceReport], list[str]]:
    """Return a report on each accelerator, and a note on each one that cannot be described.

    As in torch, ``CUDA_VISIBLE_DEVICES`` restricts the devices.

    Args:
        nvml: Access to NVIDIA's driver.
    """
    reports: list[DeviceReport] = []
    notes: list[str] = []
    for kind, count in [("cuda", torch.cuda.device_count()), *_others()]:
        for index in range(count):
            device = f"{kind}:{index}"
            try:
                # a driver that does not match this build of torch causes a warning first and an error afterwards
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reports.append(_cuda_report(device, index, nvml) if kind == "cuda" else _report(kind, index))
            except (RuntimeError, AssertionError) as error:
                notes.append(f"{device} cannot be used: {_first_line(error)}.")
    return reports, notes


def unused_devices(nvml: Nvml, visible: int, root: Path = Path("/")) -> list[str]:
    """Return notes on devices of this machine that this build of torch, or this process, cannot use.

    Args:
        nvml: Access to NVIDIA's driver.
        visible: Number of CUDA devices that torch has found.
        root: Folder that contains ``sys``.
    """
    notes = []
    nvidia, amd = nvml.device_count(), _amd_devices(root)
    if nvidia and torch.version.cuda is None:
        notes.append(_needs_another_build("NVIDIA", nvidia))
    elif nvidia > visible:
        why = "are hidden by CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "are not found by torch"
        notes.append(f"{nvidia - visible} of the {nvidia} NVIDIA devices of this machine {why}.")
    if amd and torch.version.hip is None:
        notes.append(_needs_another_build("AMD", amd))
    return notes


def _needs_another_build(vendor: str, count: int) -> str:
    devices = "device" if count == 1 else f"{count} {vendor} devices"
    devices = f"{vendor} {devices}" if count == 1 else devices
    return (
        f"This build of torch ({torch.__version__}) cannot use the {devices} of this machine;"
        f" install one for {vendor}. Ranks on devices of several vendors, or on a processor, can train together only"
        " over gloo."
    )


def _cuda_report(device: str, index: int, nvml: Nvml) -> DeviceReport:
    properties = torch.cuda.get_device_properties(index)
    # builds of torch for other vendors may lack it
    uuid = f"GPU-{getattr(properties, 'uuid', None)}"
    others = nvml.other_processes(uuid)
    return DeviceReport(
        device=device,
        name=properties.name,
        vendor="AMD" if torch.version.hip else "NVIDIA",
        memory_bytes=nvml.total_bytes(uuid) or properties.total_memory,
        free_bytes=nvml.free_bytes(uuid),
        clock_mhz=nvml.clock_mhz(uuid),
        max_clock_mhz=nvml.max_clock_mhz(uuid),
        throttled=nvml.throttled(uuid),
        other_processes=None if others is None else others[0],
        other_bytes=None if others is None else others[1],
        utilisation=nvml.utilisation(uuid),
        temperature_c=nvml.temperature_c(uuid),
        nominal_speed=nvml.nominal_speed(uuid),
    )


def _others() -> Iterator[tuple[str, int]]:
    """Yield each kind of accelerator other than CUDA and ROCm, and its number of devices."""
    if torch.backends.mps.is_available():
        yield "mps", 1
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        yield "xpu", torch.xpu.device_count()
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is not None and accelerator.is_available():
        kind = accelerator.current_accelerator().type
        if kind not in {"cuda", "mps", "xpu"}:
            yield kind, accelerator.device_count()


def _report(kind: str, index: int) -> DeviceReport:
    """Return a report from torch's module for this kind of device, with as much as its functions provide."""
    module = torch.get_device_module(kind)
    properties = _call_if_any(getattr(module, "get_device_properties", None), index)
    name = getattr(properties, "name", None) or _call_if_any(getattr(module, "get_device_name", None), index)
    memory_bytes = getattr(properties, "total_memory", None) or _call_if_any(
        getattr(module, "recommended_max_memory", None)
    )
    return DeviceReport(
        device=kind if kind == "mps" else f"{kind}:{index}",
        name=str(name or kind),
        vendor=_VENDORS.get(kind),
        memory_bytes=int(memory_bytes) if memory_bytes else None,
    )


def _call_if_any(function: Callable[..., Any] | None, *arguments: Any) -> Any:
    return None if function is None else function(*arguments)


def _amd_devices(root: Path) -> int:
    """Return the number of devices of AMD's compute driver."""
    count = 0
    for file in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            properties = dict(
                line.split(" ", 1) for line in file.read_text(encoding="ascii").splitlines() if " " in line
            )
        except (OSError, UnicodeDecodeError):
            continue
        # processors are listed too, but they have no SIMD units
        count += properties.get("vendor_id") == _AMD_VENDOR_ID and properties.get("simd_count", "0") != "0"
    return count


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
