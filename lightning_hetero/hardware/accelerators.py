"""The accelerators that torch can use, and those it cannot.

Nothing here allocates on a device: a probe must not take memory from a training that runs.
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
    """Return what each accelerator is, and a sentence on each that does not tell.

    ``CUDA_VISIBLE_DEVICES`` is respected, as torch does.

    Args:
        nvml: what asks NVIDIA's driver.
    """
    reports: list[DeviceReport] = []
    notes: list[str] = []
    for kind, count in [("cuda", torch.cuda.device_count()), *_others()]:
        for index in range(count):
            device = f"{kind}:{index}"
            try:
                # a driver that does not fit this build of torch is a warning first, and an error afterwards
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reports.append(_cuda_report(device, index, nvml) if kind == "cuda" else _report(kind, index))
            except (RuntimeError, AssertionError) as error:
                notes.append(f"{device} cannot be used: {_first_line(error)}.")
    return reports, notes


def unused_devices(nvml: Nvml, visible: int, root: Path = Path("/")) -> list[str]:
    """Return a sentence on devices that are here and that this build of torch, or this process, cannot use.

    Args:
        nvml: what asks NVIDIA's driver.
        visible: how many CUDA devices torch has found.
        root: where ``sys`` is.
    """
    notes = []
    nvidia, amd = nvml.device_count(), _amd_devices(root)
    if nvidia and torch.version.cuda is None:
        notes.append(_of_another_build("NVIDIA", nvidia))
    elif nvidia > visible:
        why = "are hidden by CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "are not found by torch"
        notes.append(f"{nvidia - visible} of the {nvidia} NVIDIA devices here {why}.")
    if amd and torch.version.hip is None:
        notes.append(_of_another_build("AMD", amd))
    return notes


def _of_another_build(vendor: str, count: int) -> str:
    devices = "device" if count == 1 else f"{count} {vendor} devices"
    devices = f"{vendor} {devices}" if count == 1 else devices
    return (
        f"This build of torch ({torch.__version__}) cannot use the {devices} here; install one for {vendor}. "
        "Ranks of several vendors, or on a processor, train together over gloo only."
    )


def _cuda_report(device: str, index: int, nvml: Nvml) -> DeviceReport:
    properties = torch.cuda.get_device_properties(index)
    # not every build of torch for other vendors' devices tells it
    uuid = f"GPU-{getattr(properties, 'uuid', None)}"
    others = nvml.others(uuid)
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
    """Yield the kinds of accelerators that are not CUDA or ROCm, and how many devices each has."""
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
    """Return what torch's module for a kind of device tells, each thing where there is a function for it."""
    module = torch.get_device_module(kind)
    properties = _told(getattr(module, "get_device_properties", None), index)
    name = getattr(properties, "name", None) or _told(getattr(module, "get_device_name", None), index)
    memory_bytes = getattr(properties, "total_memory", None) or _told(getattr(module, "recommended_max_memory", None))
    return DeviceReport(
        device=kind if kind == "mps" else f"{kind}:{index}",
        name=str(name or kind),
        vendor=_VENDORS.get(kind),
        memory_bytes=int(memory_bytes) if memory_bytes else None,
    )


def _told(question: Callable[..., Any] | None, *arguments: Any) -> Any:
    return None if question is None else question(*arguments)


def _amd_devices(root: Path) -> int:
    """Return how many devices AMD's compute driver has."""
    count = 0
    for file in (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            properties = dict(
                line.split(" ", 1) for line in file.read_text(encoding="ascii").splitlines() if " " in line
            )
        except (OSError, UnicodeDecodeError):
            continue
        # processors are listed too; they have no SIMD units
        count += properties.get("vendor_id") == _AMD_VENDOR_ID and properties.get("simd_count", "0") != "0"
    return count


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
