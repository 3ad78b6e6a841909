"""Subclasses of DataLoader that iterate in their own way: paired with what they draw, or refused."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from torch.utils.data import DataLoader, IterableDataset
from training import Numbered, SmallModule, assert_close, flat, loss_of, make_trainer, parameters_after

from lightning_hetero import HeteroDDPStrategy

SIZE = 45


class Generator(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class Mapped(DataLoader[Any]):
    """Yields other tensors than it draws, in another structure."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for index, x, y in super().__iter__():
            yield {"index": index + 0, "x": x + 0, "y": y + 0}


class Ahead(DataLoader[Any]):
    """Reads two batches ahead."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        ahead = list(islice(batches, 2))
        for batch in batches:
            ahead.append(batch)
            yield ahead.pop(0)
        yield from ahead


class Chunks(DataLoader[Any]):
    """Reads three batches and yields three."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while chunk := list(islice(batches, 3)):
            yield from chunk


class Whole(DataLoader[Any]):
    """Returns a plain iterator over everything."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


class Background(threading.Thread):
    """Reads in a thread, as prefetch_generator does."""

    def __init__(self, batches: Any) -> None:
        super().__init__(daemon=True)
        self.queue: queue.Queue[Any] = queue.Queue(3)
        self.batches = batches
        self.start()

    def run(self) -> None:
        for batch in self.batches:
            self.queue.put(batch)
        self.queue.put(None)

    def __iter__(self) -> Background:
        return self

    def __next__(self) -> Any:
        batch = self.queue.get()
        if batch is None:
            raise StopIteration
        return batch


class Threaded(DataLoader[Any]):
    def __iter__(self) -> Any:
        return Background(super().__iter__())


class Nested(Ahead, Mapped):
    def __len__(self) -> int:
        return super().__len__()


class Named(DataLoader[Any]):
    """Has arguments of its own and a length that it computes."""

    def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = name

    def __len__(self) -> int:
        sampler: Any = self.batch_sampler
        return len(sampler)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        iterator = super().__iter__()
        for _ in range(len(self)):
            yield next(iterator)


class Module(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        index, x, y = batch.values() if isinstance(batch, dict) else batch
        strategy: Any = self.trainer.strategy
        self.ledger.append(index.tolist() if strategy.training_slice.samples else [])
        return loss_of(self.network, x, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        index, x, y = batch.values() if isinstance(batch, dict) else batch
        self.evaluated.append(index.tolist())
        self.log("val_loss", loss_of(self.network, x, y), sync_dist=True, batch_size=len(index))


def train(cls: Any, workers: int) -> tuple[list[float], list[list[int]], list[int]]:
    model = Module()
    trainer = make_trainer(HeteroDDPStrategy(shares=[1, 3]), 2, max_epochs=2, limit_val_batches=None)
    loader = cls(Numbered(SIZE), batch_size=4, shuffle=True, num_workers=workers)
    trainer.fit(model, loader, cls(Numbered(SIZE), batch_size=4))
    return flat(model.network), model.ledger, [index for batch in model.evaluated for index in batch]


CLASSES = [Generator, Mapped, Ahead, Chunks, Whole, Threaded, Nested, Named]


@pytest.mark.parametrize(
    ("cls", "workers"), [*((cls, 0) for cls in CLASSES), (Generator, 2), (Ahead, 1), (Threaded, 1)]
)
def test_a_loader_that_iterates_in_its_own_way_is_divided(ranks: RankPools, cls: Any, workers: int) -> None:
    results = ranks.run(2, train, cls, workers, timeout_s=60)
    steps = [[*first, *second] for first, second in zip(*(ledger for _, ledger, _ in results), strict=True)]
    assert len(steps) == 2 * 6
    for epoch in (steps[:6], steps[6:]):
        assert sorted(index for step in epoch for index in step) == list(range(SIZE))
        assert [len(step) for step in epoch] == [8, 8, 8, 8, 8, 5]
    for parameters, _, _ in results:
        assert_close(parameters, parameters_after(steps, SIZE))
    assert sorted(index for _, _, evaluated in results for index in evaluated) == sorted([*range(SIZE)] * 2)


# ---- what cannot be paired -------------------------------------------------------------------------------------------


class Dropping(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from (batch for number, batch in enumerate(super().__iter__()) if number % 3 != 1)


class DroppingFirst(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from islice(super().__iter__(), 1, None)


class DroppingMapped(Mapped):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from (batch for number, batch in enumerate(super().__iter__()) if number % 3 != 1)


class Repeating(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch
            yield batch


class RepeatingAhead(Ahead):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch
            yield batch


class Halves(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield [tensor[:1] for tensor in batch]
            yield [tensor[1:] for tensor in batch]


class Reordering(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from reversed(list(super().__iter__()))


class Merging(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for first in batches:
            second = next(batches, first)
            yield [torch.cat(pair) for pair in zip(first, second, strict=True)]


class MultiEpochs(DataLoader[Any]):
    """Keeps one iterator for all epochs, made on construction."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.iterator = super().__iter__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(len(self)):
            yield next(self.iterator)


