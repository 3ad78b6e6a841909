"""Trainings that nobody chose, on real gloo ranks, each compared with a single process."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from harness import RankPools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import drawn
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, assert_close, flat, loss_of, make_trainer, reference_batches, small_network

from lightning_hetero import HeteroDDPStrategy
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.distributed.collectives import all_gather

EPOCHS = 2
TRAININGS = drawn(40, 400)


@dataclass(frozen=True)
class Case:
    """A drawn case: everything that decides how the data are divided."""

    world_size: int
    shares: tuple[int, ...]
    size: int
    batch_size: int
    drop_last: bool
    workers: int
    accumulate: int
    changes: tuple[tuple[int, tuple[int, ...]], ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size = draw(st.sampled_from([1, 2, 2, 2, 3, 3, 4]))
    batch_size = draw(st.integers(1, 5))
    batch = batch_size * world_size
    drop_last = draw(st.booleans())

    def plan() -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, batch), min_size=world_size - 1, max_size=world_size - 1)))
        return tuple(b - a for a, b in pairwise([0, *cuts, batch]))

    steps = draw(st.lists(st.integers(0, 8), max_size=3, unique=True))
    return Case(
        world_size=world_size,
        shares=tuple(draw(st.lists(st.integers(1, 9), min_size=world_size, max_size=world_size))),
        size=draw(st.integers(batch if drop_last else 1, 50)),
        batch_size=batch_size,
        drop_last=drop_last,
        workers=draw(st.sampled_from([0] * 24 + [1])),
        accumulate=draw(st.integers(1, 3)),
        changes=tuple((step, plan()) for step in sorted(steps)),
    )


class ChangeAfterFetched(Callback):
    """Makes all ranks follow another plan from the first step that none of them has fetched."""

    def __init__(self, case: Case) -> None:
        self.changes = dict(case.changes)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        samples = self.changes.get(trainer.fit_loop.total_batch_idx)
        if samples is not None and trainer.world_size > 1:
            strategy = trainer.strategy
            assert isinstance(strategy, HeteroDDPStrategy)
            strategy.change_plan(max(all_gather(strategy.fetched_through)) + 1, BatchPlan(samples))


class Counting(SmallModule):
    """Keeps the samples that count: none on a stand-in."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(batch, batch_idx)
        strategy = self.trainer.strategy
        assert isinstance(strategy, HeteroDDPStrategy)
        if strategy.training_slice is not None and not strategy.training_slice.samples:
            self.ledger[-1] = []
        return loss


def train(case: Case) -> tuple[list[float], list[list[int]], float]:
    model = Counting()
    trainer = make_trainer(
        HeteroDDPStrategy(shares=list(case.shares)),
        case.world_size,
        [ChangeAfterFetched(case)],
        max_epochs=EPOCHS,
        accumulate_grad_batches=case.accumulate,
    )
    loader = DataLoader(
        Numbered(case.size),
        batch_size=case.batch_size,
        shuffle=True,
        drop_last=case.drop_last,
        num_workers=case.workers if dist.get_rank() == 0 else 0,
        persistent_workers=bool(case.workers) and dist.get_rank() == 0,
    )
    trainer.fit(model, loader)
    return flat(model.network), model.ledger, float(trainer.callback_metrics["loss"])


def reference(case: Case) -> tuple[list[set[int]], list[float], float]:
    """Return the global batches, the parameters and the last epoch's loss of a single process without Lightning."""
    data, network = Numbered(case.size), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    batch = case.batch_size * case.world_size
    batches = reference_batches(case.size, batch, EPOCHS)
    batches = [b for b in batches if not case.drop_last or len(b) == batch]
    an_epoch = len(batches) // EPOCHS
    summed, counted = 0.0, 0
    for step, members in enumerate(batches):
        indices = sorted(members)
        loss = loss_of(network, data.features[indices], data.targets[indices])
        (loss / case.accumulate).backward()
        summed, counted = (summed, counted) if step % an_epoch else (0.0, 0)
        summed, counted = summed + loss.item() * len(indices), counted + len(indices)
        if (step % an_epoch + 1) % case.accumulate == 0 or step % an_epoch == an_epoch - 1:
            optimizer.step()
            optimizer.zero_grad()
    return batches, flat(network), summed / counted


def check(ranks: RankPools, case: Case) -> None:
    """Compare the training on real ranks with that of a single process."""
    batches, parameters, loss = reference(case)
    runs = ranks.run(case.world_size, train, case, timeout_s=60)
    assert {len(ledger) for _, ledger, _ in runs} == {len(batches)}
    for step, members in enumerate(batches):
        assert sorted(index for _, ledger, _ in runs for index in ledger[step]) == sorted(members)
    for _, _, logged in runs:
        assert abs(logged - loss) <= 1e-5 * abs(loss) + 1e-7  # Lightning accumulates what is logged in float32
    for found, _, _ in runs:
        assert_close(found, parameters, comparison=f"single process, {TRAININGS} drawn trainings")


def test_drawn_trainings_end_where_a_single_process_ends(ranks: RankPools) -> None:
    trainings = []

    @settings(max_examples=TRAININGS, suppress_health_check=list(HealthCheck))
    @given(cases())
    def drawn(case: Case) -> None:
        trainings.append(case)
        check(ranks, case)

    drawn()
    assert len(trainings) >= TRAININGS
