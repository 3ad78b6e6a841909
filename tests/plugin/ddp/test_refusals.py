"""What cannot be trained exactly is refused, or left as it is with a warning; never trained wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from training import Numbered, SmallModule, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.types import BatchPlan


class Odd(BatchSampler):
    """A batch sampler of the user's own."""


class Stream(IterableDataset[Any]):
    """Each rank reads its own part."""

    def __iter__(self) -> Iterator[Any]:
        data = Numbered(46)
        return (data[i] for i in range(dist.get_rank(), 46, dist.get_world_size()))


class TwoLoaders(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch[0], batch_idx)


class Fetching(SmallModule):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class Gathering(SmallModule):
    """Compares its samples with those of other ranks, as contrastive losses do."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.all_gather(batch[1])
        return super().training_step(batch, batch_idx)


def fit(kind: str, strategy: Any, **arguments: Any) -> list[float]:
    data, model, trainer = Numbered(46), SmallModule(), arguments.pop("trainer", {})
    loader: Any
    if kind == "batch_sampler":
        loader = DataLoader(data, batch_sampler=Odd(SequentialSampler(data), 4, False))
    elif kind == "no_batching":
        loader = DataLoader(data, batch_size=None)
    elif kind == "iterable":
        loader = DataLoader(Stream(), batch_size=4)
    elif kind == "mixed":
        model, loader = TwoLoaders(), [DataLoader(data, batch_size=4), DataLoader(Stream(), batch_size=4)]
    elif kind == "dataloader_iter":
        model, loader = Fetching(), DataLoader(data, batch_size=4)
    elif kind == "all_gather":
        model, loader = Gathering(), DataLoader(data, batch_size=4)
    elif kind in ("two", "two_odd"):
        other = Numbered(46 if kind == "two" else 45)
        model, loader = TwoLoaders(), [DataLoader(data, batch_size=4), DataLoader(other, batch_size=4)]
    elif kind == "streams":
        model, loader = TwoLoaders(), [DataLoader(Stream(), batch_size=4), DataLoader(Stream(), batch_size=4)]
    else:
        loader = DataLoader(data, batch_size=4)
    if strategy == "hetero":
        strategy = HeteroDDPStrategy(**arguments)
    fitted = make_trainer(strategy, dist.get_world_size(), max_steps=5, **trainer)
    fitted.fit(model, loader)
    assert not any(isinstance(c, LoadBalancer) and c.changes for c in fitted.callbacks)  # type: ignore[attr-defined]
    return flat(model.network)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "batch_sampler",
            {},
            "`global_batch_size` must be given with your own batch sampler, got None with 'Odd'",
        ),
        ("no_batching", {"shares": [1, 3]}, "its dataset makes the batches (`batch_size=None`). Give each rank"),
        ("two", {"global_batch_size": 9}, "`global_batch_size` must be None with several training loaders, got 9"),
        (
            "two_odd",
            {"shares": [1, 3], "max_batch_size": [6, 10]},
            "`max_batch_size` must allow for the last batches of",
        ),
        ("mixed", {}, "divides either all training loaders or none, got 1 that it can divide and 1 that it cannot"),
        ("streams", {}, "several that it cannot divide, got 2 of 2 without a length"),
        ("dataloader_iter", {}, "got a `training_step` that takes `dataloader_iter`"),
        (
            "all_gather",
            {"shares": [1, 3]},
            "`all_gather` needs tensors of one shape, got [(2, 5), (6, 5)] on the ranks",
        ),
        (
            "iterable",
            {"shares": [1, 2]},
            "`shares` cannot be honoured for the training loader 'DataLoader': each rank reads a stream",
        ),
    ],
)
def test_is_refused_on_every_rank(ranks: RankPools, kind: str, arguments: dict[str, Any], message: str) -> None:
    def run() -> None:
        ranks.run(2, fit_with, kind, arguments)

    with pytest.raises(RankError) as caught:
        run()
    assert str(caught.value).count(message) >= 2


def fit_with(kind: str, arguments: dict[str, Any]) -> list[float]:
    return fit(kind, "hetero", **arguments)


def fit_plain(kind: str, trainer: dict[str, Any]) -> list[float]:
    return fit(kind, "ddp", trainer=trainer)


@pytest.mark.parametrize(
    ("kind", "trainer"), [("iterable", {}), ("map", {"use_distributed_sampler": False, "limit_train_batches": 5})]
)
def test_data_that_the_user_divides_trains_as_under_ddp(ranks: RankPools, kind: str, trainer: dict[str, Any]) -> None:
    assert ranks.run(2, fit_with, kind, {"trainer": trainer}) == ranks.run(2, fit_plain, kind, trainer)


class TakesAnything(SmallModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluates nothing: the loaders are what is refused."""


def evaluate_together() -> None:
    loaders = CombinedLoader(
        [DataLoader(Numbered(1), batch_size=4), DataLoader(Numbered(32), batch_size=4)], "max_size"
    )
    trainer = make_trainer(HeteroDDPStrategy(shares=[1, 3]), dist.get_world_size(), limit_val_batches=1.0)
    trainer.validate(TakesAnything(), loaders, verbose=False)


def test_a_stand_in_beside_another_loaders_batch_is_refused(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="cannot evaluate 2 loaders at the same time"):
        ranks.run(2, evaluate_together, timeout_s=60)


def change_too_late() -> None:
    strategy = HeteroDDPStrategy(shares=[1, 1])

    class ChangeTooLate(LoadBalancer):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            strategy.change_plan(trainer.fit_loop.total_batch_idx, BatchPlan((2, 6)))

    trainer = make_trainer(strategy, dist.get_world_size(), [ChangeTooLate()], max_steps=5)
    trainer.fit(SmallModule(), DataLoader(Numbered(46), batch_size=4))


def test_a_step_that_was_fetched_cannot_be_changed(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="`first_step` must be a step that no rank has fetched, got 0, but rank 0"):
        ranks.run(2, change_too_late)
