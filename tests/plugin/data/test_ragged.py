"""Ragged last batches: no rank trains on a single sample, and multiples and limits hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from training import FEATURES, Numbered, make_trainer

from lightning_hetero import HeteroDDPStrategy


class Normalising(LightningModule):
    """Its batch normalisation raises on a single sample; keeps the samples of all ranks in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
        self.plans: list[tuple[int, ...]] = []
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [batch] if isinstance(batch[0], Tensor) else [part for part in batch if part is not None]
        part = self.trainer.strategy.training_slice  # type: ignore[attr-defined]
        self.plans.append(part.plan.samples)
        self.seen += [index.tolist() if part.samples else [] for index, _, _ in parts]
        return sum((self.network(x) - y).square().mean() for _, x, y in parts)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(strategy: dict[str, Any], sizes: Sequence[int], guarded: bool, batch_size: int = 4) -> list[Any]:
    """Return the plans and this rank's samples of each step, for each number of samples in ``sizes``."""
    found = []
    for size in sizes:
        drop_last = guarded and size % batch_size == 1  # as libraries do that avoid a batch of one
        loader = DataLoader(Subset(Numbered(200), range(size)), batch_size, shuffle=True, drop_last=drop_last)
        model = Normalising()
        make_trainer(HeteroDDPStrategy(**strategy), dist.get_world_size(), max_epochs=1).fit(model, loader)
        found.append((model.plans, model.seen))
    return found


SIZES = [*range(2, 20)]


@pytest.mark.parametrize(
    ("strategy", "guarded"),
    [
        ({"shares": [1, 3]}, True),
        ({"shares": [1, 1]}, True),
        ({"shares": [1, 3], "global_batch_size": 6}, True),  # no multiple of the batch size that the guard knows
        ({"shares": [1, 3], "batch_multiple": 2}, True),
        ({"shares": [1, 3], "max_batch_size": [4, 4]}, True),
    ],
)
def test_a_librarys_guard_against_batches_of_one_is_enough(
    ranks: RankPools, strategy: dict[str, Any], guarded: bool
) -> None:
    """Batch normalisation raises where a rank trains on one sample."""
    first, second = ranks.run(2, train, strategy, SIZES, guarded)
    for size, (plans, seen), (others_plans, others_seen) in zip(SIZES, first, second, strict=True):
        assert plans == others_plans
        multiple, cap = strategy.get("batch_multiple", 1), strategy.get("max_batch_size", [size, size])[0]
        for plan in plans:
            assert sum(n % multiple != 0 for n in plan) <= 1, (size, plan)
            assert max(plan) <= cap
        if size % 4 != 1:
            assert sorted(index for step in (*seen, *others_seen) for index in step) == list(range(size))


def train_two_loaders() -> list[tuple[int, ...]]:
    loaders = [DataLoader(Subset(Numbered(200), range(size)), 4) for size in (20, 14)]
    model = Normalising()
    strategy = HeteroDDPStrategy(shares=[1, 3], batch_multiple=2)
    make_trainer(strategy, 2, max_epochs=1).fit(model, CombinedLoader(loaders, "max_size"))
    return [tuple(len(index) for index in model.seen[2 * step : 2 * step + 2]) for step in range(2)]


def test_several_loaders_keep_multiples_together(ranks: RankPools) -> None:
    """The second step has 8 samples of one loader and 6 of the other: halves of each would be 4 and 3."""
    first, second = ranks.run(2, train_two_loaders)
    assert [first[0], second[0]] == [(2, 2), (6, 6)]
    assert {first[1], second[1]} == {(8, 6), (0, 0)}


class Auto(Normalising):
    def on_train_start(self) -> None:
        self.least: int = self.trainer.strategy.limits.min_samples  # type: ignore[attr-defined]


def least_of(batch_size: int, **strategy: Any) -> int:
    model = Auto()
    trainer = make_trainer(HeteroDDPStrategy(**strategy), 2, max_steps=1)
    trainer.fit(model, DataLoader(Numbered(16), batch_size))
    return model.least


def leasts() -> list[int]:
    return [least_of(4), least_of(2), least_of(4, shares=[1, 9]), least_of(4, shares=[1, 9], batch_multiple=4)]


def test_every_plan_leaves_two_samples_for_batch_normalisation(ranks: RankPools) -> None:
    assert ranks.run(2, leasts)[0] == [2, 2, 2, 2]
