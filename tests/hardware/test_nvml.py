"""What the driver says about a device, and what becomes of it where the driver says nothing."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from lightning_hetero.hardware.nvml import Nvml

KNOWN = "GPU-4f0a"


class Driver:
    """A driver that this machine lacks: one device of 5,120 cores at 1,530 MHz, and what may go wrong."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM

    def __init__(self, fails_in: str = "", code: int = pynvml.NVML_ERROR_UNKNOWN) -> None:
        self.fails_in, self.code = fails_in, code

    def _answer(self, name: str, value: Any) -> Any:
        if name == self.fails_in:
            raise pynvml.NVMLError(self.code)
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("nvmlInit", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != KNOWN:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return str(self._answer("nvmlDeviceGetHandleByUUID", uuid))

    def nvmlDeviceGetNumGpuCores(self, handle: str) -> int:  # noqa: N802
        assert handle == KNOWN
        return int(self._answer("nvmlDeviceGetNumGpuCores", 5120))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        assert handle == KNOWN
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(total=16_000, used=6_000, free=10_000))

    def nvmlDeviceGetMaxClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        assert (handle, clock) == (KNOWN, pynvml.NVML_CLOCK_SM)
        return int(self._answer("nvmlDeviceGetMaxClockInfo", 1530))


def test_a_speed_is_cores_times_clock() -> None:
    assert Nvml(Driver()).nominal_speed(KNOWN) == pytest.approx(5120 * 1.530)


def test_free_memory_is_what_nobody_has(caplog: pytest.LogCaptureFixture) -> None:
    assert Nvml(Driver()).free_bytes(KNOWN) == 10_000
    nvml = Nvml(Driver("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NO_PERMISSION))
    with caplog.at_level(logging.DEBUG):
        assert [nvml.free_bytes(KNOWN) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1, "one line, however often it is asked"


@pytest.mark.parametrize(
    ("fails_in", "code"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        ("nvmlInit", pynvml.NVML_ERROR_NO_PERMISSION),
        ("nvmlDeviceGetHandleByUUID", pynvml.NVML_ERROR_INVALID_ARGUMENT),
        ("nvmlDeviceGetNumGpuCores", pynvml.NVML_ERROR_NOT_SUPPORTED),  # a part of a device (MIG)
        ("nvmlDeviceGetNumGpuCores", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND),  # an old driver
        ("nvmlDeviceGetMaxClockInfo", pynvml.NVML_ERROR_GPU_IS_LOST),
    ],
)
def test_what_the_driver_refuses_is_unknown(fails_in: str, code: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert Nvml(Driver(fails_in, code)).nominal_speed(KNOWN) is None
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_device_that_the_driver_does_not_know_is_unknown() -> None:
    assert Nvml(Driver()).nominal_speed("GPU-other") is None


def test_a_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.DEBUG):
        assert Nvml().nominal_speed(KNOWN) is None
    assert "pynvml" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a driver")
def test_the_real_library_without_a_driver_is_no_error() -> None:
    assert Nvml().nominal_speed(KNOWN) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_has_a_speed() -> None:
    speed = Nvml().nominal_speed(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    assert speed is not None
    assert speed > 100
