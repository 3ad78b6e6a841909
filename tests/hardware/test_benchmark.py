"""The benchmark of a device, with work of known duration and with the real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lightning_hetero.balance.device_report import Measurement
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.hardware import benchmark
from lightning_hetero.hardware.benchmark import measure_device
from lightning_hetero.hardware.timed_call import timed_call as real_timed_call

CPU = torch.device("cpu")


class Work:
    """A device with a known step time, a clock of its own, and memory for a given number of samples."""

    description = "known work"

    def __init__(self, overhead_s: float, seconds_per_sample: float, room: int = 10**9) -> None:
        self.overhead_s, self.seconds_per_sample, self.room = overhead_s, seconds_per_sample, room
        self.now_s, self.warm, self.sizes = 0.0, set[int](), list[int]()
        self.spikes: list[float] = []

    def step(self, samples: int) -> Callable[[], object]:
        def step() -> None:
            if samples > self.room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual.")
            self.sizes.append(samples)
            cold_s = 0.0 if samples in self.warm else 10.0
            spike_s = self.spikes.pop() if self.spikes else 0.0
            self.warm.add(samples)
            self.now_s += self.overhead_s + self.seconds_per_sample * samples + cold_s + spike_s

        return step


def measure(work: Work, monkeypatch: pytest.MonkeyPatch, seconds: float = 3.0) -> Measurement:
    def timed_call(call: Callable[[], object], device: torch.device) -> tuple[object, float]:
        start_s = work.now_s
        return call(), work.now_s - start_s

    monkeypatch.setattr(benchmark, "timed_call", timed_call)
    monkeypatch.setattr(time, "perf_counter", lambda: work.now_s)
    return measure_device(CPU, seconds, work)


@pytest.mark.parametrize(("overhead_s", "seconds_per_sample"), [(0.01, 1e-3), (1e-3, 1e-5), (0.0, 0.5), (0.05, 1e-3)])
def test_overhead_and_cost_are_found(
    overhead_s: float, seconds_per_sample: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(overhead_s, seconds_per_sample)
    measured = measure(work, monkeypatch)
    assert measured.overhead_s == pytest.approx(overhead_s, abs=1e-6)
    assert measured.seconds_per_sample == pytest.approx(seconds_per_sample, rel=1e-3)
    largest = max(work.sizes[-4:])
    assert measured.samples_per_s == pytest.approx(largest / (overhead_s + seconds_per_sample * largest), rel=1e-3)
    assert measured.spread == pytest.approx(0.0, abs=1e-6)
    assert "known work" in measured.workload


def test_sizes_are_interleaved_and_each_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(0.0, 10.0)
    measure(work, monkeypatch, seconds=0.01)
    assert work.sizes[-16:] == [1, 2, 4, 8] * 4, "a slow device still gets a round to warm up, and three more"


def test_more_time_means_larger_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [Work(0.01, 1e-3) for _ in range(2)]
    for w, seconds in zip(work, (0.5, 5.0), strict=True):
        measure(w, monkeypatch, seconds)
    assert max(work[0].sizes) < max(work[1].sizes)


def test_a_disturbed_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(0.01, 1e-3)
    calm = measure(work, monkeypatch)
    work = Work(0.01, 1e-3)
    work.spikes = [5.0] + [0.0] * 20  # the last one is popped first
    disturbed = measure(work, monkeypatch)
    assert (disturbed.overhead_s, disturbed.seconds_per_sample) == pytest.approx(
        (calm.overhead_s, calm.seconds_per_sample), rel=1e-3
    )


def test_sizes_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(1e-3, 1e-5, room=100)
    assert measure(work, monkeypatch).seconds_per_sample == pytest.approx(1e-5, rel=1e-3)
    assert max(work.sizes) == 64


def test_a_device_without_memory_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^cpu could not be measured: CUDA out of memory. Tried to allocate 2 GiB\.$"
    with pytest.raises(UnsupportedFeatureError, match=message):
        measure(Work(1e-3, 1e-5, room=4), monkeypatch)


def test_the_real_network_trains_and_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    network = benchmark._ReferenceNetwork(CPU)
    parameters = [parameter.detach().clone() for parameter in network._network.parameters()]
    network.step(2)()
    assert all((a != b).any() for a, b in zip(parameters, network._network.parameters(), strict=True))
    torch.set_rng_state(before)
    measured = measure_device(CPU, 0.05)
    assert torch.equal(torch.get_rng_state(), before)
    assert measured.samples_per_s > 0
    assert measured.seconds_per_sample > 0


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_timer_waits_for_an_accelerator(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But only for the stream in which the work is: others may wait for other ranks."""
    order: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: order.append("waited"))
    if kind == "mps":
        module = stream
    else:
        module = SimpleNamespace(current_stream=lambda _: stream, synchronize=lambda *_: order.append("waited for all"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "synchronize", module.synchronize)
    real_timed_call(lambda: order.append("worked"), torch.device(kind))
    assert order == ["waited", "worked", "waited"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_cuda_device_is_measured() -> None:
    assert measure_device(torch.device("cuda", 0), 0.5).samples_per_s > 0
