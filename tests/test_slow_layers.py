"""Layers of emulated devices take as long as they should, whatever they take by themselves, by a clock of the test."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.passes.deferred import DeferredGradients
from lightning_hetero.testing import _Sleeper, _SlowLayer

LAYERS, SAMPLES, SECONDS, WORK_S, LATE = 4, 2, 3.0, 0.0003, 0.0005


class Clock:
    """A clock that only work and sleep move; a sleep takes a little longer than it should."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + LATE


class Work(torch.autograd.Function):
    """Takes some seconds in both directions, in the backward pass more than twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        clock.now_s += seconds
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.clock.now_s += 5 * ctx.seconds
        return 2 * gradients[0], None, None


class Layer(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return Work.apply(x, self.clock, WORK_S)  # type: ignore[no-untyped-call, no-any-return]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def slowed(clock: Clock, factor: float, seconds: float | None) -> list[Layer]:
    layers, sleeper = [Layer(clock) for _ in range(LAYERS)], _Sleeper()
    for layer in layers:
        slow = _SlowLayer(layer, lambda: factor, seconds, sleeper)
        layer.register_forward_pre_hook(slow.begin)
        layer.register_forward_hook(slow.end)
    return layers


def seconds_of(clock: Clock, layers: list[Layer], *, overhead_s: float = 0.0) -> tuple[float, float, Tensor]:
    began_s, x = clock.now_s, torch.ones(SAMPLES, 3, requires_grad=True)
    value = x
    for layer in layers:
        value = layer(value)
        clock.now_s += overhead_s  # between two layers
    forward_s, began_s = clock.now_s - began_s, clock.now_s
    clock.now_s += 1.0  # waiting for the rank after
    began_s = clock.now_s
    value.sum().backward()
    return forward_s, clock.now_s - began_s, x


def test_layers_of_known_speed_take_what_they_should(clock: Clock) -> None:
    layers = slowed(clock, 4.0, SECONDS)
    whole_s = 4.0 * SECONDS * SAMPLES * LAYERS
    for overhead_s in (0.0, 0.0001):
        found = [seconds_of(clock, layers, overhead_s=overhead_s)[:2] for _ in range(20)]
        for forward_s, backward_s in found:
            assert forward_s == pytest.approx(whole_s / 3, abs=0.002)
            assert backward_s == pytest.approx(2 * whole_s / 3, abs=0.002)
        mean_s = sum(map(sum, found)) / len(found)
        # nothing adds up but what the last layer of a pass takes, of which nobody knows whether it was waiting
        assert mean_s == pytest.approx(whole_s, abs=0.0015)


def test_gradients_that_are_put_off_take_their_part(clock: Clock) -> None:
    layers = slowed(clock, 1.0, SECONDS)
    deferred = DeferredGradients(layers)
    part_s = SECONDS * SAMPLES * LAYERS / 3
    with deferred.installed():
        for _ in range(3):
            x = torch.ones(SAMPLES, 3, requires_grad=True)
            value = x
            for layer in layers:
                value = layer(value)
            began_s = clock.now_s
            with deferred.put_off() as jobs:
                value.sum().backward()
            assert clock.now_s - began_s == pytest.approx(part_s, abs=0.003)
            began_s = clock.now_s
            for job in jobs:
                job()
            assert clock.now_s - began_s == pytest.approx(part_s, abs=0.003)


def test_layers_that_are_slowed_down_by_a_factor_sleep_in_proportion(clock: Clock) -> None:
    forward_s, backward_s, _ = seconds_of(clock, slowed(clock, 3.0, None), overhead_s=0.01)
    work_s = LAYERS * WORK_S
    assert forward_s == pytest.approx(3 * work_s + LAYERS * 0.01, abs=LAYERS * LATE)
    assert backward_s == pytest.approx((5 + 2 * 2) * work_s, abs=LAYERS * LATE)


def test_slow_layers_compute_the_same(clock: Clock) -> None:
    layers = slowed(clock, 1.0, SECONDS)
    _, _, x = seconds_of(clock, layers)
    own = [layer.linear.weight.grad for layer in layers]
    for layer in layers:
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        layer.zero_grad()
    _, _, same = seconds_of(clock, layers)
    torch.testing.assert_close(x.grad, same.grad)
    torch.testing.assert_close(own, [layer.linear.weight.grad for layer in layers])
