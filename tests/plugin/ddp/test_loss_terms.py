"""Losses averaged over weighted terms: less than one, none on a rank, none at all, and numbers that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from training import Numbered, SmallModule, assert_close, flat, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy

SIZE = 22


def weights_of(index: Tensor) -> Tensor:
    """Return weights of less than one for a quarter of the samples, and none for the others."""
    return torch.where(index % 4 == 1, 0.05 + index / 1000, 0.0).double()


def terms_of(batch: Any) -> Tensor:
    return weights_of(batch[0]).sum()


def masked_loss(network: Any, batch: Any) -> Tensor:
    """Return 0/0 for a batch without weights."""
    index, features, targets = batch
    weights = weights_of(index)[:, None]
    errors: Tensor = (network(features) - targets).square() * weights
    return errors.sum() / weights.sum()


@dataclass(frozen=True)
class Case:
    shares: Any = (1, 3)
    micro_batch_size: int | None = None
    ddp: tuple[tuple[str, Any], ...] = ()
    manual: bool = False
    stream: bool = False


class Masked(SmallModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = not case.manual
        self.micro_batches = case.micro_batch_size is not None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        part = self.trainer.strategy.training_slice  # type: ignore[attr-defined]
        self.ledger.append(batch[0].tolist() if part.samples else [])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = masked_loss(self.network, batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


class KeepLogged(Callback):
    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.logged.append(float(trainer.callback_metrics["loss_step"]))


class Parts(IterableDataset[Any]):
    """Gives each rank two samples of each four in its order."""

    def __iter__(self) -> Iterator[Any]:
        data = Numbered(SIZE)
        for first in range(0, SIZE - 2, 4):
            yield from (data[first + 2 * dist.get_rank() + i] for i in range(2))


def train(case: Case) -> tuple[list[float], list[list[int]], list[float], float]:
    strategy = HeteroDDPStrategy(
        shares="auto" if case.stream else list(case.shares),
        num_loss_terms=terms_of,  # type: ignore[arg-type]
        micro_batch_size=case.micro_batch_size,
        **dict(case.ddp),
    )
    model, keep = Masked(case), KeepLogged()
    trainer = make_trainer(strategy, dist.get_world_size(), [keep], max_epochs=3)
    trainer.fit(model, DataLoader(Parts(), 2) if case.stream else DataLoader(Numbered(SIZE), 2, shuffle=True))
    return flat(model.network), model.ledger, keep.logged, float(trainer.callback_metrics["loss_epoch"])


def expected(batches: list[list[int]]) -> tuple[list[float], list[float]]:
    """Train in one process; a batch without terms has no gradient."""
    network, data = small_network(), Numbered(SIZE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for indices in batches:
        index = torch.tensor(indices)
        loss = masked_loss(network, (index, data.features[index], data.targets[index]))
        losses.append(loss.item())
        if math.isnan(loss.item()):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
        else:
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return flat(network), losses


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case((2, 1)),
        Case(manual=True),
        Case(micro_batch_size=1),
        Case((2, 3), micro_batch_size=2),
        Case(micro_batch_size=1, ddp=(("static_graph", True),)),
        Case(micro_batch_size=1, ddp=(("find_unused_parameters", True), ("gradient_as_bucket_view", True))),
        Case(stream=True),
        Case(stream=True, micro_batch_size=1),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_without_terms_count_nothing(ranks: RankPools, case: Case) -> None:
    """A mean over no terms is not a number: neither the gradients nor what is logged may notice."""
    results = ranks.run(2, train, case)
    batches = [[index for part in parts for index in part] for parts in zip(*(r[1] for r in results), strict=True)]
    of_ranks = [
        [float(weights_of(torch.tensor(part)).sum()) for part in step]
        for step in zip(*(r[1] for r in results), strict=True)
    ]
    assert any(min(terms) == 0 < max(terms) for terms in of_ranks), "no rank was ever without terms"
    assert case.stream or any(max(terms) == 0 for terms in of_ranks), "no batch was ever without terms"
    parameters, losses = expected(batches)
    for found, _, logged, epoch in results:
        assert_close(found, parameters, comparison="single process, weighted terms, none on some ranks")
        assert math.isfinite(epoch)
        pairs = [(a, b) for a, b in zip(logged, losses, strict=True) if not math.isnan(b)]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-5)
        assert len(pairs) > len(losses) // 2


# ---- numbers that cannot be ------------------------------------------------------------------------------------------


def train_on_wrong(wrong: Any) -> str:
    """Return the error of this rank: rank 1 returns something wrong in its second step."""
    calls = 0

    def terms(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if dist.get_rank() == 1 and calls == 2:
            if isinstance(wrong, Exception):
                raise wrong
            return wrong
        return 2.0

    model = SmallModule()
    trainer = make_trainer(HeteroDDPStrategy(num_loss_terms=terms), 2, max_steps=4)
    try:
        trainer.fit(model, DataLoader(Numbered(SIZE), 2))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_wrong_number_is_refused_on_all_ranks(ranks: RankPools, wrong: float) -> None:
    for error in ranks.run(2, train_on_wrong, wrong, timeout_s=60):
        assert error.startswith("ConfigurationError: `num_loss_terms` must return a finite number")
        assert f"got {wrong}" in error
        assert "on rank 1" in error


@pytest.mark.parametrize(
    ("wrong", "own"),
    [
        ("three", "ConfigurationError: `num_loss_terms` must return one number, got a 'str'"),
        (KeyError("x"), "KeyError"),
    ],
)
def test_an_error_on_one_rank_ends_all(ranks: RankPools, wrong: Any, own: str) -> None:
    others, its = ranks.run(2, train_on_wrong, wrong, timeout_s=60)
    assert its.startswith(own)
    assert "got nan (or an error, which that rank reports) on rank 1" in others