def error_of(cls: Any) -> str:
    try:
        train(cls, 0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Dropping, "in another order"),
        (DroppingFirst, "in another order"),
        (DroppingMapped, "draws more batches than it yields"),
        (Repeating, "yields more batches than it draws"),
        (RepeatingAhead, "several times"),
        (Halves, "yields more batches than it draws"),
        (Reordering, "in another order"),
        (Merging, "draws more batches than it yields|has drawn"),
        (MultiEpochs, "yields more batches than it draws"),
    ],
)
def test_a_loader_that_does_not_yield_what_it_draws_is_refused(ranks: RankPools, cls: Any, what: str) -> None:
    """Wherever the samples of a batch could be mistaken."""
    for error in ranks.run(2, error_of, cls, timeout_s=60):
        assert error.startswith("UnsupportedFeatureError")
        assert any(part in error for part in what.split("|")), error
        assert "use_distributed_sampler=False" in error


# ---- loaders of each rank's own --------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __init__(self, sizes: tuple[int, int]) -> None:
        self.first, self.size = sum(sizes[: dist.get_rank()]), sizes[dist.get_rank()]

    def __iter__(self) -> Iterator[Any]:
        data = Numbered(SIZE)
        yield from (data[index] for index in range(self.first, self.first + self.size))


def train_stream(cls: Any, batch_size: int) -> tuple[list[float], list[list[int]]]:
    model = Module()
    trainer = make_trainer(HeteroDDPStrategy(), 2, max_epochs=1)
    trainer.fit(model, cls(Stream((30, 11)), batch_size=batch_size))
    return flat(model.network), model.ledger


@pytest.mark.parametrize("cls", [*CLASSES[:-1], Halves, Dropping, Merging])
def test_a_joined_loader_counts_what_its_class_yields(ranks: RankPools, cls: Any) -> None:
    """Loaders that make batches of their own are counted by their tensors."""
    results = ranks.run(2, train_stream, cls, 4, timeout_s=60)
    steps = [[*first, *second] for first, second in zip(*(ledger for _, ledger in results), strict=True)]
    for parameters, _ in results:
        assert_close(parameters, parameters_after(steps, SIZE))
    if cls is not Dropping:
        assert sorted({index for step in steps for index in step}) == list(range(41))


# ---- the order of calls ----------------------------------------------------------------------------------------------

EVENTS: list[Any] = []


class Logged(Numbered):
    def resample(self) -> None:
        EVENTS.append("resample")

    def __getitem__(self, index: int) -> Any:
        if EVENTS and EVENTS[-1] != "item":
            EVENTS.append("item")
        return super().__getitem__(index)


class LoggedSampler(torch.utils.data.Sampler[int]):
    """Draws another order as soon as its owner says so."""

    def __init__(self, size: int) -> None:
        self.size, self.shift = size, 0

    def set_epoch(self, epoch: int) -> None:
        EVENTS.append(("set_epoch", epoch))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        EVENTS.append(("order", self.shift))
        return iter([(index + self.shift) % self.size for index in range(self.size)])


