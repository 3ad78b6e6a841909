"""The stopwatch counts the rank's own work and nothing else."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from lightning_hetero.balance.types import StepTiming
from lightning_hetero.distributed.step_timer import CudaClock, EventClock, HostClock, StepTimer, clock_of


class ScriptedClock:
    """A clock whose readings are given."""

    def __init__(self, readings: list[float]) -> None:
        self._readings: Iterator[float] = iter(readings)

    def mark(self) -> float:
        return next(self._readings)

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self, mark: float) -> None:
        """Take no reading."""


def test_own_time_runs_from_the_last_all_reduce_to_the_last_gradient() -> None:
    marks = [
        0, 1, 4, 5,  # step 0: works 0..1, waits until 4, optimiser 4..5
        7, 10, 11, 14, 20, 22,  # step 1: fetch 7..10, forward and backward 11..14, waits until 20, optimiser 20..22
        30, 31, 33,  # step 2: works 30..31, waits until 33
    ]  # fmt: skip
    timer = StepTimer(ScriptedClock([float(m) for m in marks]))
    timer.enable()

    def backward() -> None:
        timer.gradients_ready()
        timer.resume()

    timer.resume()
    backward()
    timer.pause()
    timer.finish_step(8)
    timer.resume()
    timer.pause()
    timer.resume()
    backward()
    timer.pause()
    timer.finish_step(16)
    timer.resume()
    backward()
    timer.finish_step(4)
    # step 0 began before the timer did; step 1: 1 (optimiser) + 3 + 3 of the 13 between the last gradients, at 1 and at
    # 14; step 2: 2 (optimiser) + 1 of 17
    assert timer.take() == [StepTiming(16, 7.0, 6.0), StepTiming(4, 3.0, 14.0)]
    assert timer.take() == []


def test_several_backward_passes_make_one_step() -> None:
    timer = StepTimer(ScriptedClock([float(m) for m in range(40)]))
    timer.enable()
    for _ in range(3):
        timer.resume()
        for _ in range(2):
            timer.gradients_ready()
            timer.resume()
        timer.finish_step(2)
    assert [timing.samples for timing in timer.take()] == [2, 2]


def test_a_step_that_is_not_kept_or_not_trained_is_not_measured() -> None:
    timer = StepTimer(ScriptedClock([float(m) for m in range(60)]))
    timer.enable()
    for step in range(5):
        timer.resume()
        if step != 2:  # a training step that returned None
            timer.gradients_ready()
            timer.resume()
        timer.finish_step(step, keep=step != 1)
    # 0 was not whole, 1 was not kept, 2 was not trained, and 3 began before the gradients of a step that was
    assert [timing.samples for timing in timer.take()] == [4]


def test_a_disabled_timer_marks_nothing() -> None:
    timer = StepTimer(ScriptedClock([]))
    timer.resume()
    timer.pause()
    timer.gradients_ready()
    timer.resume()
    timer.finish_step(3)
    loss = torch.ones((), requires_grad=True) * 2
    timer.watch_backward(loss)
    loss.backward()
    assert timer.take() == []


class CountingClock(HostClock):
    """A clock that counts its readings."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> float:
        self.marks += 1
        return float(self.marks)

    def seconds(self, start: float, end: float) -> float:
        return end - start


