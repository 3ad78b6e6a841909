"""Collectives that a step calls itself, whatever their name: the training of ddp, or an error before it is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed import all_gather as gather_under_another_name
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError

SIZE = 21  # a ragged last batch, which DDP completes
Step = Callable[[Tensor], Tensor]


class Gather(torch.autograd.Function):
    """As the libraries of self-supervised learning write it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        gathered = [torch.zeros_like(rows) for _ in range(dist.get_world_size())]
        gather_under_another_name(gathered, rows)
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        stacked = torch.stack(gradients)
        dist.all_reduce(stacked)
        return stacked[dist.get_rank()]


def contrast(rows: Tensor) -> Tensor:
    """Return a loss that depends on all pairs of rows."""
    return (rows @ rows.T).logsumexp(1).mean()


def of_a_library(rows: Tensor) -> Tensor:
    return contrast(torch.cat(Gather.apply(rows)))  # type: ignore[no-untyped-call]


def of_autograd(rows: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_gather

    return contrast(torch.cat(all_gather(rows)))


def into_tensor(rows: Tensor) -> Tensor:
    gathered = rows.new_zeros(dist.get_world_size() * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(gathered, rows.detach())
    return (rows @ gathered.T).logsumexp(1).mean()


def covariance(rows: Tensor) -> Tensor:
    """As Barlow Twins: no shape tells how many rows a rank has."""
    products = (rows.T @ rows) / len(rows)
    summed = products.detach().clone()
    dist.all_reduce(summed)
    return (products * summed).sum()


def functionally(rows: Tensor) -> Tensor:
    products = ((rows.T @ rows) / len(rows)).detach()
    loss: Tensor = (rows.mean(0) @ functional.all_reduce(products, "sum", [0, 1])).sum()
    return loss


compiled = torch.compile(covariance, backend="eager")


def in_a_compiled_function(rows: Tensor) -> Tensor:
    loss: Tensor = compiled(rows)
    return loss


def in_a_ring(rows: Tensor) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    other = torch.zeros_like(rows)
    for work in dist.batch_isend_irecv([
        dist.P2POp(dist.isend, rows.detach(), (rank + 1) % world),
        dist.P2POp(dist.irecv, other, (rank - 1) % world),
    ]):  # fmt: skip
        work.wait()
    return (rows @ other.T).logsumexp(1).mean()


def in_a_group(rows: Tensor) -> Tensor:
    group = dist.new_group(list(range(dist.get_world_size())))
    mean = rows.detach().mean(0)
    dist.all_reduce(mean, group=group)
    return (rows @ mean).square().mean()


def by_torchmetrics(rows: Tensor) -> Tensor:
    from torchmetrics.utilities.distributed import gather_all_tensors

    mean = torch.stack(gather_all_tensors(rows.detach().mean(0))).mean(0)
    return (rows @ mean).square().mean()


def in_a_group_of_one(rows: Tensor) -> Tensor:
    """Only some ranks call it."""
    mean = rows.detach().mean(0)
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    if dist.get_rank() == 1:
        dist.all_reduce(mean, group=groups[1])
    return (rows @ mean).square().mean()


STEPS: dict[str, Step] = {
    "of a library": of_a_library,
    "of autograd": of_autograd,
    "into a tensor": into_tensor,
    "covariance": covariance,
    "functional": functionally,
    "compiled": in_a_compiled_function,
    "ring": in_a_ring,
    "group": in_a_group,
    "torchmetrics": by_torchmetrics,
    "some ranks": in_a_group_of_one,
}


class Combines(SmallModule):
    """Its loss combines the ranks' samples."""

    def __init__(self, kind: str, first_step: int = 0) -> None:
        super().__init__()
        self.kind, self.first_step = kind, first_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        *layers, last = self.network.children()
        rows = nn.Sequential(*layers)(batch[1])
        own: Tensor = last(rows).square().mean()
        if self.trainer.global_step < self.first_step:
            return own
        return own + 0.1 * STEPS[self.kind](rows)


def train(
    strategy: Any, module: LightningModule, *callbacks: Callback, steps: int = 7
) -> tuple[list[float], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        trainer = make_trainer(strategy, dist.get_world_size(), callbacks, max_steps=steps)
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(Numbered(SIZE), batch_size=4, shuffle=True))
    return flat(module), [str(w.message) for w in caught if "the shares stay equal" in str(w.message)]


def compare(kind: str) -> tuple[list[float], list[float], list[str], bool]:
    of_ddp, _ = train("ddp", Combines(kind))
    strategy = HeteroDDPStrategy()
    found, messages = train(strategy, Combines(kind))
    return found, of_ddp, messages, strategy.plan_schedule is None


@pytest.mark.parametrize("kind", STEPS)
def test_the_shares_stay_equal_and_the_training_is_that_of_ddp(ranks: RankPools, kind: str) -> None:
    results = ranks.run(2, compare, kind)
    for found, of_ddp, _, stays_equal in results:
        assert_close(found, of_ddp)
        assert stays_equal
    (message,) = results[0][2]
    assert "collectives that a training step calls itself (`" in message
    assert "test_own_collectives.py:" in message or kind == "compiled"


def unequally(kind: str, first_step: int) -> tuple[str, int]:
    module = Combines(kind, first_step)
    strategy = HeteroDDPStrategy(shares=[1, 3])
    with pytest.raises(UnsupportedFeatureError) as caught:
        train(strategy, module)
    return str(caught.value), module.trainer.global_step


@pytest.mark.parametrize(
    ("kind", "first_step"), [("of a library", 0), ("covariance", 1), ("ring", 0), ("functional", 1)]
)
def test_unequal_shares_are_refused_before_a_step_is_wrong(ranks: RankPools, kind: str, first_step: int) -> None:
    """Also where a step calls collectives only now and then; every rank says why, and none waits."""
    for message, step in ranks.run(2, unequally, kind, first_step, timeout_s=60):
        assert step == first_step
        assert "must not call collectives itself" in message
        assert "test_own_collectives.py:" in message
        assert "[2, 6] samples" in message


class InHooks(SmallModule):
    """Combines the ranks' samples in one of its hooks, or through the strategy."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.where == "all_gather":
            products = (batch[1].T @ batch[1]) / len(batch[1])
            loss = loss * (1 + self.all_gather(products).mean())  # type: ignore[union-attr]
        return loss

    def combine(self, where: str) -> None:
        if self.where == where:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    def on_before_backward(self, loss: Tensor) -> None:
        self.combine("on_before_backward")
        if self.where == "before":
            dist.all_reduce(loss.detach().clone())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.combine("on_before_optimizer_step")


def in_hooks(where: str) -> tuple[str, list[str], bool]:
    strategy = HeteroDDPStrategy()
    _, messages = train(strategy, InHooks(where), steps=4)
    with pytest.raises(UnsupportedFeatureError) as caught:
        train(HeteroDDPStrategy(shares=[1, 3]), InHooks(where), steps=4)
    return str(caught.value), messages, strategy.plan_schedule is None


@pytest.mark.parametrize("where", ["all_gather", "before", "on_before_optimizer_step"])
def test_hooks_and_the_strategy_are_watched_too(ranks: RankPools, where: str) -> None:
    for error, _, stays_equal in ranks.run(2, in_hooks, where, timeout_s=60):
        assert "must not call collectives itself" in error
        assert stays_equal


class CountsAndWaits(SmallModule):
    """Calls collectives that are right for any division."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        samples = torch.tensor(len(batch[0]))
        dist.all_reduce(samples)
        dist.barrier()
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, "x" * len(batch[0]))
        self.total = (int(samples), sum(map(len, texts)))
        return super().training_step(batch, batch_idx)


def count() -> tuple[list[float], list[float], Any]:
    module = CountsAndWaits()
    found, messages = train(HeteroDDPStrategy(shares=[1, 3]), module, steps=2)
    assert not messages
    return found, train("ddp", SmallModule(), steps=2)[0], module.total


def test_counts_texts_and_barriers_pass(ranks: RankPools) -> None:
    for found, of_ddp, total in ranks.run(2, count):
        assert_close(found, of_ddp)
        assert total == (8, 8)


class Afterwards(Callback):
    """Averages something over ranks at the end of a batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].clone()
        dist.all_reduce(loss)


def average_in_a_callback() -> tuple[list[str], bool]:
    strategy = HeteroDDPStrategy()
    _, messages = train(strategy, SmallModule(), Afterwards())
    return messages, strategy.plan_schedule is None


def test_callbacks_are_watched_too(ranks: RankPools) -> None:
    (messages, stays_equal), (_, of_peer) = ranks.run(2, average_in_a_callback)
    assert stays_equal
    assert of_peer
    assert "`all_reduce`" in messages[0]


class GathersInValidation(SmallModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        of_a_library(batch[1].float())

    def on_validation_epoch_end(self) -> None:
        dist.all_reduce(torch.ones(2))


class AveragesInValidation(SmallModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        dist.all_reduce(batch[1].mean())


def validate(module: LightningModule, shares: Any, size: int) -> tuple[str, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        trainer = make_trainer(HeteroDDPStrategy(shares=shares), dist.get_world_size(), limit_val_batches=1.0)
        warnings.simplefilter("always")
        error = ""
        try:
            trainer.validate(module, DataLoader(Numbered(size), batch_size=4), verbose=False)
        except UnsupportedFeatureError as raised:
            error = str(raised)
    return error, [str(w.message) for w in caught if "counts ranks" in str(w.message)]


def validate_in_several_ways() -> list[tuple[str, list[str]]]:
    return [
        validate(GathersInValidation(), "auto", 16),
        validate(GathersInValidation(), [1, 3], 16),
        validate(AveragesInValidation(), [1, 3], 16),
    ]


def test_evaluation_steps_may_gather_equal_batches_only(ranks: RankPools) -> None:
    (equal, unequal, average), *_ = ranks.run(2, validate_in_several_ways, timeout_s=60)
    assert equal == ("", [])
    assert "`all_gather` in" in unequal[0]
    assert "[2, 6] samples" in unequal[0]
    assert not average[0]
    (message,) = average[1]
    assert "`all_reduce` in" in message


def first_with_collectives_then_without() -> list[bool]:
    strategy = HeteroDDPStrategy()
    trainer = make_trainer(strategy, dist.get_world_size(), max_steps=4)
    stays_equal: list[bool] = []
    for module in (Combines("some ranks"), SmallModule()):
        trainer.fit_loop.epoch_loop.max_steps = 4 * (len(stays_equal) + 1)
        trainer.fit(module, DataLoader(Numbered(SIZE), batch_size=4))
        stays_equal.append(strategy.plan_schedule is None)
    return stays_equal


def test_what_a_module_calls_says_nothing_about_the_next_one(ranks: RankPools) -> None:
    assert ranks.run(2, first_with_collectives_then_without, timeout_s=60) == [[True, False]] * 2
