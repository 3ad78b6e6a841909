"""A rank that is slowed down takes as much longer as it should, by a clock of the test."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.testing import SlowDown, SlowLayers


class Clock:
    """A clock that only work and sleep move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = self.slept_s = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds


def step(callback: SlowDown, clock: Clock, rank: int, forward_s: float, backward_s: float) -> float:
    """Take a step of two samples with known work; return how long it has lasted."""
    module: Any = nn.Linear(2, 1)
    trainer: Any = SimpleNamespace(world_size=2, global_rank=rank)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    before_s = clock.now_s
    batch = torch.ones(2, 2)
    callback.on_train_batch_start(trainer, module, batch, 0)
    loss = module(batch).sum()
    clock.now_s += forward_s
    callback.on_before_backward(trainer, module, loss)
    clock.now_s += backward_s
    loss.backward()
    callback.on_train_end(trainer, module)
    return clock.now_s - before_s


@pytest.mark.parametrize(("rank", "seconds"), [(0, 3.0), (1, 7.5)])
def test_work_takes_as_many_times_as_long(monkeypatch: pytest.MonkeyPatch, rank: int, seconds: float) -> None:
    clock = Clock(monkeypatch)
    assert step(SlowDown([1, 2.5]), clock, rank, forward_s=1.0, backward_s=2.0) == pytest.approx(seconds)


def test_a_device_of_known_speed_takes_its_time_whatever_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow_down = SlowDown([1, 2], seconds_per_sample=3.0, overhead_s=1.0)
    assert step(slow_down, clock, 1, forward_s=1.0, backward_s=2.0) == pytest.approx(2 * (1 + 2 * 3))
    assert clock.slept_s == pytest.approx(11.0)


def test_numbers_must_fit_ranks_and_layers() -> None:
    trainer: Any = SimpleNamespace(world_size=3, global_rank=0)
    module: Any = SimpleNamespace(model=nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    with pytest.raises(ConfigurationError, match=r"`factors` must have one number per rank \(3\), got 2: \[1, 2\]"):
        SlowDown([1, 2]).setup(trainer, module, "fit")
    with pytest.raises(ConfigurationError, match=r"one number, or one per layer \(2\), got 3 numbers"):
        SlowLayers([1, 2, 1], seconds_per_sample=[1.0, 1.0, 1.0]).setup(trainer, module, "fit")
