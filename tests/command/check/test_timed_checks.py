"""The checks of times, on ranks whose clocks only their own pauses advance: what they must find is known exactly."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command.check import broken
from harness import RankPools

from lightning_hetero.balance.types import StepTiming
from lightning_hetero.command.check.children import clocks, failure, speed
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding, failed


@contextmanager
def clock_of_pauses(busy: float = 1.0) -> Iterator[None]:
    """Let only sleeping take time, and ``busy`` times as long as asked for; threads sleep as ever."""
    now_s, sleep = 0.0, time.sleep

    def pause(seconds: float) -> None:
        nonlocal now_s
        if threading.current_thread() is threading.main_thread():
            now_s += busy * seconds
        else:
            sleep(seconds)

    def clock() -> float:
        return now_s

    with mock.patch("time.sleep", pause), mock.patch("time.perf_counter", clock):
        yield


def on_ranks(function: Callable[[Rank], Finding], busy: float) -> Finding:
    with clock_of_pauses(busy), mock.patch.object(speed, "_PAIRS", 2):
        return function(Rank(dist.get_rank(), dist.get_world_size()))


def five_percent_late(rank: Rank) -> Finding:
    with broken.timed(lambda t: StepTiming(t.samples, 1.05 * t.own_s, t.waiting_s)):
        return speed.own_time(rank)


def nothing_measured(rank: Rank) -> Finding:
    with mock.patch("lightning_hetero.distributed.step_timer.StepTimer.enable"):
        return speed.own_time(rank)


CASES: dict[str, tuple[Callable[[Rank], Finding], Callable[[Rank], Finding], float]] = {
    "own-time": (speed.own_time, five_percent_late, 0.0),
    "balancer-cost": (speed.balancer_cost, broken.balancer_cost, 1.0),
    "equal-ranks": (speed.equal_ranks, broken.equal_ranks, 0.0),
    "best-shares": (speed.best_shares, broken.best_shares, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_it_finds_what_is_known_and_the_fault(ranks: RankPools, name: str) -> None:
    function, faulty, figure = CASES[name]
    for finding in ranks.run(2, on_ranks, function, 1.0):
        assert (finding.outcome, finding.figure) == ("PASS", pytest.approx(figure, abs=1e-6)), finding
    assert "FAIL" in [finding.outcome for finding in ranks.run(2, on_ranks, faulty, 1.0)]


def test_a_processor_that_is_too_busy_is_skipped_and_not_blamed(ranks: RankPools) -> None:
    """Its steps take twice as long as their pauses."""
    for finding in ranks.run(2, on_ranks, broken.equal_ranks, 2.0):
        assert finding.outcome == "SKIP"
        assert finding.note == "this machine is too busy to tell: a step of 20 ms takes 40 ms"
        assert finding.details["figure"] > 10, "what was found is kept"


def test_a_check_of_own_times_fails_where_nothing_was_measured(ranks: RankPools) -> None:
    assert [f.note for f in ranks.run(2, on_ranks, nothing_measured, 1.0)] == ["no step was measured"] * 2


def test_equal_shares_are_not_asked_of_unequal_devices() -> None:
    finding = speed.equal_ranks(Rank(0, 2, names=("Old Card", "New Card")))
    assert (finding.outcome, finding.note) == ("SKIP", "needs devices of one model")


def test_cards_that_work_twice_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal cards become unequal ranks without another loss or other gradients."""
    monkeypatch.setattr(speed, "_WIDTH", 8)
    found = []
    for repeats in (1, 2):
        torch.manual_seed(0)
        module = speed._Heavy(repeats)
        module.training_step(torch.arange(4), 0).backward()
        found.append([p.grad for p in module.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


def test_every_small_layer_of_equal_cards_works() -> None:
    module = speed._Deep()
    module.training_step([torch.ones(4, 6), None], 0).backward()
    assert all(p.grad is not None for p in module.parameters())


# ---- failures --------------------------------------------------------------------------------------------------------


def fail_alone(check: Callable[[Rank], Finding], folder: str) -> tuple[Any, list[Any]]:
    """Run a check on a rank without others, whose signals have no effect; return what it finds, or its error."""
    signals: list[Any] = []
    with clock_of_pauses(), mock.patch.object(os, "kill", lambda _, number: signals.append(number)):
        try:
            return check(Rank(0, 1, folder=folder)), signals
        except OSError as error:
            return str(error), signals


@pytest.mark.parametrize(("check", "sent"), [(failure.kill, signal.SIGKILL), (failure.stop, signal.SIGSTOP)])
def test_a_signal_without_effect_fails_the_check(
    ranks: RankPools, tmp_path: Path, check: Callable[[Rank], Finding], sent: signal.Signals
) -> None:
    assert ranks.run(1, fail_alone, check, str(tmp_path)) == [(failed("the training went on"), [sent])]
    assert (tmp_path / "fault-0").exists(), "from when on other ranks have to notice"


def test_an_exception_ends_the_training_as_it_is(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks.run(1, fail_alone, failure.exception, str(tmp_path)) == [("raised by the check", [])]
    assert (tmp_path / "fault-0").exists()


# ---- clocks ----------------------------------------------------------------------------------------------------------


def test_blocks_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of two steps after one that does not count; at the end of each, the host waits for a device."""
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    clock = clocks.BlockClock(steps=2, skipped=1)
    with clock_of_pauses():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(clock._done))
        for seconds in (9.0, 1.0, 3.0, 2.0, 2.5, 7.0):
            time.sleep(seconds)
            clock.on_train_batch_end()
    assert clock.seconds_per_step() == [2.0, 2.25]
    assert waits == [1, 3, 5]


def test_pauses_of_a_processor() -> None:
    pause = clocks.Pause(torch.device("cpu"))
    with clock_of_pauses(busy=1.5):
        pause(2.0)
        pause(1.0)
    assert pause.seconds() == [3.0, 1.5], "known is what was measured"
