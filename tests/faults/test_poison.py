"""Losses that are NaN or infinite, clocks that are wrong, and a rank that follows another plan."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, make_trainer, reference_parameters

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.distributed.step_timer import HostClock, StepTimer
from lightning_hetero.exceptions import DivergedRanksError
from lightning_hetero.testing import SlowDown

BATCH, SIZE = 24, 240


def fit(model: SmallModule, strategy: Any, callbacks: list[Callback], steps: int, data: Any = None) -> Trainer:
    trainer = make_trainer(strategy, dist.get_world_size(), callbacks, max_steps=steps)
    size = BATCH // dist.get_world_size()
    trainer.fit(model, DataLoader(Numbered(SIZE) if data is None else data, batch_size=size, shuffle=True))
    return trainer


# ---- losses ----------------------------------------------------------------------------------------------------------


class Poisoned(Numbered):
    """One of the samples makes the loss infinite or not a number."""

    def __init__(self, value: float) -> None:
        super().__init__(SIZE)
        self.targets[100] = value


def train_poisoned(strategy: Any, value: float, sanitised: bool) -> tuple[list[float], list[int]]:
    class Module(SmallModule):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in self.parameters() if sanitised else ():
                assert parameter.grad is not None
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    model = Module()
    fit(model, strategy, [SlowDown([1, 3], seconds_per_sample=0.002)], 25, Poisoned(value))
    return flat(model.network), [len(batch) for batch in model.ledger]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_as_under_ddp(ranks: RankPools, value: float) -> None:
    """The same parameters are lost, no rank waits, and the slow rank gets its small share all the same."""
    plain = ranks.run(2, train_poisoned, "ddp", value, False)
    found = ranks.run(2, train_poisoned, HeteroDDPStrategy(), value, False)
    assert all(all(map(math.isnan, parameters)) for parameters, _ in plain + found)
    assert found[1][1][-1] <= 8


def test_a_gradient_that_a_hook_repairs_is_the_same_on_all_ranks(ranks: RankPools) -> None:
    """Every rank sees the same combined gradient, so a hook that removes NaN keeps the ranks in step."""
    (first, _), (second, _) = ranks.run(2, train_poisoned, HeteroDDPStrategy(), math.nan, True)
    assert first == second
    assert all(map(math.isfinite, first))


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Jumping(HostClock):
    """Is set forward or backward by an hour at every seventh reading."""

    def __init__(self) -> None:
        self.reads = 0
        self.offset_s = 0.0

    def mark(self) -> float:
        self.reads += 1
        if self.reads % 7 == 0:
            self.offset_s += 3600.0 if self.reads % 2 else -3600.0
        return time.perf_counter() + self.offset_s


class Measuring(HostClock):
    """Takes a value for every duration, or for every ``often``-th."""

    def __init__(self, value: float, often: int = 1) -> None:
        self.value = value
        self.often = often
        self.asked = 0

    def seconds(self, start: float, end: float) -> float:
        self.asked += 1
        return self.value if self.asked % self.often == 0 else super().seconds(start, end)


class Said(logging.Handler):
    """Keeps what is printed."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train_with_clock(bad: int, clock: HostClock, steps: int) -> tuple[tuple[int, ...], list[str], list[float], bool]:
    """Return the last shares, what was printed, the parameters, and whether the tuning has ended."""
    strategy, model = HeteroDDPStrategy(), SmallModule()
    balancer = LoadBalancer(watch_steps=4)
    if dist.get_rank() == bad:
        strategy.timer = StepTimer(clock)
    said, log = Said(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(said)
    log.setLevel(logging.INFO)
    try:
        fit(model, strategy, [balancer, SlowDown([1, 3], seconds_per_sample=0.002)], steps)
    finally:
        log.removeHandler(said)
    assert strategy.plan_schedule is not None
    lines = [line for line in said.lines if "hetero_ddp" in line]
    return strategy.plan_schedule.plans[-1].samples, lines, flat(model.network), balancer.finished


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0, math.inf])
def test_a_rank_that_cannot_be_timed_keeps_its_share_and_is_named(ranks: RankPools, bad: int, value: float) -> None:
    runs = ranks.run(2, train_with_clock, bad, Measuring(value), 30)
    assert [(samples, finished) for samples, _, _, finished in runs] == [((12, 12), True)] * 2
    assert runs[0][1] == [
        f"hetero_ddp: the shares stay [12, 12]; no step of rank {bad} could be timed, so other shares cannot be judged"
    ]
    assert_close(runs[0][2], reference_parameters(SIZE, BATCH, 30))


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    "clock",
    [Jumping(), Measuring(math.nan, 13), Measuring(0.0, 13), Measuring(-1.0, 13)],
    ids=["jumps", "nan", "zero", "negative"],
)
def test_a_clock_that_is_wrong_at_times_does_not_mislead(ranks: RankPools, bad: int, clock: HostClock) -> None:
    runs = ranks.run(2, train_with_clock, bad, clock, 45)
    (first, _, parameters, _), (second, *_) = runs
    assert first == second
    assert abs(first[0] - 18) <= 2  # what the speeds are worth
    assert_close(parameters, reference_parameters(SIZE, BATCH, 45))


# ---- plans -----------------------------------------------------------------------------------------------------------


class OwnPlan(Callback):
    """Makes one rank follow a plan that the others do not know."""

    def __init__(self, bad: int) -> None:
        self.bad = bad

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 20 and trainer.global_rank == self.bad:
            strategy = trainer.strategy
            assert isinstance(strategy, HeteroDDPStrategy)
            assert strategy.plan_schedule is not None
            first, *rest = strategy.plan_schedule.plans[-1].samples
            other = BatchPlan((first - 1, *rest[:-1], rest[-1] + 1))
            strategy.train_data.plan_schedule = strategy.plan_schedule.with_change(strategy.fetched_through + 1, other)


def train_diverging(bad: int) -> tuple[str, int]:
    model = SmallModule()
    with pytest.raises(DivergedRanksError) as raised:
        fit(model, HeteroDDPStrategy(), [LoadBalancer(watch_steps=4), OwnPlan(bad)], 200)
    return str(raised.value), len(model.ledger)


@pytest.mark.parametrize("bad", [0, 2])
def test_a_plan_that_differs_on_one_rank_ends_all_and_it_is_named(ranks: RankPools, bad: int) -> None:
    runs = ranks.run(3, train_diverging, bad)
    assert len(set(runs)) == 1
    message, steps = runs[0]
    assert f"rank {bad} of 3 differ" in message
    assert steps < 150
