"""The devices of a machine, with fakes for those that this machine lacks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from hardware.test_nvml import KNOWN, Driver

from lightning_hetero.hardware.machine import Machine, describe_machine
from lightning_hetero.hardware.nvml import Nvml
from lightning_hetero.hardware.processor import LoadMeter


def here(driver: Driver | None = None, root: Path = Path("/nowhere")) -> Machine:
    nothing = Driver("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    return describe_machine(LoadMeter(), Nvml(driver or nothing), root)


@pytest.fixture(autouse=True)
def _no_virtual_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the device in Python that another test may have registered in this process, for good."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A build of torch with CUDA; tests append the properties of devices, or errors, to the list."""
    devices: list[Any] = []

    def properties(index: int) -> Any:
        if isinstance(devices[index], Exception):
            raise devices[index]
        return devices[index]

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    # a probe must not take memory from a running training
    for creates_a_context in ("mem_get_info", "synchronize", "set_device", "current_stream"):
        monkeypatch.delattr(torch.cuda, creates_a_context)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return devices


def v100(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "Tesla V100", "total_memory": 15_000, "uuid": KNOWN[4:]} | fields)


def test_a_machine_without_accelerators_has_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    machine = here()
    assert machine.host == socket.gethostname()
    assert [report.device for report in machine.devices] == ["cpu"]
    assert machine.notes == ()


def test_a_cuda_device_is_described_by_its_driver(cuda: list[Any]) -> None:
    cuda.append(v100())
    report, processor = here(Driver()).devices
    assert (report.device, report.name, report.vendor) == ("cuda:0", "Tesla V100", "NVIDIA")
    assert (report.memory_bytes, report.free_bytes) == (16_000, 10_000)
    assert (report.clock_mhz, report.max_clock_mhz) == (1005, 1530)
    assert report.throttled == ("power limit", "heat, detected by the hardware")
    assert (report.other_processes, report.other_bytes) == (2, 2_500)
    assert (report.utilisation, report.temperature_c) == (0.37, 71)
    assert report.nominal_speed == pytest.approx(5120 * 1.530)
    assert processor.is_processor
    json.dumps(report.to_dict())


def test_torch_gives_name_and_memory_if_the_driver_does_not_answer(cuda: list[Any]) -> None:
    cuda.append(v100())
    machine = here()
    report = machine.devices[0]
    assert (report.name, report.memory_bytes) == ("Tesla V100", 15_000)
    assert (report.free_bytes, report.throttled, report.other_processes, report.nominal_speed) == (None,) * 4
    assert machine.notes == ()


def test_a_device_that_fails_becomes_a_note_and_the_others_are_listed(cuda: list[Any]) -> None:
    cuda += [RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it."), v100()]
    driver = Driver()
    driver.count = 2
    machine = here(driver)
    assert [report.device for report in machine.devices] == ["cuda:1", "cpu"]
    assert machine.notes[0] == "cuda:0 cannot be used: The NVIDIA driver on your system is too old."


def test_rocm_means_amd_and_does_not_ask_the_nvidia_driver(cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cuda.append(SimpleNamespace(name="AMD Instinct MI250X", total_memory=64_000))
    machine = here()
    assert (machine.devices[0].vendor, machine.devices[0].memory_bytes) == ("AMD", 64_000)
    assert machine.notes == ()


@pytest.mark.parametrize(
    ("count", "words"), [(1, "the NVIDIA device of this machine"), (2, "the 2 NVIDIA devices of this machine")]
)
def test_a_build_that_cannot_use_a_device_says_so(count: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    driver = Driver()
    driver.count = count
    (note,) = here(driver).notes
    assert f"This build of torch ({torch.__version__}) cannot use {words}" in note


@pytest.mark.parametrize("visible", ["0", None])
def test_devices_out_of_reach_are_counted(
    visible: str | None, cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.append(v100())
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = Driver()
    driver.count = 4
    (note,) = here(driver).notes
    assert note.startswith("3 of the 4 NVIDIA devices of this machine")
    assert ("CUDA_VISIBLE_DEVICES" in note) == (visible is not None)


def test_amds_devices_are_seen_by_a_build_that_cannot_use_them(cuda: list[Any], tmp_path: Path) -> None:
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for node, text in enumerate(["simd_count 0\nvendor_id 0\n", "simd_count 440\nvendor_id 4098\n"]):
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(text, encoding="ascii")
    (nodes / "2/properties").mkdir(parents=True)  # what cannot be read hides nothing
    (note,) = here(root=tmp_path).notes
    assert "the AMD device of this machine" in note
    assert "gloo" in note


def test_other_accelerators_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    arc = SimpleNamespace(name="Intel Arc A770", total_memory=16_000)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: arc)
    reports = here().devices
    assert [(r.device, r.name, r.vendor, r.memory_bytes) for r in reports[:2]] == [
        (f"xpu:{index}", "Intel Arc A770", "Intel", 16_000) for index in range(2)
    ]


def test_an_accelerator_of_another_backend_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of Apple, which has no numbers; torch names it once more as its accelerator."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    modules = {
        "mps": SimpleNamespace(recommended_max_memory=lambda: 24_000),
        "npu": SimpleNamespace(get_device_name=lambda index: f"Other {index}"),
    }
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    found = {}
    for kind in modules:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: SimpleNamespace(type=kind))
        found[kind] = [(r.device, r.name, r.vendor, r.memory_bytes) for r in here().devices if r.device != "cpu"]
    apple = ("mps", "mps", "Apple", 24_000)
    assert found == {"mps": [apple], "npu": [apple, ("npu:0", "Other 0", None, None)]}
