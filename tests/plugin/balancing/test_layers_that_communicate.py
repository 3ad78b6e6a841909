"""Waiting for other ranks inside a forward or backward pass is not own time, so the shares are found all the same."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batch_norm_kernels import synchronised_on_cpu
from harness import RankPools
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, make_trainer

from lightning_hetero import HeteroDDPStrategy, LoadBalancer

BATCH_SIZE = 32
SECONDS_PER_SAMPLE = 0.001
FACTORS = (1.0, 2.0)
OPTIMUM = 43  # of 64 samples, for the faster of two ranks


class Work(torch.autograd.Function):
    """Takes known times in the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds / 3)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        time.sleep(2 * ctx.seconds / 3)
        return *slopes, None


class Summed(torch.autograd.Function):
    """Sums over ranks, and so do the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        work.wait()
        return total

    backward = forward


class OfALibrary(nn.SyncBatchNorm):
    """Has an autograd function of its own, and waits for its collectives itself."""

    def forward(self, batch: Tensor) -> Tensor:
        sums = torch.cat([batch.sum(0), batch.square().sum(0), batch.new_tensor([len(batch)])])
        total = Summed.apply(sums)  # type: ignore[no-untyped-call]
        features = batch.shape[1]
        mean = total[:features] / total[-1]
        variance = total[features:-1] / total[-1] - mean.square()
        return (batch - mean) / (variance + self.eps).sqrt() * self.weight + self.bias  # type: ignore[no-any-return]


class Normalising(SmallModule):
    """Works before each of its layers, two of which wait for the other ranks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        norm = OfALibrary if kind == "of a library" else nn.SyncBatchNorm
        layers = nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Linear(8, 8), norm(8), nn.Linear(8, 1)
        self.network = nn.Sequential(*layers).double()
        self.kind = kind

    def work(self, layers: nn.Module, rows: Tensor) -> Tensor:
        seconds = FACTORS[self.global_rank] * SECONDS_PER_SAMPLE * len(rows) / 3
        rows = Work.apply(rows, seconds)  # type: ignore[no-untyped-call]
        output: Tensor = layers(rows)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.ledger.append(batch[0].tolist())
        rows, network = batch[1].requires_grad_(), self.network
        assert isinstance(network, nn.Sequential)
        for layers in (network[:2], network[2:5]):
            if self.kind == "checkpointed":
                rows = checkpoint(self.work, layers, rows, use_reentrant=False)
            elif self.kind == "checkpointed, reentrant":
                rows = checkpoint(self.work, layers, rows, use_reentrant=True)
            else:
                rows = self.work(layers, rows)
        return nn.functional.mse_loss(self.work(network[5:], rows), batch[2])


def balanced(kind: str) -> tuple[list[int], list[float]]:
    model, balancer = Normalising(kind), LoadBalancer(tune_steps=10, verbose=False)
    accumulated = 2 if kind == "accumulated" else 1
    settings = {"max_steps": 20 // accumulated, "accumulate_grad_batches": accumulated}
    trainer = make_trainer(HeteroDDPStrategy(), dist.get_world_size(), [balancer], **settings)
    with synchronised_on_cpu():
        trainer.fit(model, DataLoader(Numbered(2 * BATCH_SIZE * 21), batch_size=BATCH_SIZE))
    return [len(samples) for samples in model.ledger], [time.seconds_per_sample for time in balancer.step_times]


@pytest.mark.parametrize("kind", ["torch's", "of a library", "accumulated", "checkpointed", "checkpointed, reentrant"])
def test_the_shares_of_a_pair_whose_layers_wait_for_each_other(ranks: RankPools, kind: str) -> None:
    """Both ranks take as long for every forward and every backward pass, because the faster one waits in them."""
    (fast, costs), (slow, _) = ranks.run(2, balanced, kind)
    assert fast[0] == slow[0] == BATCH_SIZE
    assert fast[-1] + slow[-1] == 2 * BATCH_SIZE
    assert abs(fast[-1] - OPTIMUM) <= 0.05 * OPTIMUM, costs
