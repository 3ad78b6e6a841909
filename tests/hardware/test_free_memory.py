"""Copies are put on a device only where they leave it much of its free memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_hetero.hardware import memory
from lightning_hetero.hardware.memory import MemoryUse, fits

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
