"""What depends on how a batch is divided is named, once, with the way out; and a stand-in is left out of statistics."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.plugin.common.inexact import inexact_parts
from lightning_hetero.plugin.ddp.stand_in import stand_in


def test_batch_normalisation_is_named_unless_it_is_synchronised() -> None:
    strategy = HeteroDDPStrategy()
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    (part,) = inexact_parts(plain, strategy)
    assert part.startswith("batch normalisation ('1' and others), because it takes its statistics from each rank's")
    assert part.endswith("use Trainer(sync_batchnorm=True)")
    assert inexact_parts(nn.SyncBatchNorm.convert_sync_batchnorm(plain), strategy) == []


def test_post_local_sgd_is_named() -> None:
    state = PostLocalSGDState(None, None, start_localSGD_iter=5)
    (part,) = inexact_parts(nn.Linear(2, 2), HeteroDDPStrategy(ddp_comm_state=state))
    assert part.startswith("post-local SGD, because it averages the ranks' parameters as if")


class Contrastive(SmallModule):
    """Compares its samples with those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, features, targets = batch
        everyone = self.all_gather(self.network(self.norm(features)), sync_grads=True)
        assert isinstance(everyone, Tensor)
        self.ledger.append(index.tolist())
        loss: Tensor = (everyone.mean() - targets).square().mean()
        self.log("loss", loss)
        return loss


def train(hetero: bool) -> tuple[list[float], list[str], int]:
    model = Contrastive()
    trainer = make_trainer(HeteroDDPStrategy() if hetero else DDPStrategy(), dist.get_world_size(), max_steps=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(Numbered(48), batch_size=4))
    said = [str(w.message) for w in caught if "cannot be exact" in str(w.message)]
    return flat(model), said, max(len(batch) for batch in model.ledger)


def test_a_loss_over_gathered_samples_trains_as_under_ddp_with_equal_shares(ranks: RankPools) -> None:
    """The tuning, which varies the shares, is given up before it begins."""
    hetero, plain = ranks.run(2, train, True), ranks.run(2, train, False)
    assert [parameters for parameters, _, _ in hetero] == [parameters for parameters, _, _ in plain]
    assert [largest for _, _, largest in hetero] == [4, 4]
    said = hetero[0][1]
    assert len(said) == 2
    assert "batch normalisation ('norm')" in said[0]
    assert "in-batch negatives" in said[1]
    assert hetero[1][1] == plain[0][1] == []


# ---- synchronised batch normalisation, whose own kernels need a GPU --------------------------------------------------


class Synchronised(nn.SyncBatchNorm):
    """Does on CPU what torch does on GPUs: sums, squares and counts of all ranks, an empty batch counting nothing."""

    def forward(self, batch: Tensor) -> Tensor:
        sums = torch.cat([batch.sum(0), batch.square().sum(0), batch.new_tensor([len(batch)])])
        total = Summed.apply(sums)  # type: ignore[no-untyped-call]
        features = batch.shape[1]
        mean = total[:features] / total[-1]
        variance = total[features:-1] / total[-1] - mean.square()
        normalised: Tensor = (batch - mean) / (variance + self.eps).sqrt() * self.weight + self.bias
        return normalised


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    backward = forward


class Normalising(SmallModule):
    norm: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.norm = Synchronised(5).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step([batch[0], self.norm(batch[1]), batch[2]], batch_idx)
        return loss


def train_normalising(shares: list[float]) -> list[float]:
    model = Normalising()
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), dist.get_world_size(), max_steps=20)
    loader = DataLoader(Numbered(51), batch_size=12 // dist.get_world_size())
    with mock.patch.object(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle"):  # refuses CPUs
        trainer.fit(model, loader)
    return flat(model)


def test_a_stand_in_is_left_out_of_synchronised_statistics(ranks: RankPools) -> None:
    """The last batch has three samples for four ranks: one stands in with two of them, which would shift the mean."""
    (expected,) = ranks.run(1, train_normalising, [1])
    for parameters in ranks.run(4, train_normalising, [1, 2, 4, 1]):
        comparison = "single process, synchronised batch normalisation (CPU imitation)"
        assert_close(parameters, expected, comparison=comparison)


def test_hooks_are_gone_after_a_stand_in() -> None:
    layer = nn.SyncBatchNorm(3)
    holder = SmallModule()
    holder.layer = layer
    holder._trainer = make_holder()
    with stand_in(holder):
        assert layer._forward_pre_hooks
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def make_holder() -> Any:
    class Holder:
        _results = None

    return Holder()
