"""Shares respect the memory of scripted devices, as predicted or as learned when it ran out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from batch_norm_kernels import synchronised_on_cpu
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from training import Numbered, SmallModule, assert_close, flat, make_trainer, reference_parameters

from lightning_hetero import HeteroDDPStrategy, LargestBatchFinder, LoadBalancer
from lightning_hetero.balance.batch.batch_solver import solve_batch
from lightning_hetero.balance.types import BatchLimits, BatchPlan, StepTime
from lightning_hetero.exceptions import RankFailedError, UnsupportedFeatureError
from lightning_hetero.hardware.memory import CudaMemoryMeter, MemoryUse
from lightning_hetero.testing import SlowDown

GB = 10**9
RESIDENT = 2 * GB
BYTES_PER_SAMPLE = GB // 4
BATCH_SIZE = 32
STEPS = 40


class Memory:
    """A device of known memory, of which a part is resident and each sample of a micro-batch takes more."""

    def __init__(self, total: int, tells: bool) -> None:
        self.total, self.tells = total, tells
        self.peak = self.highest = RESIDENT

    def restart(self) -> None:
        self.peak = RESIDENT

    def read(self) -> MemoryUse | None:
        return MemoryUse(RESIDENT, self.peak, self.total) if self.tells else None

    def allocate(self, samples: int) -> None:
        if RESIDENT + BYTES_PER_SAMPLE * samples > self.total:
            raise torch.OutOfMemoryError(f"{samples} samples")
        self.peak = max(self.peak, RESIDENT + BYTES_PER_SAMPLE * samples)
        self.highest = max(self.highest, self.peak)


class Scripted(HeteroDDPStrategy):
    """Devices with scripted memory."""

    def __init__(self, totals: list[int], tells: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.totals, self.tells = totals, tells

    def setup_environment(self) -> None:
        super().setup_environment()
        self.memory = Memory(self.totals[dist.get_rank()], self.tells)


class Allocating(SmallModule):
    """Takes memory for each micro-batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trainer.strategy.memory.allocate(len(batch[0]))  # type: ignore[attr-defined]
        return super().training_step(batch, batch_idx)


class CountHooks(Callback):
    """Counts the hooks that trained parameters carry in each step."""

    def __init__(self) -> None:
        self.hooks: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.hooks.append(sum(len(p._backward_hooks or {}) for p in pl_module.parameters()))


def train(totals: list[int], tells: bool, options: dict[str, Any]) -> tuple[list[BatchPlan], int, int, list[float]]:
    """Train with rank 1 twice as fast as rank 0.

    Returns:
        The plans, the highest peak of memory, the number of times that memory ran out, and the parameters.
    """
    model, balancer, strategy = Allocating(), LoadBalancer(), Scripted(totals, tells, **options)
    trainer = make_trainer(strategy, 2, [SlowDown([2.0, 1.0], 0.002), balancer], max_steps=STEPS)
    trainer.fit(model, DataLoader(Numbered(2 * BATCH_SIZE * (STEPS + 1)), batch_size=BATCH_SIZE, shuffle=True))
    assert isinstance(strategy.memory, Memory)
    plans = [plan for _, plan in balancer.changes]
    return plans, strategy.memory.highest, strategy.micro_batch_limits.times_out_of_memory, flat(model.network)


def assert_exact(parameters: list[float]) -> None:
    assert_close(parameters, reference_parameters(2 * BATCH_SIZE * (STEPS + 1), 2 * BATCH_SIZE, STEPS))


def test_no_plan_is_proposed_that_would_not_fit(ranks: RankPools) -> None:
    """The fast device has half the memory: its mini-batch is the largest that fits, and the plan is the best then."""
    budget = 0.92 * 12 * GB
    cap = int((budget - RESIDENT) / BYTES_PER_SAMPLE)
    best = solve_batch([StepTime(0, 0.004), StepTime(0, 0.002)], 64, BatchLimits((64, cap)), min_samples=1)
    assert best.samples[1] == cap < 43, "without the limit it would get 43"
    for plans, highest, times_out_of_memory, parameters in ranks.run(2, train, [24 * GB, 12 * GB], True, {}):
        assert plans[-1] == best
        assert all(RESIDENT + BYTES_PER_SAMPLE * plan.samples[1] <= budget for plan in plans)
        assert (highest <= 0.92 * 24 * GB, times_out_of_memory) == (True, 0)
        assert_exact(parameters)


def test_a_share_that_did_not_fit_is_lowered(ranks: RankPools) -> None:
    """Memory is unknown until it runs out, on rank 1 with 32 samples; 28 would have fitted, and 16 do."""
    outcomes = ranks.run(2, train, [24 * GB, 9 * GB], False, {})
    assert [outcome[2] for outcome in outcomes] == [0, 1]
    for plans, _, _, parameters in outcomes:
        assert plans[0] == plans[-1] == BatchPlan((48, 16))
        assert_exact(parameters)


def test_micro_batches_let_a_device_with_little_memory_keep_the_share_of_its_speed(ranks: RankPools) -> None:
    for plans, highest, times_out_of_memory, parameters in ranks.run(
        2, train, [6 * GB, 6 * GB], False, {"micro_batch_size": [16, 12]}
    ):
        assert abs(plans[-1].samples[1] - 43) <= 2
        assert (highest <= 6 * GB, times_out_of_memory) == (True, 0)
        assert_exact(parameters)


def test_a_global_batch_larger_than_all_memories_trains(ranks: RankPools) -> None:
    for plans, _, _, parameters in ranks.run(2, train, [5 * GB, 6 * GB], True, {}):
        assert_exact(parameters)
        assert sum(plans[-1].samples) == 64