class LoggedBatches(torch.utils.data.BatchSampler):
    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.shift = 0

    def restart(self, shift: int) -> None:
        EVENTS.append("restart")
        self.shift = shift

    def __iter__(self) -> Iterator[list[int]]:
        EVENTS.append(("batches", self.shift))
        return super().__iter__()


class LoggedLoader(DataLoader[Any]):
    epoch, times = -1, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        EVENTS.append(("iter", self.epoch, self.times))
        self.times += 1
        yield from super().__iter__()


class Owner(SmallModule):
    """Changes its loader at the beginning of an epoch."""

    def __init__(self, kind: str, workers: int) -> None:
        super().__init__()
        self.kind, self.workers = kind, workers

    def train_dataloader(self) -> Any:
        EVENTS.append("loader")
        self.data = Logged(16)
        if self.kind == "sampler":
            self.sampler: Any = LoggedSampler(16)
            return LoggedLoader(self.data, batch_size=4, sampler=self.sampler)
        if self.kind == "weighted":
            weights = torch.arange(1.0, 17.0)
            self.sampler = torch.utils.data.WeightedRandomSampler(weights.tolist(), 16)
            return LoggedLoader(self.data, batch_size=4, sampler=self.sampler, num_workers=self.workers)
        if self.kind == "own DistributedSampler":
            self.distributed: Any = torch.utils.data.DistributedSampler(self.data, seed=3)
            self.loader = LoggedLoader(self.data, batch_size=4, sampler=self.distributed)
            return self.loader
        batches = LoggedBatches(torch.utils.data.SequentialSampler(self.data), 8, False)
        return LoggedLoader(self.data, batch_sampler=batches)

    def on_train_epoch_start(self) -> None:
        EVENTS.append("epoch start")
        epoch = self.current_epoch
        self.data.resample()
        if self.kind == "sampler":
            self.sampler.shift = 2 * epoch + 1
        elif self.kind == "weighted":
            self.sampler.weights = self.sampler.weights.flip(0)
        elif self.kind == "own DistributedSampler":
            self.distributed.set_epoch(10 * epoch + 5)
            self.loader.set_epoch(epoch)
        else:
            loader: Any = self.trainer.train_dataloader
            loader.batch_sampler.restart(epoch + 1)
            loader.set_epoch(epoch)


def events_of(kind: str, strategy: str, reload: int, workers: int = 0) -> tuple[list[Any], list[list[int]]]:
    EVENTS.clear()
    model = Owner(kind, workers)
    chosen: Any = HeteroDDPStrategy(shares=[1, 1], global_batch_size=8) if strategy == "hetero" else "ddp"
    trainer = make_trainer(chosen, 2, max_epochs=3, reload_dataloaders_every_n_epochs=reload)
    trainer.fit(model)
    return list(EVENTS), model.ledger


