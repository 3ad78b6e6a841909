"""Samplers of the user, and callbacks that draw batches, under ``hetero_ddp``: every rank sees the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from plugin.ddp.test_exactness import BATCH_SIZE, Hetero, Run, assert_parameters, ddp, train
from torch.utils.data import DataLoader, DistributedSampler, Sampler, WeightedRandomSampler
from training import Numbered, SmallModule, flat, make_trainer, reference_parameters


def train_with_own_sampler(make_strategy: Callable[[], Any]) -> Run:
    data = Numbered(46)
    model = SmallModule()
    trainer = make_trainer(make_strategy(), dist.get_world_size(), max_steps=20)
    sampler: DistributedSampler[Any] = DistributedSampler(data, shuffle=True, seed=11)
    trainer.fit(model, DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler))
    return Run(flat(model.network), model.ledger, 0.0)


def test_the_users_own_distributed_sampler_keeps_its_order(ranks: RankPools) -> None:
    plain = ranks.run(2, train_with_own_sampler, ddp)
    assert_parameters(ranks.run(2, train_with_own_sampler, Hetero([5, 2])), plain[0].parameters)


class Dropping(SmallModule):
    """Draws from the global random generator as often as it has samples, so that the ranks' generators part."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        torch.rand(len(batch[0]))
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        return loss


class GlobalShuffle(Sampler[int]):
    """A permutation drawn from the global random generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


def train_with_random_sampler(kind: str, make_strategy: Callable[[], Any]) -> Run:
    model = Dropping()
    trainer = make_trainer(make_strategy(), dist.get_world_size(), max_steps=18)
    sampler: Sampler[int] = GlobalShuffle(46)
    if kind == "seeded":
        sampler = WeightedRandomSampler(list(range(1, 47)), 46, generator=torch.Generator().manual_seed(5))
    trainer.fit(model, DataLoader(Numbered(46), batch_size=BATCH_SIZE, sampler=sampler))
    return Run(flat(model.network), model.ledger, 0.0)


def test_a_users_sampler_has_one_order_for_all_ranks(ranks: RankPools) -> None:
    """With a generator of its own it is that of ddp; drawing from the global one it is at least the same on all."""
    plain = ranks.run(2, train_with_random_sampler, "seeded", ddp)
    assert_parameters(ranks.run(2, train_with_random_sampler, "seeded", Hetero([5, 2])), plain[0].parameters)
    runs = ranks.run(2, train_with_random_sampler, "global", Hetero([5, 2]))
    for epoch in range(3):
        seen = [index for run in runs for step in run.ledger[6 * epoch : 6 * epoch + 6] for index in step]
        assert sorted(seen) == list(range(46))


class Peek(Callback):
    """Looks at a batch of its own in the midst of an epoch, on one rank only, as image loggers do."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            assert trainer.train_dataloader is not None
            next(iter(trainer.train_dataloader))


def train_with_peek(own_sampler: bool) -> Run:
    loader: dict[str, Any] = {"shuffle": False, "sampler": GlobalShuffle(46)} if own_sampler else {"shuffle": True}
    return train(Hetero([5, 2]), 46, 20, [Peek()], loader)


def test_a_callback_may_look_at_batches(ranks: RankPools) -> None:
    assert_parameters(ranks.run(2, train_with_peek, False, timeout_s=60), reference_parameters(46, 8, 20))
    runs = ranks.run(2, train_with_peek, True, timeout_s=60)
    assert sorted(index for run in runs for step in run.ledger[:6] for index in step) == list(range(46))
