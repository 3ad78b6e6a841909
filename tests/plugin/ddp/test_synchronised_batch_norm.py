"""Torch's own synchronised batch normalisation on CPU ranks, with ranks that have no samples."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batch_norm_kernels import synchronised_on_cpu
from harness import RankPools
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.plugin.ddp.stand_in import stand_in

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Holder:
    _results = None


def normalised(dtype: torch.dtype, shape: tuple[int, ...], autocast: bool, *, alone: bool) -> list[Tensor]:
    """Return output, gradients and running statistics of rank 0; the other ranks stand in unless it is alone."""
    # every rank makes the group
    group = dist.new_group([0]) if alone else dist.group.WORLD
    if alone and dist.get_rank():
        return []
    generator = torch.Generator().manual_seed(1)
    module: Any = SmallModule()
    module._trainer = Holder()
    module.norm = nn.SyncBatchNorm(shape[1], process_group=group)
    if not autocast:
        module.norm.to(dtype)
    batch = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    slopes = torch.randn(shape, generator=generator).to(dtype)
    norm = module.norm
    with synchronised_on_cpu(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if dist.get_rank():
            with stand_in(module):
                output = norm(batch)
                output.backward(slopes)
            assert output.equal(batch)
        else:
            # in a group of one, the layer would use other kernels, which round differently
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.momentum)
            output = SyncBatchNorm.apply(batch, norm.weight, norm.bias, *statistics, group, 1) if alone else norm(batch)
            output.backward(slopes)
    assert output.dtype == dtype
    assert batch.grad is not None
    return [output.detach(), batch.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def normalised_with_and_without_peers(number: int, shape: tuple[int, ...], autocast: bool) -> list[tuple[float, str]]:
    dtype = DTYPES[number]
    beside, alone = (normalised(dtype, shape, autocast, alone=alone) for alone in (False, True))
    if dist.get_rank():
        return []
    return [(float((a - b).abs().max()), str(a.dtype)) for a, b in zip(beside, alone, strict=True)]


@pytest.mark.parametrize("number", range(len(DTYPES)))
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 2)])
def test_a_rank_without_samples_sends_what_its_peers_expect(
    ranks: RankPools, number: int, shape: tuple[int, ...]
) -> None:
    """Statistics of half precision are float32, so bytes of another type would be read, or the ranks would hang."""
    found, *_ = ranks.run(3, normalised_with_and_without_peers, number, shape, False, timeout_s=60.0)
    assert [difference for difference, _ in found] == [0.0] * 6


def test_a_rank_without_samples_under_autocast(ranks: RankPools) -> None:
    found, *_ = ranks.run(2, normalised_with_and_without_peers, 0, (6, 3), True, timeout_s=60.0)
    assert [difference for difference, _ in found] == [0.0] * 6
    assert found[-1][1] == "torch.float32"


def running_statistics() -> list[list[float]]:
    """Return the statistics of a layer of all ranks and of a layer of each rank, after a step of rank 0's samples."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    module: Any = SmallModule()
    module._trainer = Holder()
    module.norm, module.own = nn.SyncBatchNorm(3), nn.SyncBatchNorm(3, process_group=groups[dist.get_rank()])
    batch = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with synchronised_on_cpu():
        if dist.get_rank():
            with stand_in(module):
                module.norm(batch).sum().backward()
                module.own.running_mean += 1.0
        else:
            module.norm(batch).sum().backward()
    return [[*layer.running_mean.tolist(), *layer.running_var.tolist()] for layer in (module.norm, module.own)]


def test_a_rank_without_samples_has_the_running_statistics_of_its_peers(ranks: RankPools) -> None:
    """Validation uses them before the next step, in which DDP would send those of rank 0."""
    (joint, own), *others = ranks.run(3, running_statistics, timeout_s=60.0)
    assert joint != own == [0.0] * 3 + [1.0] * 3
    assert others == [[joint, own]] * 2, "what ranks have for themselves is restored"


class Normalising(SmallModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 8), nn.SyncBatchNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(precision: str, shares: list[float]) -> list[float]:
    torch.manual_seed(0)
    world_size = dist.get_world_size()
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), world_size, max_steps=20, precision=precision)
    torch.manual_seed(0)
    model = Normalising()
    if precision != "64-true":
        model.float()
    with synchronised_on_cpu():
        trainer.fit(model, DataLoader(Single(precision), batch_size=12 // world_size))
    return flat(model)


class Single(Numbered):
    """Samples in the precision of the model."""

    def __init__(self, precision: str) -> None:
        super().__init__(51)
        if precision != "64-true":
            self.features, self.targets = self.features.float(), self.targets.float()


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-10), ("bf16-mixed", 0.02)])
def test_ragged_batches_train_as_on_one_device(ranks: RankPools, precision: str, tolerance: float) -> None:
    """The last batch of each epoch has three samples for four ranks; bfloat16 rounds to one part in 256."""
    (expected,) = ranks.run(1, train, precision, [1])
    for parameters in ranks.run(4, train, precision, [1, 2, 4, 1], timeout_s=90.0):
        comparison = f"single process, torch's synchronised batch normalisation, {precision}"
        assert_close(parameters, expected, tolerance, comparison=comparison)


# ---- compiled layers, which ignore hooks that are added later ------------------------------------------------------


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        total = slopes[0].clone()
        dist.all_reduce(total)
        return total


class Captured(nn.SyncBatchNorm):
    """Can be compiled with its collectives, which torch's own layer cannot, because it selects ranks with samples."""

    def forward(self, batch: Tensor) -> Tensor:
        count = torch.ones_like(batch[:, 0]).sum()
        total = Summed.apply(torch.cat([batch.sum(0), batch.square().sum(0), count[None]]))  # type: ignore[no-untyped-call]
        features = batch.shape[1]
        mean = total[:features] / total[-1]
        variance = total[features:-1] / total[-1] - mean.square()
        return (batch - mean) / (variance + self.eps).sqrt() * self.weight + self.bias  # type: ignore[no-any-return]


def normalised_by_compiled_layers(kind: str) -> float:
    """Return how far rank 0 is from normalising its own samples, beside a rank that stands in."""
    torch._dynamo.reset()
    module: Any = SmallModule()
    module._trainer = Holder()
    module.norm = (Captured if kind == "captured" else nn.SyncBatchNorm)(3).double()
    network: Any = torch.compile(nn.Sequential(nn.Identity(), module.norm), backend="eager")
    with synchronised_on_cpu():
        for stands_in in (False, bool(dist.get_rank())):  # compiled before any hook
            batch = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
            with stand_in(module) if stands_in else nullcontext():
                output = network(batch)
                output.square().sum().backward()
    assert not stands_in or output.equal(batch)
    return (
        0.0 if stands_in else float((output - nn.functional.batch_norm(batch, None, None, training=True)).abs().max())
    )


@pytest.mark.parametrize("kind", ["captured", "torch's"])
def test_a_rank_without_samples_is_left_out_where_layers_are_compiled(ranks: RankPools, kind: str) -> None:
    for difference in ranks.run(2, normalised_by_compiled_layers, kind, timeout_s=60.0):
        assert difference < 1e-10
