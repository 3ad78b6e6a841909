"""The answers of the driver about a device, and what happens when it does not answer."""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from lightning_hetero.hardware.nvml import Nvml

KNOWN = "GPU-4f0a"


class Driver:
    """A fake driver with one device of 5,120 cores at 1,530 MHz, which can be made to fail."""

    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    throttle_reasons = 0x1 | 0x4 | 0x40
    count = 1

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

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetCount", self.count))

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return str(self._answer("nvmlSystemGetDriverVersion", "580.65.06"))

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:  # noqa: N802
        assert (handle, clock) == (KNOWN, pynvml.NVML_CLOCK_SM)
        return int(self._answer("nvmlDeviceGetClockInfo", 1005))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return int(self._answer("nvmlDeviceGetCurrentClocksThrottleReasons", self.throttle_reasons))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self._answer("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=37, memory=99))

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return int(self._answer("nvmlDeviceGetTemperature", 71))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        ours, theirs = _process(os.getpid(), 1_000), _process(-1, 2_000)
        return list(self._answer("nvmlDeviceGetComputeRunningProcesses", [ours, theirs]))

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        if self.fails_in == "mismatch":
            raise pynvml.NVMLLibraryMismatchError
        return list(self._answer("nvmlDeviceGetGraphicsRunningProcesses", [_process(-1, 2_000), _process(-2, 500)]))


def _process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_a_speed_is_cores_times_clock() -> None:
    assert Nvml(Driver()).nominal_speed(KNOWN) == pytest.approx(5120 * 1.530)


def test_free_memory_is_not_allocated_by_any_process(caplog: pytest.LogCaptureFixture) -> None:
    assert Nvml(Driver()).free_bytes(KNOWN) == 10_000
    nvml = Nvml(Driver("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NO_PERMISSION))
    with caplog.at_level(logging.DEBUG):
        assert [nvml.free_bytes(KNOWN) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1, "one line, however often it is asked"


# the question, the function that answers it, and the answer
READINGS = [
    ("total_bytes", "nvmlDeviceGetMemoryInfo", 16_000),
    ("clock_mhz", "nvmlDeviceGetClockInfo", 1005),
    ("max_clock_mhz", "nvmlDeviceGetMaxClockInfo", 1530),
    ("throttled", "nvmlDeviceGetCurrentClocksThrottleReasons", ("power limit", "heat, detected by the hardware")),
    ("utilisation", "nvmlDeviceGetUtilizationRates", 0.37),
    ("temperature_c", "nvmlDeviceGetTemperature", 71),
    ("other_processes", "nvmlDeviceGetComputeRunningProcesses", (2, 2_500)),
]


@pytest.mark.parametrize("refused", [reading[1] for reading in READINGS])
def test_each_reading_fails_alone(refused: str) -> None:
    nvml = Nvml(Driver(refused, pynvml.NVML_ERROR_NOT_SUPPORTED))
    for question, function, answer in READINGS:
        assert getattr(nvml, question)(KNOWN) == (None if function == refused else answer)


def test_an_idle_device_is_not_throttled() -> None:
    driver = Driver()
    driver.throttle_reasons = 0x1
    assert Nvml(driver).throttled(KNOWN) == ()


def test_memory_of_others_is_unknown_if_that_of_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [_process(-1, 2_000), _process(-2, None)]
    monkeypatch.setattr(Driver, "nvmlDeviceGetComputeRunningProcesses", lambda *_: hidden)
    monkeypatch.setattr(Driver, "nvmlDeviceGetGraphicsRunningProcesses", lambda *_: [])
    assert Nvml(Driver()).other_processes(KNOWN) == (2, None)


def test_an_old_driver_that_lists_no_processes_is_no_error() -> None:
    assert Nvml(Driver("mismatch")).other_processes(KNOWN) is None


def test_the_driver_has_a_version() -> None:
    assert Nvml(Driver()).driver_version() == "580.65.06"
    assert Nvml(Driver("nvmlSystemGetDriverVersion")).driver_version() is None
    assert Nvml(Driver("nvmlInit")).driver_version() is None


def test_devices_are_counted() -> None:
    assert Nvml(Driver()).device_count() == 1
    assert Nvml(Driver("nvmlDeviceGetCount")).device_count() == 0
    assert Nvml(Driver("nvmlInit")).device_count() == 0


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
def test_a_refused_answer_is_unknown(fails_in: str, code: int, caplog: pytest.LogCaptureFixture) -> None:
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
