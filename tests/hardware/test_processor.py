"""The description of the processor and of a container's limits, from files as Linux writes them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lightning_hetero.hardware.cgroup import cpu_quota, memory_limit
from lightning_hetero.hardware.processor import LoadMeter, processor_report
from lightning_hetero.hardware.processor_name import processor_name

V2 = {"proc/self/cgroup": "0::/pod/task\n"}
V1 = {"proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n"}


def machine(root: Path, files: dict[str, str]) -> Path:
    """Write files under ``root``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/pod/task/cpu.max": "max 100000\n"}, None),
        ({**V2, "sys/fs/cgroup/pod/task/cpu.max": "150000 100000\n"}, 1.5),
        # the tightest limit among the group and its parents applies
        ({**V2, "sys/fs/cgroup/pod/task/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "50000 100000"}, 0.5),
        # inside a container the group has another name than outside
        ({**V2, "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({**V2, "sys/fs/cgroup/pod/task/cpu.max": "not a number\n"}, None),
        (V1 | {f"sys/fs/cgroup/cpu/job/cpu.cfs_{n}_us": v for n, v in (("quota", "-1"), ("period", "100000"))}, None),
        (
            V1 | {f"sys/fs/cgroup/cpu/job/cpu.cfs_{n}_us": v for n, v in (("quota", "250000"), ("period", "100000"))},
            2.5,
        ),
    ],
)
def test_quota(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({**V2, "sys/fs/cgroup/pod/task/memory.max": "max\n"}, None),
        (
            V2
            | {
                "sys/fs/cgroup/pod/task/memory.max": "1000\n",
                "sys/fs/cgroup/pod/task/memory.current": "700\n",
                "sys/fs/cgroup/pod/task/memory.stat": "anon 400\ninactive_file 200\n",
                "sys/fs/cgroup/pod/memory.max": "5000\n",
                "sys/fs/cgroup/pod/memory.current": "4900\n",
            },
            (1000, 100),
        ),
        (
            V1
            | {
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700\n",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            (1000, 500),
        ),
    ],
)
def test_memory_limit(files: dict[str, str], limit: tuple[int, int] | None, tmp_path: Path) -> None:
    assert memory_limit(machine(tmp_path, files)) == limit


def test_a_container_is_described_by_its_limits(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod/task"
    root = machine(tmp_path, {**V2, f"{group}/cpu.max": "50000 100000", f"{group}/memory.max": "4096000"})
    report = processor_report(LoadMeter(), root)
    assert report.usable_cores == 0.5
    assert (report.memory_bytes, report.free_bytes) == (4_096_000, 4_096_000)


def test_this_processor_is_known() -> None:
    report = processor_report(LoadMeter())
    assert report.device == "cpu"
    assert report.name == processor_name()
    assert report.free_bytes is not None
    assert report.memory_bytes is not None
    assert 0 < report.free_bytes <= report.memory_bytes
    assert report.logical_cores is not None
    assert report.usable_cores is not None
    assert 0 < report.usable_cores <= report.logical_cores


def test_own_work_is_no_load_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_s = {"user": 100.0, "steal": 0.0}
    own_s = {"user": 10.0, "system": 0.0}
    clock_s = [0.0]
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**machine_s, idle=1e6))
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda self: SimpleNamespace(**own_s))
    monkeypatch.setattr(time, "perf_counter", lambda: clock_s[0])
    meter = LoadMeter()
    machine_s["user"] += 5.0
    own_s["user"] += 3.0
    machine_s["steal"] += 1.0
    clock_s[0] = 2.0
    assert meter.busy_cores() == pytest.approx(1.5)


@pytest.mark.parametrize("answer", [None, RuntimeError("no /sys here"), SimpleNamespace(current=0.0, max=0.0)])
def test_an_unknown_clock_is_unknown(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu_freq() -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(psutil, "cpu_freq", cpu_freq)
    report = processor_report(LoadMeter())
    assert (report.clock_mhz, report.max_clock_mhz) == (None, None)