def marks_per_step(beside: str) -> tuple[int, int]:
    """Return the marks of a step after the first one, and the hooks that parameters carry then."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    clock = CountingClock()
    timer = StepTimer(clock)
    parameters = list(model.parameters())
    timer.enable(parameters)

    def loss() -> torch.Tensor:
        return model(torch.randn(2, 4)).square().mean()  # type: ignore[no-any-return]

    def fails(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    for step in range(3):
        before = clock.marks
        timer.resume()
        if beside == "earlier micro-batch":
            loss().backward()
        watched = loss()
        timer.watch_backward(watched)
        if beside == "repetition" and step == 0:
            failing = model[2].weight.register_hook(fails)  # type: ignore[operator]
            with pytest.raises(torch.OutOfMemoryError):
                watched.backward()
            failing.remove()
            timer.backward_interrupted()
            gradients = torch.autograd.grad(loss(), parameters)
            timer.gradients_ready()
            torch.autograd.backward(parameters, gradients)
        elif beside == "unnoticed error" and step == 0:
            failing = model[2].weight.register_hook(fails)  # type: ignore[operator]
            with pytest.raises(torch.OutOfMemoryError):
                watched.backward()
            failing.remove()
        else:
            watched.backward()
        timer.resume()
        timer.pause()
        timer.finish_step(2)
        if beside == "search":
            with timer.waiting():
                timer.resume()
                loss().backward()
    return clock.marks - before, sum(len(p._backward_hooks or {}) for p in parameters)


@pytest.mark.parametrize("beside", ["nothing", "earlier micro-batch", "repetition", "unnoticed error", "search"])
def test_passes_beside_the_watched_one_are_not_nested_in_it(beside: str) -> None:
    """Where passes are nested, each parameter marks its gradient in each step."""
    assert marks_per_step(beside) == (4, 0)


def test_nothing_starts_the_stopwatch_while_ranks_wait() -> None:
    timer = StepTimer(ScriptedClock([0.0, 1.0, 5.0, 6.0, 7.0, 9.0]))
    timer.enable()
    timer.gradients_ready()
    timer.finish_step(1)
    timer.resume()
    with timer.waiting(), timer.waiting():
        timer.resume()
    timer.gradients_ready()
    timer.finish_step(1)
    # works 1..5 and 6..7
    assert timer.take() == [StepTiming(1, 5.0, 2.0)]


def test_waiting_within_the_passes_is_not_own_time() -> None:
    """Layers communicate in the forward and in the backward pass."""
    timer = StepTimer(ScriptedClock([float(m) for m in [1, 5, 9, 10, 20, 22, 31, 33, 40]]))
    timer.enable()
    timer.gradients_ready()
    timer.finish_step(1)
    timer.resume()
    for _ in range(2):
        with timer.waiting():
            pass
    with timer.waiting():
        timer.gradients_ready()
    timer.finish_step(1)
    # works 5..9, 10..20 and 22..31; the last gradient comes at 33, from what the layers have communicated
    assert timer.take() == [StepTiming(1, 23.0, 9.0)]


class Checkpointed(nn.Module):
    """Layers whose activations are computed again in the backward pass."""

    def __init__(self, layers: list[nn.Module], use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def timed_steps(pauses_s: list[float], use_reentrant: bool | None) -> tuple[float, float, int]:
    """Train with DDP on ranks that compute for ``pauses_s[rank]`` each.

    Returns:
        The medians of own and waiting seconds, and how many hooks the parameters carry at the end.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(32, 32) for _ in range(4)]
    model = nn.Sequential(*layers) if use_reentrant is None else Checkpointed(layers, use_reentrant)
    ddp = nn.parallel.DistributedDataParallel(model)
    pause_s = pauses_s[dist.get_rank()] / 4
    pauses = [layer.weight.register_hook(lambda _: time.sleep(pause_s)) for layer in layers]  # type: ignore[operator]
    timer = StepTimer(HostClock())
    timer.enable(model.parameters())
    for _ in range(12):
        timer.resume()
        loss = ddp(torch.randn(4, 32, requires_grad=True)).square().mean()
        timer.watch_backward(loss)
        loss.backward()
        timer.resume()
        timer.pause()
        timer.finish_step(4)
    timings = timer.take()[2:]
    for pause in pauses:
        pause.remove()
    hooks = sum(len(p._backward_hooks or {}) for p in model.parameters())
    return median([t.own_s for t in timings]), median([t.waiting_s for t in timings]), hooks


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_waiting_for_a_slower_rank_is_not_own_time(ranks: RankPools, use_reentrant: bool | None) -> None:
    """Fails where torch no longer runs the engine's callbacks in the order in which they were queued.

    The ranks sleep for known times, so the comparison holds on any machine: without the callback's place before
    DDP's, the fast rank's own time would be that of the slow one, ten times as long. Under reentrant checkpointing DDP
    waits in an inner backward pass, before any callback of the outer one.
    """
    results = ranks.run(2, timed_steps, [0.02, 0.2], use_reentrant)
    (fast_own, fast_waiting, hooks), (slow_own, slow_waiting, _) = results
    assert slow_own >= 0.2
    assert fast_own < 0.5 * slow_own
    assert fast_waiting > 0.5 * slow_own
    assert slow_waiting < 0.5 * slow_own
    assert hooks == (8 if use_reentrant else 0), "an ordinary step runs Python for no parameter"


class FakeEvent:
    """Stands for torch.cuda.Event on a machine without one: time passes on the device, not on the host."""

    device_s = 0.0
    synchronised = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.device_s += 0.5
        self.at_s = FakeEvent.device_s

    def synchronize(self) -> None:
        FakeEvent.synchronised += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.at_s - self.at_s) * 1e3


def test_cuda_marks_are_events_that_nobody_waits_for_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = StepTimer(CudaClock())
    timer.enable()
    for _ in range(2):
        timer.resume()
        timer.gradients_ready()
        timer.resume()
        timer.finish_step(8)
    assert FakeEvent.synchronised == 0
    assert timer.take() == [StepTiming(8, own_s=0.5, waiting_s=0.5)]
    assert FakeEvent.synchronised > 0


def test_each_device_has_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("cuda", 0)), CudaClock)
    monkeypatch.setattr(torch.xpu, "Event", FakeEvent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clock = clock_of(torch.device("xpu", 0))
    assert isinstance(clock, EventClock)
    assert clock.seconds(clock.mark(), clock.mark()) == 0.5


def test_the_hosts_clock_is_named_where_a_device_has_no_other() -> None:
    """No device of this kind is here, so its events cannot be recorded; torch knows no module of the second kind."""
    for device in (torch.device("xpu", 0), torch.device("meta")):
        with pytest.warns(UserWarning, match=f"events of {device} do not measure time .* the host's clock"):
            assert isinstance(clock_of(device), HostClock)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_cuda_events_measure_device_time() -> None:
    clock = CudaClock()
    x = torch.randn(4096, 4096, device="cuda")
    start = clock.mark()
    for _ in range(10):
        x = x @ x.softmax(0)
    assert clock.seconds(start, clock.mark()) > 0
