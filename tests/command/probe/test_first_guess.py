"""Shares before a training has measured anything, and the notes about them."""

from __future__ import annotations

import pytest

from lightning_hetero.balance.device_report import DeviceReport, Measurement
from lightning_hetero.command.probe.device_notes import device_notes
from lightning_hetero.command.probe.first_guess import first_guess

GIB = 2**30


def gpu(index: int, name: str = "V100", nominal: float | None = None, speed: float | None = None) -> DeviceReport:
    measured = None if speed is None else Measurement(1e-3, 1 / speed, speed, 0.01, "work")
    return DeviceReport(f"cuda:{index}", name, "NVIDIA", nominal_speed=nominal, measured=measured)


CPU = DeviceReport("cpu", "EPYC", logical_cores=8, usable_cores=8.0, measured=Measurement(0.01, 0.1, 9.5, 0.01, "work"))


@pytest.mark.parametrize(
    ("devices", "shares", "why"),
    [
        ((gpu(0, speed=300.0), gpu(1, speed=100.0)), (3.0, 1.0), "measured speeds"),
        ((gpu(0, nominal=1.0, speed=100.0), gpu(1, "K80", nominal=9.0, speed=212.3)), (1.0, 2.12), "measured speeds"),
        ((gpu(0, speed=100.0), gpu(1, speed=104.0)), (1.0, 1.0), "less than 5 %"),
        # one failed
        ((gpu(0, "K80", 2187.0, speed=100.0), gpu(1, "V100", 7834.0)), (1.0, 3.58), "cores times clock"),
        ((gpu(0, "K80", 2187.0), gpu(1, "V100", 7834.0)), (1.0, 3.58), "--measure"),
        ((gpu(0, "K80", 2187.0), gpu(1, "V100")), (1.0, 1.0), "unknown; lightning-hetero probe --measure"),
        ((gpu(0), gpu(1)), (1.0, 1.0), "all devices are V100; lightning-hetero probe --measure"),
    ],
)
def test_shares(devices: tuple[DeviceReport, ...], shares: tuple[float, ...], why: str) -> None:
    guess = first_guess((*devices, CPU))
    assert guess.shares == (*shares, 0.0), "the processor takes no part if there are accelerators"
    assert why in guess.notes[0]
    assert guess.notes[-1].startswith('To use: Trainer(strategy="hetero_ddp", devices=2)')
    fixed = f"HeteroDDPStrategy(shares=[{shares[0]:g}, {shares[1]:g}])"
    assert (fixed in guess.notes[-1]) == (shares != (1.0, 1.0))


@pytest.mark.parametrize(
    ("devices", "shares", "why"),
    [((CPU,), (1.0,), "no accelerator"), ((gpu(0), CPU), (1.0, 0.0), "cuda:0 is its only accelerator")],
)
def test_one_device_has_nothing_to_divide(devices: tuple[DeviceReport], shares: tuple[float], why: str) -> None:
    guess = first_guess(devices)
    assert guess.shares == shares
    assert why in guess.notes[0]
    assert 'shares="auto"' in guess.notes[-1]


@pytest.mark.parametrize(
    ("report", "note"),
    [
        (DeviceReport("cuda:0", "V100", throttled=("heat", "power limit")), "throttled now: heat, power limit."),
        (DeviceReport("cuda:0", "V100", throttled=(), utilisation=0.05, other_processes=0), None),
        (
            DeviceReport("cuda:0", "V100", other_processes=2, other_bytes=3 * GIB, utilisation=0.37),
            "cuda:0 is shared with 2 other processes (3.0 GiB), which is 37% busy.",
        ),
        (DeviceReport("cuda:0", "V100", other_processes=1), "cuda:0 is shared with 1 other process."),
        (
            DeviceReport("cuda:0", "V100", memory_bytes=16 * GIB, free_bytes=4 * GIB, other_processes=0),
            "Processes that cannot be seen from here use 12.0 GiB of cuda:0.",
        ),
        (DeviceReport("cuda:0", "V100", memory_bytes=16 * GIB, free_bytes=15 * GIB), None),
        (DeviceReport("cuda:0", "V100", utilisation=0.9), "cuda:0 is busy: 90%."),
        (DeviceReport("cpu", "EPYC", utilisation=0.5), "Other processes keep the processor 50% busy"),
        (DeviceReport("cpu", "EPYC", utilisation=0.01, logical_cores=8, usable_cores=8.0), None),
        (DeviceReport("cpu", "EPYC", logical_cores=8, usable_cores=1.5), "may use 1.5 of 8 cores"),
        (DeviceReport("cpu", "EPYC", measured=Measurement(0.0, 0.1, 9.0, 0.3, "work")), "cpu vary by 30%"),
        (DeviceReport("cpu", "EPYC", measured=Measurement(0.0, 0.1, 9.0, 0.1, "work")), None),
    ],
)
def test_a_note_reports_what_slows_a_device_down(report: DeviceReport, note: str | None) -> None:
    notes = device_notes([report])
    assert len(notes) == (0 if note is None else 1)
    assert note is None or note in notes[0]


def test_vendors_that_need_gloo_are_named() -> None:
    amd = DeviceReport("xpu:0", "Arc", "Intel")
    (note,) = device_notes([gpu(0), amd, CPU])
    assert "Intel and NVIDIA can train together only over gloo" in note
    assert device_notes([gpu(0), gpu(1), CPU]) == ()