@pytest.mark.parametrize("reload", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sampler", "weighted", "own DistributedSampler", "batch sampler"])
def test_owners_who_change_their_loader_see_the_calls_of_ddp(ranks: RankPools, kind: str, reload: int) -> None:
    """What is changed at the beginning of an epoch counts for that epoch."""
    hetero = ranks.run(2, events_of, kind, "hetero", reload, timeout_s=60)
    plain = ranks.run(2, events_of, kind, "ddp", reload, timeout_s=60)
    for (events, ledger), (expected, expected_ledger) in zip(hetero, plain, strict=True):
        assert events == expected
        if kind != "batch sampler":  # whose batches are those of each rank under ddp
            assert ledger == expected_ledger


# ---- samplers that divide the data themselves ------------------------------------------------------------------------


class Lists(torch.utils.data.Sampler[Any]):
    """A batch sampler that is no BatchSampler, so that Lightning cannot make another like it."""

    def __init__(self, of_rank: bool = False) -> None:
        self.first = dist.get_rank() if of_rank else 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(24).tolist()
        return iter([order[i : i + 6] if not self.first else order[i : i + 5] for i in range(0, 24, 6)])


class BatchesOfRank(torch.utils.data.DistributedSampler[Any]):
    """Yields batches, as scvi-tools does."""

    def __iter__(self) -> Iterator[Any]:
        indices = list(super().__iter__())
        return iter([indices[i : i + 3] for i in range(0, len(indices), 3)])

    def __len__(self) -> int:
        return math.ceil(super().__len__() / 3)


class Batched(Numbered):
    def __getitem__(self, index: Any) -> Any:
        return torch.tensor(index), self.features[index], self.targets[index]


def train_on_samplers(kind: str) -> tuple[list[list[int]], list[float], list[str]]:
    import warnings

    options: dict[str, Any] = {"use_distributed_sampler": kind == "Lightning's"}
    if kind == "batches of a rank":
        data = Batched(24)
        loader: Any = DataLoader(data, batch_size=None, sampler=BatchesOfRank(data, 2, dist.get_rank()))
        strategy = HeteroDDPStrategy()
    else:
        loader = DataLoader(Numbered(24), batch_sampler=Lists(kind == "of each rank"))
        strategy = HeteroDDPStrategy(shares=[1, 2], global_batch_size=6)
    model = Module()
    trainer = make_trainer(strategy, 2, max_epochs=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, loader)
    return model.ledger, flat(model.network), [str(warning.message) for warning in caught]


def test_batch_samplers_that_lightning_cannot_remake_are_divided_too(ranks: RankPools) -> None:
    """With ``use_distributed_sampler=False``, since Lightning refuses them otherwise, and ``global_batch_size``."""
    results = ranks.run(2, train_on_samplers, "the user's")
    steps = [[*first, *second] for first, second in zip(*(ledger for ledger, _, _ in results), strict=True)]
    assert [len(first) for first in results[0][0]] == [2] * 8
    for epoch in (steps[:4], steps[4:]):
        assert sorted(index for step in epoch for index in step) == list(range(24))
    for _, parameters, _ in results:
        assert_close(parameters, parameters_after(steps, 24))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("of each rank", "so they must be the same on every rank, got others"),
        ("Lightning's", "Lightning can't inject a"),
    ],
)
def test_batch_samplers_that_cannot_be_divided_are_refused(ranks: RankPools, kind: str, error: str) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(2, train_on_samplers, kind, timeout_s=60)
    assert str(caught.value).count(error) >= 2


def test_the_reason_names_the_sampler(ranks: RankPools) -> None:
    """Not an argument that the user did not give."""
    results = ranks.run(2, train_on_samplers, "batches of a rank")
    warnings = [warning for _, _, of_rank in results for warning in of_rank if "as it is, because" in warning]
    assert len(warnings) == 1
    assert (
        "its sampler 'BatchesOfRank' is a `DistributedSampler` that divides the data in a way of its own" in warnings[0]
    )
    assert "use_distributed_sampler" not in warnings[0]
    assert sorted(index for ledger, _, _ in results for step in ledger[:4] for index in step) == list(range(24))


class StreamLoader(LoggedLoader):
    """Is used as it is under ddp too."""


class StreamOwner(SmallModule):
    def train_dataloader(self) -> Any:
        self.loader = StreamLoader(Stream((8, 8)), batch_size=4)
        return self.loader

    def on_train_epoch_start(self) -> None:
        self.loader.set_epoch(self.current_epoch)


def stream_events(hetero: bool) -> list[Any]:
    EVENTS.clear()
    trainer = make_trainer(HeteroDDPStrategy() if hetero else "ddp", 2, max_epochs=3)
    trainer.fit(StreamOwner())
    return list(EVENTS)


def test_a_joined_loader_follows_its_owner(ranks: RankPools) -> None:
    """A stream has no length, so that Lightning reads the first batch before the first epoch begins."""
    assert ranks.run(2, stream_events, True, timeout_s=60) == ranks.run(2, stream_events, False, timeout_s=60)