def hooks_after(trial: str) -> list[int]:
    """Train with a finder, or with memory that runs out in the first step; return the hooks of each step."""
    finder, hooks = [LargestBatchFinder()] if trial == "search" else [], CountHooks()
    strategy = Scripted([24 * GB, 24 * GB if trial == "search" else 9 * GB], False)
    trainer = make_trainer(strategy, 2, [hooks, *finder, LoadBalancer()], max_steps=8)
    trainer.fit(Allocating(), DataLoader(Numbered(2 * BATCH_SIZE * 9), batch_size=BATCH_SIZE, shuffle=True))
    assert trial == "search" or strategy.micro_batch_limits.times_out_of_memory == dist.get_rank()
    return hooks.hooks


@pytest.mark.parametrize("trial", ["search", "shortage"])
def test_trials_and_repetitions_do_not_look_like_nested_passes(ranks: RankPools, trial: str) -> None:
    for hooks in ranks.run(2, hooks_after, trial):
        assert hooks[-3:] == [0, 0, 0], "an ordinary step runs Python for no parameter"
        assert max(hooks) == 4


def search(totals: list[int]) -> tuple[tuple[int, ...], list[float], int, BatchPlan]:
    model, finder, balancer, strategy = Allocating(), LargestBatchFinder(), LoadBalancer(), Scripted(totals, False)
    trainer = make_trainer(strategy, 2, [SlowDown([2.0, 1.0], 0.002), finder, balancer], max_steps=STEPS)
    trainer.fit(model, DataLoader(Numbered(2 * BATCH_SIZE * (STEPS + 1)), batch_size=BATCH_SIZE, shuffle=True))
    return finder.found, flat(model.network), strategy.micro_batch_limits.times_out_of_memory, balancer.changes[-1][1]


def test_the_largest_batch_of_each_rank_is_found_and_respected(ranks: RankPools) -> None:
    """12 GB hold 40 samples, and 24 GB hold the whole global batch; the search leaves no trace in the training."""
    for found, parameters, times_out_of_memory, plan in ranks.run(2, search, [24 * GB, 12 * GB]):
        assert (found, times_out_of_memory) == ((64, 40), 0)
        assert_exact(parameters)
        assert plan.samples == (24, 40), "the fast rank would get 43"


class Communicating(SmallModule):
    """Communicates in each step, in the way of its ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.steps = kind, 0
        self.metric = MeanMetric(dist_sync_on_step=kind == "metric of the module")
        self.hidden = [MeanMetric(dist_sync_on_step=True)]
        self.automatic_optimization = kind != "manual"
        if kind == "normalisation":
            self.norm = nn.SyncBatchNorm(5).double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        index, features, targets = batch
        if self.kind == "normalisation":
            features = self.norm(features)
        elif self.kind == "metric of the module":
            self.metric(features.mean())
        elif self.kind == "metric in a list":
            self.hidden[0](features.mean())
        elif self.kind == "computed metric":
            self.metric.update(features.mean())
            self.metric.compute()
        elif self.kind == "own collective":
            dist.all_reduce(features.mean())
        loss = super().training_step([index, features, targets], batch_idx)
        if self.kind == "manual":
            self.manual_backward(loss)
        return loss


def refused_search(kind: str) -> tuple[str, int]:
    model = Communicating(kind)
    # rank 1 would try more sizes than rank 0
    strategy = HeteroDDPStrategy(shares=[7, 1] if kind != "own collective" else [1, 1])
    trainer = make_trainer(strategy, 2, [LargestBatchFinder()], max_steps=3)
    with synchronised_on_cpu(), pytest.raises((UnsupportedFeatureError, RankFailedError)) as caught:
        trainer.fit(model, DataLoader(Numbered(128), batch_size=16))
    return str(caught.value), model.steps


@pytest.mark.parametrize(
    ("kind", "reason", "steps"),
    [
        ("normalisation", "synchronised batch normalisation communicates", 0),
        ("metric of the module", "a metric with `dist_sync_on_step=True` communicates", 0),
        ("manual", "only automatic optimisation", 0),
        ("metric in a list", "must not communicate", 2),
        ("computed metric", "must not communicate", 2),
        ("own collective", "must not communicate", 2),
    ],
)
def test_a_search_in_steps_that_communicate_is_refused(ranks: RankPools, kind: str, reason: str, steps: int) -> None:
    """The ranks run different numbers of trials, so they would wait for one another, and for good."""
    for message, run in ranks.run(2, refused_search, kind, timeout_s=60.0):
        assert "`LargestBatchFinder` runs" in message
        assert reason in message
        assert run <= steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_reports_its_memory() -> None:
    meter = CudaMemoryMeter(torch.device("cuda", 0))
    meter.restart()
    before = meter.read()
    kept = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    del kept
    after = meter.read()
    assert after.peak_bytes - before.peak_bytes >= 2**28
    assert after.available_bytes > 2**28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_shortage_of_memory_is_survived() -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Hungry(LightningModule):
        """Takes a fifth of the device for each sample, until the backward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            free = torch.cuda.mem_get_info()[1] // 5
            held = self.layer(batch[0]).expand(-1, free // 4).clone()
            loss: torch.Tensor = held.square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    strategy = HeteroDDPStrategy()
    trainer = Trainer(
        accelerator="gpu", devices=1, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False
    )
    trainer.fit(Hungry(), DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=8))
    assert strategy.micro_batch_limits.times_out_of_memory > 0
