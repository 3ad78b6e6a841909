"""A run that is resumed in the middle of an epoch goes on with the next sample and ends where an unbroken one ends."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from training import (
    Numbered,
    SaveAt,
    SmallModule,
    assert_close,
    flat,
    make_trainer,
    reference_batches,
    reference_parameters,
)

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.balance.tuning.session import Phase
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.exceptions import ConfigurationError

GLOBAL_BATCH, SIZE, STEPS = 12, 70, 15  # six steps an epoch, the last of ten samples


class SaveWithin(SaveAt):
    """Saves before a step is made, as where an exception ends it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pass


def train(
    shares: Any,
    steps: int,
    save: SaveAt | None = None,
    resume: Path | None = None,
    loader: dict[str, Any] | None = None,
) -> tuple[list[float], list[list[int]], int]:
    """Return the parameters, the samples of each step, and how often the tuning changed the shares."""
    world_size = dist.get_world_size()
    model = SmallModule()
    strategy = "ddp" if shares == "ddp" else HeteroDDPStrategy(shares=shares)
    trainer = make_trainer(strategy, world_size, [] if save is None else [save], max_steps=steps)
    training = DataLoader(Numbered(SIZE), batch_size=GLOBAL_BATCH // world_size, shuffle=True, **(loader or {}))
    trainer.fit(model, training, ckpt_path=resume, weights_only=False)
    changes = [len(c.changes) for c in trainer.callbacks if isinstance(c, LoadBalancer)]  # type: ignore[attr-defined]
    return flat(model.network), model.ledger, sum(changes)


def assert_continues(results: Sequence[tuple[list[float], list[list[int]], int]], first: int) -> None:
    expected = reference_batches(SIZE, GLOBAL_BATCH, epochs=3)[first:STEPS]
    seen = [{index for _, ledger, _ in results for index in ledger[step]} for step in range(STEPS - first)]
    assert [len(ledger) for _, ledger, _ in results] == [STEPS - first] * len(results)
    assert seen == expected
    reference = reference_parameters(SIZE, GLOBAL_BATCH, STEPS)
    for parameters, _, _ in results:
        assert_close(parameters, reference, comparison="single process, resumed in mid-epoch on 2 and 3 ranks")


@pytest.mark.parametrize("step", [0, 3, 5, 8, 11])
def test_it_goes_on_with_the_next_sample_on_any_number_of_ranks(ranks: RankPools, tmp_path: Path, step: int) -> None:
    """Saved by two ranks after the first, a middle, and the last step of an epoch."""
    path = tmp_path / "saved.ckpt"
    ranks.run(2, train, [1, 3], step + 1, SaveAt(step, path))
    assert_continues(ranks.run(2, train, [1, 3], STEPS, None, path), step + 1)
    assert_continues(ranks.run(3, train, [1, 2, 4], STEPS, None, path), step + 1)
    assert_continues(ranks.run(1, train, "auto", STEPS, None, path), step + 1) if step == 8 else None


class Dies(Callback):
    """Ends the run before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def train_until(step: int, folder: Path) -> list[list[int]]:
    """Go on from the last checkpoint and die before a step; return the samples of each step."""
    model = SmallModule()
    saving = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
    trainer = make_trainer(
        HeteroDDPStrategy(shares=[1, 3]), 2, [saving, Dies(step)], max_epochs=3, enable_checkpointing=True,
        limit_val_batches=1,
    )  # fmt: skip
    with suppress(InterruptedError):
        loader = DataLoader(Numbered(SIZE), batch_size=GLOBAL_BATCH // 2, shuffle=True)
        trainer.fit(model, loader, DataLoader(Numbered(8), batch_size=4), ckpt_path="last")
    return model.ledger


def test_it_goes_on_where_a_resumed_run_has_died_too(ranks: RankPools, tmp_path: Path) -> None:
    """It dies after the end of an epoch, where it was saved, and again in the next epoch."""
    expected = reference_batches(SIZE, GLOBAL_BATCH, epochs=3)
    for first, step in ((0, 7), (6, 9), (8, 99)):
        ledgers = ranks.run(2, train_until, step, tmp_path)
        seen = [{index for ledger in ledgers for index in ledger[i]} for i in range(len(ledgers[0]))]
        assert seen == expected[first:step]


def test_workers_that_read_ahead_when_it_was_saved_lose_nothing(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    ranks.run(2, train, [1, 3], 9, SaveAt(8, path), None, {"num_workers": 1})
    assert_continues(ranks.run(2, train, [1, 3], STEPS, None, path, {"num_workers": 1}), 9)


def test_checkpoints_go_from_and_to_plain_ddp(ranks: RankPools, tmp_path: Path) -> None:
    """Plain ddp loads one and goes on as it does, with the epoch's first samples; hetero_ddp goes on with the next."""
    hetero, plain = tmp_path / "hetero.ckpt", tmp_path / "ddp.ckpt"
    ranks.run(2, train, [1, 3], 9, SaveAt(8, hetero))
    loaded = ranks.run(2, train, "ddp", STEPS, None, hetero)
    assert [len(ledger) for _, ledger, _ in loaded] == [STEPS - 9] * 2
    ranks.run(2, train, "ddp", 9, SaveAt(8, plain))
    assert_continues(ranks.run(2, train, [1, 3], STEPS, None, plain), 9)


# ---- orders that do not follow from the epoch, and other global batches ---------------------------------------------


class DrawnByNumpy(Sampler[int]):
    """Draws from random numbers that no checkpoint of Lightning's holds."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class ListsDrawnByPython(BatchSampler):
    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        random.shuffle(batches)
        return iter(batches)


def loader_of(kind: str) -> DataLoader[Any]:
    if kind == "batch sampler":
        return DataLoader(
            Numbered(SIZE), batch_sampler=ListsDrawnByPython(SequentialSampler(range(SIZE)), GLOBAL_BATCH, False)
        )
    if kind == "generator":
        sampler = RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(5))
        return DataLoader(Numbered(SIZE), 1, sampler=Subclassed(sampler))
    return DataLoader(Numbered(SIZE), 1, sampler=DrawnByNumpy())


class Subclassed(Sampler[int]):
    """Hides torch's sampler, which Lightning would replace."""

    def __init__(self, sampler: RandomSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def train_drawn(kind: str, steps: int, save: SaveAt | None, resume: Path | None, seed: int) -> list[list[int]]:
    world_size = dist.get_world_size()
    strategy = HeteroDDPStrategy([1.0, 2.0, 3.0][:world_size], global_batch_size=GLOBAL_BATCH)
    trainer = make_trainer(strategy, world_size, [] if save is None else [save], max_steps=steps)
    for set_seed in (torch.manual_seed, np.random.seed, random.seed):
        set_seed(seed)
    model = SmallModule()
    trainer.fit(model, loader_of(kind), ckpt_path=resume, weights_only=True)
    return model.ledger


@pytest.mark.parametrize("kind", ["sampler", "generator", "batch sampler"])
def test_an_order_that_was_drawn_is_not_drawn_again(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved.ckpt"
    begun = ranks.run(2, train_drawn, kind, 9, SaveAt(8, path), None, 3)
    resumed = ranks.run(3, train_drawn, kind, STEPS, None, path, 4)
    steps = [sorted(index for ledger in begun for index in ledger[step]) for step in range(9)]
    steps += [sorted(index for ledger in resumed for index in ledger[step]) for step in range(STEPS - 9)]
    assert len(steps) == STEPS
    for epoch in (steps[:6], steps[6:12]):
        assert sorted(index for step in epoch for index in step) == list(range(SIZE))
    assert steps[:6] != steps[6:12]


def train_with_other_batch(path: Path, batch_size: int) -> str:
    trainer = make_trainer(HeteroDDPStrategy(), dist.get_world_size(), max_steps=STEPS)
    try:
        trainer.fit(SmallModule(), DataLoader(Numbered(SIZE), batch_size, shuffle=True), ckpt_path=path)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_an_epoch_is_not_resumed_with_another_global_batch(ranks: RankPools, tmp_path: Path) -> None:
    """As when a node is gone and the loader keeps its batch size per rank; after a whole epoch it is allowed."""
    within, after = tmp_path / "within.ckpt", tmp_path / "after.ckpt"
    ranks.run(2, train, [1, 3], 9, SaveAt(8, within))
    ranks.run(2, train, [1, 3], 6, SaveAt(5, after))
    for message in ranks.run(3, train_with_other_batch, within, 6):
        assert "12, to resume an epoch after 3 of its batches, got 18: samples would be left out or repeated" in message
        assert "Pass HeteroDDPStrategy(global_batch_size=12), or resume from the end of an epoch." in message
    assert ranks.run(3, train_with_other_batch, within, 4) == [""] * 3
    assert ranks.run(3, train_with_other_batch, after, 6) == [""] * 3


# ---- the shares that were found --------------------------------------------------------------------------------------


class Found(LoadBalancer):
    """Has found shares without measuring."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.finished:
            assert isinstance(trainer.strategy, HeteroDDPStrategy)
            self.tuned = True
            trainer.strategy.change_plan(2, BatchPlan((3, 9)))
            trainer.strategy.change_plan(5, BatchPlan((2, 10)))
            self.session.phase = Phase.TUNED

    tuned = False


def train_found(steps: int, save: SaveAt | None = None, resume: Path | None = None) -> tuple[list[int], bool]:
    model, balancer = SmallModule(), Found()
    callbacks = [balancer] if save is None else [balancer, save]
    trainer = make_trainer(HeteroDDPStrategy(), 2, callbacks, max_steps=steps)
    trainer.fit(model, DataLoader(Numbered(SIZE), batch_size=6), ckpt_path=resume, weights_only=False)
    return [len(batch) for batch in model.ledger], balancer.tuned


def test_the_shares_that_were_found_are_kept_and_no_others_are_looked_for(ranks: RankPools, tmp_path: Path) -> None:
    """A change that was agreed on for a later step than the last one is kept too."""
    path = tmp_path / "saved.ckpt"
    whole = ranks.run(2, train_found, 10)
    ranks.run(2, train_found, 4, SaveAt(3, path))
    resumed = ranks.run(2, train_found, 10, None, path)
    assert [(sizes, tuned) for sizes, tuned in resumed] == [(sizes[4:], False) for sizes, _ in whole]
    assert whole[0][0] == [6, 6, 3, 3, 3, 2, 2, 2, 2, 2]  # step 5 is short


# ---- loaders that know their position, and streams -------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __init__(self, sized: bool) -> None:
        self.part = range(dist.get_rank(), SIZE, dist.get_world_size())
        if sized:
            self.__class__ = SizedStream

    def __iter__(self) -> Iterator[Any]:
        data = Numbered(SIZE)
        return (data[index] for index in self.part)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.part)


class Remembering(Stream):
    """Can save its position."""

    def __init__(self, sized: bool) -> None:
        super().__init__(sized=False)
        self.next = 0
        if sized:
            self.__class__ = SizedRemembering

    def __iter__(self) -> Iterator[Any]:
        data = Numbered(SIZE)
        while self.next < len(self.part):
            self.next += 1
            yield data[self.part[self.next - 1]]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class SizedRemembering(Remembering):
    def __len__(self) -> int:
        return len(self.part)


def train_with(
    kind: str, steps: int, save: SaveAt | None = None, resume: Path | None = None
) -> tuple[list[float], list[list[int]]]:
    model = SmallModule()
    shares: Any = "auto"
    if kind.startswith("stateful"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        data: Any = Remembering(sized="sized" in kind) if "stream" in kind else Numbered(SIZE)
        workers = {"num_workers": 1} if "workers" in kind else {}
        loader = StatefulDataLoader(data, batch_size=6, **workers)
        shares = "auto" if "stream" in kind else [1, 3]
    else:
        loader = DataLoader(Stream(sized="sized" in kind), batch_size=6)
    trainer = make_trainer(HeteroDDPStrategy(shares=shares), 2, [] if save is None else [save], max_steps=steps)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=False)
    return flat(model.network), model.ledger


@pytest.mark.parametrize(
    "kind", ["stream", "sized stream", "stateful", "stateful stream", "stateful sized stream", "stateful workers"]
)
def test_loaders_of_other_kinds_go_on_with_the_next_sample(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved.ckpt"
    whole = ranks.run(2, train_with, kind, 14)
    ranks.run(2, train_with, kind, 9, SaveAt(8, path))
    resumed = ranks.run(2, train_with, kind, 14, None, path)
    for (parameters, ledger), (expected_parameters, expected_ledger) in zip(resumed, whole, strict=True):
        assert ledger == expected_ledger[9:]
        assert_close(parameters, expected_parameters, comparison=f"unbroken run, resumed in mid-epoch, {kind}")
    if "workers" not in kind:
        assert sorted(i for _, ledger in whole for step in ledger[:6] for i in step) == list(range(SIZE))


def test_a_step_that_was_not_finished_is_made_again(ranks: RankPools, tmp_path: Path) -> None:
    """In the middle of an epoch of a stream, and the last step of an epoch whose order was drawn."""
    whole = ranks.run(2, train_with, "stream", 14)
    ranks.run(2, train_with, "stream", 9, SaveWithin(8, tmp_path / "stream.ckpt"))
    resumed = ranks.run(2, train_with, "stream", 14, None, tmp_path / "stream.ckpt")
    assert [ledger for _, ledger in resumed] == [ledger[8:] for _, ledger in whole]
    begun = ranks.run(2, train_drawn, "sampler", 12, SaveWithin(11, tmp_path / "drawn.ckpt"), None, 3)
    drawn = ranks.run(2, train_drawn, "sampler", STEPS, None, tmp_path / "drawn.ckpt", 4)
    assert [ledger[0] for ledger in drawn] == [ledger[11] for ledger in begun]
