"""The probe names the devices of a machine, with fakes for those that this machine lacks."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch
from hardware.test_nvml import KNOWN, Driver

from lightning_hetero.hardware.nvml import Nvml
from lightning_hetero.hardware.probe import TorchDeviceProbe


def test_processor_has_a_name() -> None:
    profile = TorchDeviceProbe().profile(torch.device("cpu"))
    assert profile.host == socket.gethostname()
    assert profile.device == "cpu"
    assert profile.name


def test_cuda_device_has_the_name_that_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Tesla K80 of {device}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=KNOWN[4:]))
    profile = TorchDeviceProbe(Nvml(Driver())).profile(torch.device("cuda", 1))
    assert (profile.device, profile.name) == ("cuda:1", "Tesla K80 of cuda:1")
    assert profile.nominal_speed == pytest.approx(5120 * 1.530)


def test_a_device_without_identity_has_no_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "MI250")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    assert TorchDeviceProbe(Nvml(Driver())).profile(torch.device("cuda", 0)).nominal_speed is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_cuda_device_has_a_name() -> None:
    assert TorchDeviceProbe().profile(torch.device("cuda", 0)).name == torch.cuda.get_device_name(0)
