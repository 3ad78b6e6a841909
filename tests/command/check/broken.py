"""The checks, each beside a fault that it must find; ranks run these instead of the checks' own functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch.distributed as dist

from lightning_hetero import HeteroDDPStrategy, LargestBatchFinder, LoadBalancer
from lightning_hetero.balance.types import StepTiming
from lightning_hetero.command.check.children import exactness, failure, memory, pipeline, speed
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.finding import Finding
from lightning_hetero.distributed.step_timer import StepTimer

PLUGIN = "lightning_hetero.plugin"


def exact(rank: Rank) -> Finding:
    """Every rank's loss has the same weight, whatever its share."""
    with mock.patch.object(HeteroDDPStrategy, "_weight_of_loss", return_value=1.0):
        return exactness.exact(rank)


def synchronised_batch_norm(rank: Rank) -> Finding:
    """A rank without samples takes part in the statistics."""
    with mock.patch(f"{PLUGIN}.ddp.batch_scope.stand_in", return_value=nullcontext()):
        return exactness.synchronised_batch_norm(rank)


def shards(rank: Rank) -> Finding:
    """Each rank clips by the norm of its own parts."""
    with mock.patch("lightning_hetero.distributed.shards.reductions.dist.all_reduce"):
        return exactness.shards(rank)


def own_time(rank: Rank) -> Finding:
    """Waiting counts as own time."""
    with timed(lambda t: StepTiming(t.samples, t.own_s + t.waiting_s, 0.0)):
        return speed.own_time(rank)


def balancer_cost(rank: Rank) -> Finding:
    """The balancer takes ten milliseconds in every step."""
    ordinary = LoadBalancer.on_train_batch_end

    def slow(*args: Any) -> None:
        time.sleep(1e-2)
        ordinary(*args)

    with mock.patch.object(LoadBalancer, "on_train_batch_end", slow):
        return speed.balancer_cost(rank)


def equal_ranks(rank: Rank) -> Finding:
    """Rank 0 is measured as if it took longer."""
    with rank_zero_seems_slow():
        return speed.equal_ranks(rank)


def best_shares(rank: Rank) -> Finding:
    with rank_zero_seems_slow():
        return speed.best_shares(rank)


@contextmanager
def timed(changed: Callable[[StepTiming], StepTiming]) -> Iterator[None]:
    """Change what each step is measured to have taken."""
    ordinary = StepTimer._timing
    with mock.patch.object(StepTimer, "_timing", lambda timer, step: changed(ordinary(timer, step))):
        yield


def rank_zero_seems_slow() -> Any:
    return timed(lambda t: StepTiming(t.samples, t.own_s * (2.5 if dist.get_rank() == 0 else 1.0), t.waiting_s))


def out_of_memory(rank: Rank) -> Finding:
    """The error of a lack of memory is taken for another."""
    with mock.patch(f"{PLUGIN}.ddp.micro_batches.is_out_of_memory", return_value=False):
        return memory.out_of_memory(rank)


def out_of_memory_in_hook(rank: Rank) -> Finding:
    with nobody_is_named():
        return memory.out_of_memory_in_hook(rank)


def largest_batch(rank: Rank) -> Finding:
    """Every size seems to fit."""
    with mock.patch.object(LargestBatchFinder, "_fits", return_value=True):
        return memory.largest_batch(rank)


def float32(rank: Rank) -> Finding:
    """Each micro-batch has the weight of a whole batch."""
    with heavy_micro_batches():
        return pipeline.float32(rank)


def bf16(rank: Rank) -> Finding:
    with heavy_micro_batches():
        return pipeline.bf16(rank)


def heavy_micro_batches() -> Any:
    return mock.patch(f"{PLUGIN}.pipeline.strategy.loss_weights", lambda parts, *_, **__: [1.0] * len(parts))


def exception(rank: Rank) -> Finding:
    with nobody_is_named():
        return failure.exception(rank)


def kill(rank: Rank) -> Finding:
    with nobody_is_named():
        return failure.kill(rank)


def stop(rank: Rank) -> Finding:
    with nobody_is_named():
        return failure.stop(rank)


@contextmanager
def nobody_is_named() -> Iterator[None]:
    """Ranks neither say why they fail nor ask who does not answer."""
    with (
        mock.patch(f"{PLUGIN}.common.base_strategy.announce"),
        mock.patch(f"{PLUGIN}.ddp.oom_recovery.announce"),
        mock.patch(f"{PLUGIN}.common.base_strategy.why_communication_failed", return_value=None),
        mock.patch("lightning_hetero.distributed.group.failure.why_communication_failed", return_value=None),
    ):
        yield
