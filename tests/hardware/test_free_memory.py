"""What is known of a device's memory; copies are put on it only where they leave it much of its free memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hetero.hardware import memory
from lightning_hetero.hardware.memory import CudaMemoryMeter, MemoryUse, fits, meter_of

GIB = 2**30


class Meter:
    def read(self) -> MemoryUse:
        return MemoryUse(resident_bytes=6 * GIB, peak_bytes=7 * GIB, available_bytes=16 * GIB)


def test_what_a_process_holds_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "meter_of", lambda device: Meter())
    card = torch.device("cuda", 0)
    assert fits(int(4.7 * GIB), card)
    assert not fits(int(4.8 * GIB), card), "half a gigabyte stays, and copies are made twice for a moment"


def test_a_device_that_does_not_say_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    xpu = torch.device("xpu", 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert not fits(0, xpu)
    known = SimpleNamespace(mem_get_info=lambda device: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch, "get_device_module", lambda device: known)
    assert fits(4 * GIB, xpu)
    assert not fits(5 * GIB, xpu)


@pytest.mark.parametrize("answers", [True, False])
def test_free_memory_is_asked_of_the_driver_and_else_of_torch(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """The driver knows what other processes use too; of a part of a card it knows nothing."""
    peaks = [7]
    for name, answer in {
        "get_device_properties": SimpleNamespace(uuid="1234"),
        "mem_get_info": (3, 16),
        "memory_allocated": 5,
        "memory_reserved": 6,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.append(5))
    nvml: Any = SimpleNamespace(free_bytes=lambda uuid: {"GPU-1234": 2}.get(uuid) if answers else None)
    meter = CudaMemoryMeter(torch.device("cuda", 0), nvml)
    assert meter.read() == MemoryUse(resident_bytes=5, peak_bytes=7, available_bytes=8 if answers else 9)
    meter.restart()
    assert meter.read().peak_bytes == 5
    assert meter_of(torch.device("cpu")) is None, "its memory is shared with everything else"
