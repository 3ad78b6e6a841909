"""Measure times: own time, the cost of measuring, and the shares that are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.command.check.children.clocks import BlockClock, Pause
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.children.trainings import Small, loader
from lightning_hetero.command.check.finding import Finding, at_most, failed, measured_at_most, skipped
from lightning_hetero.testing import SlowDown

__all__ = ["balancer_cost", "best_shares", "equal_ranks", "own_time"]

_BATCH_SIZE = 16  # per rank
_SHORT_S = 0.02
_BUSY = 1.5


def _balancer(**options: Any) -> LoadBalancer:
    return LoadBalancer(**{"verbose": False, "record": False, **options})


def _unless_busy(rank: Rank, finding: Finding, step_s: float, pause_s: float) -> Finding:
    """Return the finding, or that nothing can be told of a processor whose steps take much longer than their pauses."""
    step_s = max(rank.gather(step_s))
    if finding.outcome != "FAIL" or rank.on_gpu or step_s < _BUSY * pause_s:
        return finding
    reason = f"this machine is too busy to tell: a step of {1e3 * pause_s:.0f} ms takes {1e3 * step_s:.0f} ms"
    return skipped(reason, figure=finding.figure, **finding.details)


# ---- own time --------------------------------------------------------------------------------------------------------

_OWN_TIME_PERCENT = 3.0
_PAUSE_S = 0.4
_MEASURED_STEPS = 10


def own_time(rank: Rank) -> Finding:
    """Give each rank steps of another known duration, and compare with the own times that are measured."""
    pause = Pause(rank.device)
    seconds = _PAUSE_S * (1 + rank.rank / 2)
    balancer = _balancer(warmup_steps=2, tune_steps=_MEASURED_STEPS, watch_steps=0)
    module = Small(before=lambda samples: pause(seconds))
    trainer = rank.trainer(rank.hetero(), [balancer], max_steps=_MEASURED_STEPS + 4)
    trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * (_MEASURED_STEPS + 5)))
    if not balancer.windows_before:
        return failed("no step was measured")
    window = balancer.windows_before[rank.rank]
    known_s = median(pause.seconds()[2:])
    percent = 100 * abs(window.own_s / known_s - 1)
    found = [
        (100 * (own / known - 1), wait) for own, known, wait in rank.gather((window.own_s, known_s, window.waiting_s))
    ]
    note = "own time differs from that of the work by " + " and ".join(f"{p:+.1f} %" for p, _ in found)
    note += "; waiting " + " and ".join(f"{1e3 * wait:.0f} ms" for _, wait in found)
    error = 100 * window.deviation_s / known_s / math.sqrt(window.steps)
    return measured_at_most(_OWN_TIME_PERCENT, percent, error, "%", note, own_s=window.own_s, known_s=known_s)


# ---- the cost of measuring -------------------------------------------------------------------------------------------

_COST = 1.01
_PAIRS = 5
# The standard error of a median of normally distributed values, divided by their median absolute deviation.
_ERROR_OF_MEDIAN = 1.4826 * math.sqrt(math.pi / 2)
# Ranks exchange their measurements after each ten steps at most, in some milliseconds of their hosts.
_STEP_S = 0.08
_BLOCK, _BLOCKS, _SKIPPED = 10, 3, 20


def balancer_cost(rank: Rank) -> Finding:
    """Train with and without a LoadBalancer in turn, and compare the blocks of steps of each pair."""
    pause, ratios, without = Pause(rank.device), [], []
    for pair in range(_PAIRS):
        of_pair = {on: _step_s(rank, pause, on=on) for on in ((True, False) if pair % 2 else (False, True))}
        ratios.append(of_pair[True] / of_pair[False])
        without.append(of_pair[False])
    # a pair that something else has disturbed counts no more than another
    ratio = median(ratios)
    error = _ERROR_OF_MEDIAN * median(abs(r - ratio) for r in ratios) / math.sqrt(len(ratios))
    ratio, error = max(rank.gather((ratio, error)))
    note = f"step time with a LoadBalancer over that without, ± {error:.3f} in {_PAIRS} pairs"
    finding = measured_at_most(_COST, ratio, error, "x", note, ratios=ratios)
    return _unless_busy(rank, finding, median(without), _STEP_S)


def _step_s(rank: Rank, pause: Pause, *, on: bool) -> float:
    clock = BlockClock(_BLOCK, _SKIPPED)
    strategy = rank.hetero(shares=[1.0] * rank.ranks)
    steps = _SKIPPED + _BLOCK * _BLOCKS
    trainer = rank.trainer(strategy, [*([_balancer()] if on else []), clock], max_steps=steps)
    module = Small(before=lambda samples: pause(_STEP_S))
    trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * (steps + 1)))
    return min(clock.seconds_per_step())  # whatever else the machine does only adds to a block


# ---- equal ranks -----------------------------------------------------------------------------------------------------

_EQUAL_PERCENT = 10.0  # 45:55
_LAYERS = 150
_EQUAL_STEPS = 300


class _Deep(LightningModule):
    """Many small layers, which a host launches more slowly than a GPU computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(_LAYERS)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, _ = batch
        loss: Tensor = self.model(features.repeat(1, 3)[:, :16]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Synchronises(Callback):
    """Makes one rank wait for its device at each step, as a progress bar does, and another at none."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.global_rank == 0:
            outputs["loss"].item()


def equal_ranks(rank: Rank) -> Finding:
    """Train on equal ranks, one of which waits for its device at every step; the shares have to stay equal."""
    if len(set(rank.names)) > 1:
        return skipped("needs devices of one model")
    pause = Pause(rank.device)
    module: LightningModule = _Deep() if rank.on_gpu else Small(before=lambda samples: pause(_SHORT_S))
    balancer, steps = _balancer(), _EQUAL_STEPS if rank.on_gpu else 100
    clock = BlockClock(_BLOCK, _SKIPPED)
    # on GPUs its waiting for the device would spoil what is tried
    clocks = [] if rank.on_gpu else [clock]
    trainer = rank.trainer(rank.hetero(), [balancer, _Synchronises(), *clocks], max_steps=steps)
    trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * (steps + 1)))
    plans = [plan.samples for _, plan in balancer.changes]
    farthest = max((abs(n / _BATCH_SIZE - 1) for plan in plans for n in plan), default=0.0)
    note = f"farthest from equal shares in {steps} steps, {len(plans)} changes"
    finding = at_most(_EQUAL_PERCENT, 100 * farthest, "%", note, plans=[list(plan) for plan in plans])
    return finding if rank.on_gpu else _unless_busy(rank, finding, median(clock.seconds_per_step()), _SHORT_S)


# ---- the best shares -------------------------------------------------------------------------------------------------

_SWEEP_PERCENT = 5.0
_SPLITS = (-2, -1, 0, 1, 2)  # in sixteenths of the global batch
_WIDTH = 2048
_TUNING_STEPS, _SWEEP_STEPS, _SWEEP_SKIPPED = 40, 12, 4


class _Heavy(LightningModule):
    """Matrix products, which the last rank computes twice, so that equal cards are unequal ranks."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(4)))
        self.repeats = repeats

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = torch.ones(len(batch), _WIDTH, device=self.device)
        loss = sum(
            (self.model(features).square().mean() for _ in range(self.repeats)), torch.zeros_like(features[0, 0])
        )
        return loss / self.repeats

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class _Indices(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def best_shares(rank: Rank) -> Finding:
    """Find the shares, then time them and four splits around them."""
    balancer = _balancer(watch_steps=0)
    _train_unequal(rank, rank.hetero(), _TUNING_STEPS, balancer)
    if not balancer.step_times:
        return failed("no step was measured")
    total = _global_batch(rank)
    found = balancer.changes[-1][1].samples if balancer.changes else (total // rank.ranks,) * rank.ranks
    seconds: dict[tuple[int, ...], float] = {}
    for shift in _SPLITS:
        samples = list(found)
        moved = shift * total // 16
        samples[0] -= moved
        samples[-1] += moved
        if min(samples) > 0:
            clock = BlockClock(_SWEEP_STEPS - _SWEEP_SKIPPED, _SWEEP_SKIPPED)
            _train_unequal(rank, rank.hetero(shares=[float(n) for n in samples]), _SWEEP_STEPS, clock)
            seconds[tuple(samples)] = max(rank.gather(median(clock.seconds_per_step())))
    percent = 100 * (seconds[tuple(found)] / min(seconds.values()) - 1)
    best = min(seconds, key=lambda samples: seconds[samples])
    note = f"step time of the shares {list(found)} above that of {list(best)}, the best of {len(seconds)}"
    splits = {":".join(map(str, samples)): value for samples, value in seconds.items()}
    return at_most(_SWEEP_PERCENT, percent, "%", note, seconds_of_splits=splits)


def _global_batch(rank: Rank) -> int:
    return (1024 if rank.on_gpu else 32) * rank.ranks


def _train_unequal(rank: Rank, strategy: HeteroDDPStrategy, steps: int, *callbacks: Callback) -> None:
    factors = [1.0] * (rank.ranks - 1) + [2.0]
    module: LightningModule = _Heavy(int(factors[rank.rank])) if rank.on_gpu else _Light()
    slow: Callable[[], list[Callback]] = lambda: [SlowDown(factors, seconds_per_sample=0.001, overhead_s=0.002)]  # noqa: E731
    trainer = rank.trainer(strategy, [*([] if rank.on_gpu else slow()), *callbacks], max_steps=steps)
    batch_size = _global_batch(rank) // rank.ranks
    trainer.fit(module, DataLoader(_Indices(_global_batch(rank) * (steps + 1)), batch_size=batch_size))


class _Light(LightningModule):
    """Negligible work: the processors are devices of known speed."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[:, None].float()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)
