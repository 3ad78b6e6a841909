"""``hetero_ddp`` trains as ``ddp`` and as a single process do: same samples, same parameters, same metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import THOROUGH
from torch.utils.data import DataLoader
from training import (
    TOLERANCE,
    Numbered,
    SmallModule,
    flat,
    largest_difference,
    make_trainer,
    reference_batches,
    reference_parameters,
    small_network,
)

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.distributed.collective_watch import CollectiveWatch

BATCH_SIZE = 4


@dataclass
class Run:
    """What a training produced on one rank."""

    parameters: list[float]
    ledger: list[list[int]]
    loss: float


class ChangeAt(Callback):
    """Follows another plan from a step on, as the balancer would have it."""

    def __init__(self, changes: Mapping[int, Sequence[int]]) -> None:
        self.changes = changes

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        samples = self.changes.get(trainer.fit_loop.total_batch_idx + 1)
        if samples is not None:
            assert isinstance(trainer.strategy, HeteroDDPStrategy)
            trainer.strategy.change_plan(trainer.fit_loop.total_batch_idx + 1, BatchPlan(tuple(samples)))


def train(
    make_strategy: Callable[[], Any],
    size: int,
    steps: int,
    callbacks: Sequence[Callback] = (),
    loader: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    module: type[SmallModule] = SmallModule,
) -> Run:
    model = module()
    fit = make_trainer(make_strategy(), dist.get_world_size(), callbacks, **({"max_steps": steps} | (trainer or {})))
    fit.fit(model, DataLoader(Numbered(size), batch_size=BATCH_SIZE, **({"shuffle": True} | (loader or {}))))
    return Run(flat(model.network), model.ledger, float(fit.callback_metrics["loss"]))


@dataclass(frozen=True)
class Hetero:
    """Makes the strategy on the rank; a closure could not be sent there."""

    shares: Any = "auto"
    arguments: tuple[tuple[str, Any], ...] = ()
    cls: type[HeteroDDPStrategy] = HeteroDDPStrategy

    def __call__(self) -> HeteroDDPStrategy:
        return self.cls(shares=self.shares, **dict(self.arguments))


def ddp() -> str:
    return "ddp"


def assert_parameters(runs: Sequence[Run], expected: Sequence[float]) -> None:
    for rank, run in enumerate(runs):
        found = largest_difference(run.parameters, expected)
        assert found < TOLERANCE, f"rank {rank} differs from the reference by {found}"


def assert_every_sample_once(runs: Sequence[Run], size: int) -> None:
    steps = len(runs[0].ledger)
    batch = BATCH_SIZE * len(runs)
    expected = reference_batches(size, batch, epochs=steps // (size // batch) + 1)
    for step in range(steps):
        seen = [index for run in runs for index in run.ledger[step]]
        assert len(seen) == len(set(seen)), f"a sample is repeated in step {step}: {seen}"
        assert set(seen) == expected[step], f"step {step} is not the global batch of ddp"


@pytest.mark.parametrize(
    ("shares", "size"),
    [([1, 3], 46), ([3, 1], 46), ([5, 2], 46), ([1, 2, 4], 45)],
)
def test_fixed_shares_train_as_ddp_and_as_a_single_process(ranks: RankPools, shares: list[float], size: int) -> None:
    """Shuffled, 20 steps over several epochs, and the last batch of an epoch does not divide."""
    world_size = len(shares)
    hetero = ranks.run(world_size, train, Hetero(shares), size, 20)
    plain = ranks.run(world_size, train, ddp, size, 20)
    assert_parameters(plain, reference_parameters(size, BATCH_SIZE * world_size, 20))
    assert_parameters(hetero, reference_parameters(size, BATCH_SIZE * world_size, 20))
    assert_parameters(hetero, plain[0].parameters)
    assert_every_sample_once(hetero, size)
    assert len({len(run.ledger[0]) for run in hetero}) > 1
    for run in hetero:
        assert run.loss == pytest.approx(plain[0].loss, rel=1e-6)  # Lightning accumulates what is logged in float32


@pytest.mark.parametrize(("shares", "size"), [([1, 3], 47), ([1, 2, 4], 49)])
def test_where_ddp_pads_it_trains_as_a_single_process(ranks: RankPools, shares: list[float], size: int) -> None:
    """With 49 samples on three ranks the last batch has one sample: two ranks have none and add nothing."""
    world_size = len(shares)
    runs = ranks.run(world_size, train, Hetero(shares), size, 20)
    assert_parameters(runs, reference_parameters(size, BATCH_SIZE * world_size, 20))


def test_equal_shares_are_ddp_to_the_last_bit(ranks: RankPools) -> None:
    """Every rank has the very mini-batches that it has under ddp, and its loss is not touched."""
    hetero = ranks.run(2, train, Hetero([1, 1]), 46, 20)
    plain = ranks.run(2, train, ddp, 46, 20)
    assert [run.parameters for run in hetero] == [run.parameters for run in plain]
    assert [run.ledger for run in hetero] == [run.ledger for run in plain]


def test_a_change_of_plan_in_mid_epoch_changes_nothing_but_the_sizes(ranks: RankPools) -> None:
    changes = {3: (1, 7), 9: (6, 2), 10: (2, 6)}
    runs = ranks.run(2, train, Hetero([1, 3]), 46, 20, [ChangeAt(changes)])
    assert_parameters(runs, reference_parameters(46, 8, 20))
    assert_every_sample_once(runs, 46)
    assert [len(samples) for samples in runs[0].ledger[:12]] == [2, 2, 2, 1, 1, 2, 1, 1, 1, 6, 2, 2]


@pytest.mark.parametrize(
    "trainer",
    [
        {"accumulate_grad_batches": 4, "max_steps": 6},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["accumulation", "clip_norm", "clip_value"],
)
def test_options_of_the_trainer_act_as_under_ddp(ranks: RankPools, trainer: dict[str, Any]) -> None:
    hetero = ranks.run(2, train, Hetero([5, 2]), 46, 20, (), None, trainer)
    plain = ranks.run(2, train, ddp, 46, 20, (), None, trainer)
    assert_parameters(hetero, plain[0].parameters)


def test_options_of_the_loader_act_as_under_ddp(ranks: RankPools) -> None:
    """Under any distributed strategy Lightning shuffles the training data, without ``shuffle=True`` too."""
    workers: dict[str, Any] = {"num_workers": 2, "persistent_workers": True}
    for loader in ({"shuffle": False}, {"drop_last": True}, workers):
        hetero = ranks.run(2, train, Hetero([5, 2]), 46, 20, (), loader)
        plain = ranks.run(2, train, ddp, 46, 20, (), loader)
        assert_parameters(hetero, plain[0].parameters)
    # what starts the workers changes no sample; either pickles the data
    how = "spawn" if THOROUGH else "forkserver"
    spawned = {**workers, "num_workers": 1, "multiprocessing_context": how}
    assert_parameters(ranks.run(2, train, Hetero([5, 2]), 46, 20, (), spawned), plain[0].parameters)


class Synchronised(torch.autograd.Function):
    """Adds a mean over all ranks, as synchronised batch normalisation does, with its gradient."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor) -> torch.Tensor:
        total = mean.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class Sends(SmallModule):
    """Gradients flow between the ranks inside the backward pass; the parameters' own are DDP's as ever."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        index, features, targets = batch
        out = self.network(features)
        total = Synchronised.apply(out.sum() * 0 + list(self.network.parameters())[-1].sum())  # type: ignore[no-untyped-call]
        loss: torch.Tensor = torch.nn.functional.mse_loss(out + 0 * total, targets) + total * 0.001
        self.ledger.append(index.tolist())
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss


def sent_gradients() -> list[float]:
    """Return the gradients that reach rank 0's bias through the ranks, in the last step, where rank 1 stands in."""
    received: list[float] = []
    original = Synchronised.backward

    def spy(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        received.append(float(gradient))
        return original(ctx, gradient)

    Synchronised.backward = staticmethod(spy)  # type: ignore[method-assign]
    unwatched = mock.patch.object(CollectiveWatch, "installed", return_value=nullcontext())  # it would be refused
    try:
        with unwatched:
            train(Hetero([1, 3]), 9, 2, module=Sends)
    finally:
        Synchronised.backward = original  # type: ignore[method-assign]
    return received


def test_a_stand_in_sends_no_gradient_through_other_collectives(ranks: RankPools) -> None:
    first, second = ranks.run(2, sent_gradients)
    assert first[0] != 0
    assert second[0] != 0
    assert first[1] != 0
    assert second[1] == 0


def test_a_single_rank_trains_as_without_a_strategy(ranks: RankPools) -> None:
    runs = ranks.run(1, train, Hetero(), 46, 20)
    assert_parameters(runs, reference_parameters(46, 4, 20))


def test_a_global_batch_of_ones_own(ranks: RankPools) -> None:
    strategy = Hetero([1, 3], (("global_batch_size", 11), ("max_batch_size", [9, 7])))
    runs = ranks.run(2, train, strategy, 46, 20)
    assert_parameters(runs, reference_parameters(46, 11, 20))
    assert [len(run.ledger[0]) for run in runs] == [4, 7]


class SumModule(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx) * len(batch[0])
        return loss


def test_a_sum_over_the_batch_acts_as_under_ddp(ranks: RankPools) -> None:
    hetero = ranks.run(2, train, Hetero([5, 2], (("loss_reduction", "sum"),)), 46, 20, (), None, None, SumModule)
    plain = ranks.run(2, train, ddp, 46, 20, (), None, None, SumModule)
    assert_parameters(hetero, plain[0].parameters)


def terms_of(batch: Any) -> int:
    """Count the samples of even index: the others are padding."""
    return int((batch[0] % 2 == 0).sum())


class MaskedModule(SmallModule):
    """Averages over the samples that are not masked; 0 / 0 where a rank has none of them."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        index, features, targets = batch
        kept = index % 2 == 0
        loss: torch.Tensor = ((self.network(features) - targets)[kept] ** 2).sum() / kept.sum()
        self.log("loss", torch.nan_to_num(loss), on_epoch=True, sync_dist=True)
        return loss


def reference_masked(size: int, batch: int, steps: int) -> list[float]:
    data, network = Numbered(size), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for indices in reference_batches(size, batch, epochs=steps)[:steps]:
        kept = [i for i in sorted(indices) if i % 2 == 0]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(data.features[kept]), data.targets[kept]).backward()
        optimizer.step()
    return flat(network)


def test_the_mean_over_terms_is_exact_also_where_a_rank_has_none(ranks: RankPools) -> None:
    """Shares 1:7 leave rank 0 a single sample, which often is masked: its loss is NaN, its gradient counts nothing."""
    strategy = Hetero([1, 7], (("num_loss_terms", terms_of),))
    runs = ranks.run(2, train, strategy, 46, 20, (), None, None, MaskedModule)
    assert_parameters(runs, reference_masked(46, 8, 20))


class InfiniteOnStandIn(SmallModule):
    """Its loss is infinite on a batch that no single process would see: the same sample twice."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        index, features, _ = batch
        loss = super().training_step(batch, batch_idx)
        if len(index) == 2 and index[0] == index[1]:
            loss = loss / (features - features).sum()
        return loss


def test_a_stand_in_adds_nothing_even_where_its_loss_is_infinite(ranks: RankPools) -> None:
    plain = ranks.run(3, train, Hetero([1, 2, 4]), 49, 20)
    runs = ranks.run(3, train, Hetero([1, 2, 4]), 49, 20, (), None, None, InfiniteOnStandIn)
    assert_parameters(runs, reference_parameters(49, 12, 20))
    assert [run.loss for run in runs] == [run.loss for run in plain]


# ---- the checks above can fail ---------------------------------------------------------------------------------------


class Unweighted(HeteroDDPStrategy):
    def _weight_of_loss(self, batch: Any) -> float:
        return 1.0


class WeightedTwice(HeteroDDPStrategy):
    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().backward(closure_loss * self.loss_weight, *args, **kwargs)


class OneRankLate(HeteroDDPStrategy):
    def change_plan(self, first_step: int, plan: BatchPlan) -> None:
        super().change_plan(first_step + self.global_rank, plan)


class UnweightedTail(HeteroDDPStrategy):
    def _weight_of_loss(self, batch: Any) -> float:
        part = self.training_slice
        assert part is not None
        return 1.0 if part.global_samples < 8 else super()._weight_of_loss(batch)


class WeightedAsPlanned(HeteroDDPStrategy):
    """By the share of a whole batch, not by the samples that were really drawn."""

    def _weight_of_loss(self, batch: Any) -> float:
        assert self.plan_schedule is not None
        plan = self.plan_schedule.at(self.trainer.fit_loop.total_batch_idx)
        return plan.samples[self.global_rank] * self.world_size / plan.global_batch_size


@pytest.mark.parametrize("broken", [Unweighted, WeightedTwice, UnweightedTail, WeightedAsPlanned])
def test_a_wrong_weight_is_caught(ranks: RankPools, broken: type[HeteroDDPStrategy]) -> None:
    runs = ranks.run(2, train, Hetero([1, 3], cls=broken), 46, 20)
    assert_every_sample_once(runs, 46)
    with pytest.raises(AssertionError, match="rank 0 differs from the reference"):
        assert_parameters(runs, reference_parameters(46, 8, 20))


def test_a_plan_applied_a_step_late_on_one_rank_is_caught(ranks: RankPools) -> None:
    runs = ranks.run(2, train, Hetero([1, 3], cls=OneRankLate), 46, 20, [ChangeAt({4: (5, 3)})])
    with pytest.raises(AssertionError, match="rank 0 differs from the reference"):
        assert_parameters(runs, reference_parameters(46, 8, 20))
    with pytest.raises(AssertionError, match="step 4"):
        assert_every_sample_once(runs, 46)
