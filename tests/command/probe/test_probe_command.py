"""``lightning-hetero probe`` as users start it, in real processes, and on fake machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from lightning_hetero.balance.device_report import DeviceReport, Measurement
from lightning_hetero.command.main import main
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware import benchmark, machine

GIB = 2**30


def probe(*options: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process; ``before`` is code that it executes first."""
    code = f"{before}\nimport sys\nfrom lightning_hetero.command.main import main\nsys.exit(main())"
    # the command's name, so that the package imports no Lightning
    start = f"import sys; sys.argv[0] = 'lightning-hetero'\n{code}"
    return subprocess.run(
        [sys.executable, "-c", start, "probe", *options],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        check=False,
    )


def check_schema(printed: str) -> dict[str, Any]:
    """Return the parsed output, after a check that it has what other commands read."""
    answer: dict[str, Any] = json.loads(printed)
    assert list(answer) == ["lightning_hetero_probe", "host", "devices", "shares", "notes"]
    assert answer["lightning_hetero_probe"] == 1
    assert len(answer["shares"]) == len(answer["devices"])
    assert all(isinstance(note, str) for note in answer["notes"])
    for device in answer["devices"]:
        assert isinstance(device["device"], str)
        assert isinstance(device["name"], str)
        assert device["memory_bytes"] is None or isinstance(device["memory_bytes"], int)
        assert device["nominal_speed"] is None or isinstance(device["nominal_speed"], float)
        if device["measured"] is not None:
            assert set(device["measured"]) == {
                "overhead_s",
                "seconds_per_sample",
                "samples_per_s",
                "spread",
                "workload",
            }
    return answer


def test_a_table_in_80_columns_without_lightning() -> None:
    done = probe(before="import sys; sys.modules['lightning'] = None", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("cpu" in line and "share" not in line for line in lines)
    assert "shares=" in done.stdout or "hetero_ddp" in done.stdout


def test_ascii_terminals_are_served() -> None:
    done = probe(PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


def test_measured_speeds_in_json() -> None:
    done = probe("--json", "--measure", "--seconds", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    answer = check_schema(done.stdout)
    for device in answer["devices"]:
        assert device["measured"]["samples_per_s"] > 0
        assert device["measured"]["seconds_per_sample"] > 0
        assert device["measured"]["overhead_s"] >= 0
    assert answer["devices"][-1]["device"] == "cpu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--measure", "--seconds", "0"], "`--seconds` must be a positive number of seconds, got '0'"),
        (["--measure", "--seconds", "x"], "got 'x'"),
        (["--measure", "--seconds", "nan"], "got 'nan'"),
        (["--measure", "--seconds", "inf"], "got 'inf'"),
        (["--measure", "--seconds=-1"], "got '-1'"),
        (["--seconds", "2"], "add `--measure`"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("lightning-hetero probe: error: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two fully described devices and a processor."""
    gpus = [
        DeviceReport(
            *(f"cuda:{index}", name, "NVIDIA", 24 * GIB, 22 * GIB, 1410.0, 1980.0, ("heat",), 1, 2 * GIB, 1.0, 83),
            nominal_speed=speed,
        )
        for index, (name, speed) in enumerate([("NVIDIA GeForce RTX 3090", 20889.0), ("NVIDIA RTX 3060", 7500.0)])
    ]
    cpu = DeviceReport(
        "cpu", "AMD Ryzen Threadripper PRO 5975WX 32-Cores", None, 256 * GIB, 200 * GIB, logical_cores=64
    )
    here = machine.Machine("box", (*gpus, cpu))
    monkeypatch.setattr(machine, "describe_machine", lambda load: here)


def test_all_columns_fit(mixed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured = Measurement(1e-3, 1e-5, 123456.0, 0.01, "known work")
    monkeypatch.setattr(benchmark, "measure_device", lambda device, seconds: measured)
    assert main(["probe", "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for words in ("22.0/24.0", "1.4/2.0", "100%", "83", "123456", "throttled now: heat", "1 other process (2.0 GiB)"):
        assert words in text


def test_a_device_that_fails_is_noted_and_the_others_are_measured(
    mixed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(device: torch.device, seconds: float) -> Measurement:
        if device == torch.device("cuda:1"):
            raise UnsupportedFeatureError("cuda:1 could not be measured: CUDA out of memory.")
        return Measurement(1e-3, 1e-5, 1000.0, 0.01, "known work")

    monkeypatch.setattr(benchmark, "measure_device", measure)
    assert main(["probe", "--measure", "--json"]) == 0
    answer = check_schema(capsys.readouterr().out)
    assert [device["measured"] is not None for device in answer["devices"]] == [True, False, True]
    assert answer["notes"][0] == "cuda:1 could not be measured: CUDA out of memory."
    assert answer["shares"] == [2.79, 1.0, 0.0], "nominal speeds decide if not all devices were measured"


def test_the_command_imports_no_more_than_it_needs() -> None:
    done = probe("--seconds", "0", before="import sys; sys.modules['torch'] = None")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
