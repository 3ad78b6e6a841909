"""Trainings on real ranks to which drawn things happen; every one ends where a single process ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import drawn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from training import SEED, Numbered, SmallModule, assert_close, flat, loss_of, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.distributed.step_timer import HostClock, StepTimer

SCHEDULES, CHUNK, EPOCHS, SIZE = drawn(10, 100), 5, 3, 70
KINDS = ("slow down", "stall", "clock jumps", "no time", "plan", "out of memory", "caught", "evaluate")


@dataclass(frozen=True)
class Event:
    """What happens before a step.

    Attributes:
        step: Training step, counted from 0 over all epochs.
        kind: One of ``KINDS``.
        rank: Rank to which it happens; "plan" and "evaluate" concern all.
        number: Severity, from 0 to 1.
    """

    step: int
    kind: str
    rank: int
    number: float


@dataclass(frozen=True)
class Schedule:
    """A draw of everything that happens to a training.

    Attributes:
        worlds: Number of ranks before and after the crash.
        batches: Global batch size of each epoch.
        crash: Step at which all ranks fail.
        save_every: Steps between checkpoints.
        workers: Workers per loader.
        events: Events in order of steps.
    """

    worlds: tuple[int, int]
    batches: tuple[int, ...]
    crash: int
    save_every: int
    workers: int
    events: tuple[Event, ...] = field(default=())


def draw(number: int) -> Schedule:
    """Draw the schedule with this number as its seed."""
    random = Random(number)
    worlds = random.choice([(2, 2), (2, 2), (3, 3), (2, 3), (3, 2)])
    # another global batch from some epoch on, or never
    batches = tuple(sorted(random.choice([6, 12, 12]) for _ in range(EPOCHS)))
    steps = sum(-(-SIZE // batch) for batch in batches)
    events = [
        Event(random.randrange(steps), random.choice(KINDS), random.randrange(min(worlds)), random.random())
        for _ in range(random.randint(2, 8))
    ]
    return Schedule(
        worlds=worlds,
        batches=batches,
        crash=random.randrange(2, steps),
        save_every=random.randint(1, 6),
        workers=int(random.random() < 0.1),
        events=tuple(sorted(events, key=lambda event: event.step)),
    )


class CrashError(Exception):
    """All ranks fail at once."""


class Clock(HostClock):
    """Jumps and fails when it is told to."""

    def __init__(self) -> None:
        self.offset_s = 0.0
        self.broken = 0

    def mark(self) -> float:
        return time.perf_counter() + self.offset_s

    def seconds(self, start: float, end: float) -> float:
        self.broken -= 1
        return float("nan") if self.broken > 0 else super().seconds(start, end)


class Happenings(Callback):
    """Lets the events of a schedule happen."""

    def __init__(self, schedule: Schedule, folder: Path, crash: bool) -> None:
        self.schedule = schedule
        self.folder = folder
        self.crash = crash
        self.slow_s = 0.0
        self.clock = Clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, HeteroDDPStrategy)
        strategy.timer = StepTimer(self.clock)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Module)
        step = trainer.fit_loop.total_batch_idx
        pl_module.runs_out = pl_module.fails = False
        if self.crash and step == self.schedule.crash:
            raise CrashError
        for event in self.schedule.events:
            if event.step == step:
                self.happen(trainer, pl_module, event)
        time.sleep(self.slow_s)

    def happen(self, trainer: Trainer, module: Module, event: Event) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, HeteroDDPStrategy)
        if event.kind == "plan":
            assert strategy.plan_schedule is not None
            first = max(all_gather(strategy.fetched_through)) + 1
            batch, world = strategy.plan_schedule.at(first).global_batch_size, trainer.world_size
            cut = round(event.number * batch)
            strategy.change_plan(first, BatchPlan((cut, *[0] * (world - 2), batch - cut)))
        if event.kind == "evaluate":
            module.evaluate()
        if event.rank != trainer.global_rank:
            return
        if event.kind == "slow down":
            self.slow_s = 0.01 * event.number
        if event.kind == "stall":
            time.sleep(0.3 * event.number)
        if event.kind == "clock jumps":
            self.clock.offset_s += 7200 * (event.number - 0.5)
        if event.kind == "no time":
            self.clock.broken = round(40 * event.number)
        module.runs_out = event.kind == "out of memory"
        module.fails = event.kind == "caught"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.fit_loop.total_batch_idx
        if self.crash and step % self.schedule.save_every == self.schedule.save_every - 1:
            trainer.save_checkpoint(self.folder / "last.ckpt")


class Module(SmallModule):
    """Its data change with the epoch; some of its steps fail in ways that are caught."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.steps: dict[int, list[int]] = {}
        self.runs_out = self.fails = False

    def train_dataloader(self) -> DataLoader[Any]:
        batch = self.schedule.batches[min(self.trainer.current_epoch, EPOCHS - 1)]
        size = batch // self.trainer.world_size
        return DataLoader(Numbered(SIZE), batch_size=size, shuffle=True, num_workers=self.schedule.workers)

    def evaluate(self) -> None:
        """Read the parameters on all ranks, as a callback of a user might."""
        with torch.no_grad():
            data = Numbered(8)
            value = self.network(data.features).sum()
        mean = self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
        assert torch.allclose(mean, value, rtol=1e-10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, features, targets = batch
        strategy = self.trainer.strategy
        assert isinstance(strategy, HeteroDDPStrategy)
        part = strategy.training_slice
        assert part is not None
        if part.samples:
            self.steps.setdefault(part.step, []).extend(index.tolist())
        if self.runs_out and len(index) > 1:
            self.steps[part.step] = self.steps[part.step][: -len(index)]
            raise torch.OutOfMemoryError("raised by a test")
        try:
            if self.fails:
                raise OSError("raised by a test")
        except OSError:
            pass
        return loss_of(self.network, features, targets)


def train(schedule: Schedule, folder: Path, crash: bool) -> tuple[list[float], dict[int, list[int]], list[list[int]]]:
    """Return the parameters, the samples of each step, and the shares of the last plan on all ranks."""
    model, strategy = Module(schedule), HeteroDDPStrategy()
    path = folder / "last.ckpt"
    trainer = make_trainer(
        strategy,
        dist.get_world_size(),
        [Happenings(schedule, folder, crash), LoadBalancer(warmup_steps=1, tune_steps=6, watch_steps=2)],
        max_epochs=EPOCHS,
        reload_dataloaders_every_n_epochs=1,
    )
    try:
        trainer.fit(model, ckpt_path=path if not crash and path.exists() else None, weights_only=False)
    except CrashError:
        assert crash
    assert strategy.plan_schedule is not None
    return flat(model.network), model.steps, [list(plan.samples) for plan in strategy.plan_schedule.plans]


def reference(schedule: Schedule) -> tuple[list[list[int]], list[float]]:
    """Return the global batches, and the parameters of a single process without Lightning."""
    data, network = Numbered(SIZE), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    order: DistributedSampler[Any] = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED)
    batches = []
    for epoch, size in enumerate(schedule.batches):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [indices[start : start + size] for start in range(0, SIZE, size)]
    for members in batches:
        optimizer.zero_grad()
        loss_of(network, data.features[members], data.targets[members]).backward()
        optimizer.step()
    return [sorted(members) for members in batches], flat(network)


def check(ranks: RankPools, schedule: Schedule, folder: Path) -> None:
    """Compare with a single process."""
    batches, parameters = reference(schedule)
    before, after = schedule.worlds
    first = ranks.run(before, train, schedule, folder, True)
    runs = ranks.run(after, train, schedule, folder, False)
    start = min(min(steps) for _, steps, _ in runs if steps)
    saved = schedule.crash - schedule.crash % schedule.save_every
    assert start == saved
    for step, members in enumerate(batches):
        # steps after the last checkpoint are repeated once
        of = first if step < start else runs
        assert sorted(index for _, steps, _ in of for index in steps.get(step, [])) == members, f"step {step}"
    for results in (first, runs):
        assert len({str(plans) for _, _, plans in results}) == 1
    for found, _, _ in runs:
        assert_close(found, parameters, comparison=f"single process, {SCHEDULES} drawn schedules of faults")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(0, SCHEDULES, CHUNK))
def test_drawn_schedules_end_where_a_single_process_ends(ranks: RankPools, tmp_path: Path, first: int) -> None:
    for number in range(first, first + CHUNK):
        folder = tmp_path / str(number)
        folder.mkdir()
        schedule = draw(number)
        check(ranks, schedule, folder)
