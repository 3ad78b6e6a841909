"""Whatever yields the batches: every sample once, and the gradient of the mean over all samples of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    get_worker_info,
)
from training import Numbered, SmallModule, assert_close, flat, loss_of, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy


@dataclass
class Run:
    """What a training produced on one rank."""

    parameters: list[float]
    steps: list[list[list[int]]]
    """For each step and loader the samples that counted: none on a stand-in."""
    logged: list[float]
    epoch_loss: float


class Recording(SmallModule):
    """Adds the losses of all loaders; keeps what counted in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[list[int]]] = []
        self.logged: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        parts = [batch] if isinstance(batch[0], torch.Tensor) else [part for part in batch if part is not None]
        strategy = self.trainer.strategy
        counts = not isinstance(strategy, HeteroDDPStrategy) or strategy.training_slice.samples > 0  # type: ignore[union-attr]
        self.steps.append([index.tolist() if counts else [] for index, _, _ in parts])
        loss = torch.stack([loss_of(self.network, features, targets) for _, features, targets in parts]).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(parts[0][0]))
        self.logged.append(float(self.trainer.callback_metrics.get("loss_step", torch.nan)))
        return loss


class KeepLogged(Callback):
    """Keeps what is logged on each step once it is there."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.logged[-1] = float(trainer.callback_metrics["loss_step"])  # type: ignore[operator]


def fit(loader: Any, strategy: Any, steps: int, **trainer: Any) -> Run:
    model = Recording()
    settings = {"max_steps": steps} | trainer
    fitted = make_trainer(strategy, dist.get_world_size(), [KeepLogged()], **settings)
    fitted.fit(model, loader)
    return Run(flat(model.network), model.steps, model.logged, float(fitted.callback_metrics["loss_epoch"]))


def assert_exact(runs: Sequence[Run], what: str) -> None:
    """Train on the union of what the ranks saw in each step, in one process, and compare parameters and logs."""
    numbered, network = Numbered(200), small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    assert len({len(run.steps) for run in runs}) == 1, "the ranks took different numbers of steps"
    for step, of_ranks in enumerate(zip(*(run.steps for run in runs), strict=True)):
        losses = []
        for of_loader in zip(*of_ranks, strict=True):
            indices = [index for of_rank in of_loader for index in of_rank]
            losses.append(loss_of(network, numbered.features[indices], numbered.targets[indices]))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for run in runs:
            assert run.logged[step] == pytest.approx(loss.item(), rel=1e-6), f"step {step} logs another loss"
    expected = flat(network)
    for run in runs:
        assert_close(run.parameters, expected, comparison=what)


def seen(runs: Sequence[Run], loader: int = 0, steps: slice = slice(None)) -> list[int]:
    return sorted(index for run in runs for step in run.steps[steps] for index in step[loader])


# ---- streams ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Each rank reads so many samples of its own, from its workers in turns."""

    def __init__(self, sizes: Sequence[int], endless: bool = False) -> None:
        self.size = sizes[dist.get_rank()]
        self.first = sum(sizes[: dist.get_rank()])
        self.endless = endless

    def __iter__(self) -> Iterator[Any]:
        data, worker = Numbered(200), get_worker_info()
        part = range(self.first, self.first + self.size)
        mine = part if worker is None else part[worker.id :: worker.num_workers]
        while True:
            yield from (data[index] for index in mine)
            if not self.endless:
                return


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


class Ready(Dataset[Any]):
    """Its entries are batches."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        data = Numbered(200)
        return torch.utils.data.default_collate([data[i] for i in range(3 * index, 3 * index + 2 + index % 2)])


class Batches:
    """No DataLoader at all."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.loader = DataLoader(Stream(sizes), batch_size=3)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class OfRank:
    """Yields this rank's samples, as a sampler of the user's that divides the data itself."""

    def __init__(self, sizes: Sequence[int]) -> None:
        first = sum(sizes[: dist.get_rank()])
        self.indices = range(first, first + sizes[dist.get_rank()])

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class PeekOnRankZero(Callback):
    """Looks at a batch, as image loggers do: the other ranks do not."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            next(iter(trainer.train_dataloader))  # type: ignore[arg-type]


def train_on_own(kind: str) -> tuple[Run, list[int]]:
    rank = dist.get_rank()
    own = [23, 11, 0][: dist.get_world_size()]
    callbacks: dict[str, Any] = {}
    if kind == "stream":
        loader: Any = DataLoader(Stream(own), batch_size=4)
    elif kind == "sized":
        loader = DataLoader(SizedStream(own), batch_size=4)
    elif kind == "unequal batches, workers":
        loader = DataLoader(Stream(own), batch_size=[5, 2][rank], num_workers=rank)
    elif kind == "endless":
        loader, callbacks = (
            DataLoader(Stream([9, 7], endless=True), batch_size=[4, 3][rank]),
            {"limit_train_batches": 6},
        )
    elif kind == "no DataLoader":
        loader = Batches(own)
    elif kind == "no batching":
        loader = DataLoader(Ready(), batch_size=None)
    else:
        loader, callbacks = DataLoader(Numbered(200), 4, sampler=OfRank(own)), {"use_distributed_sampler": False}
    run = fit(loader, HeteroDDPStrategy(), -1, max_epochs=2, **callbacks)
    return run, own


KINDS = ["stream", "sized", "unequal batches, workers", "endless", "no DataLoader", "no batching", "own sampler"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_data_of_their_own_stop_together_and_weights_are_exact(ranks: RankPools, kind: str) -> None:
    results = ranks.run(2, train_on_own, kind, timeout_s=90)
    runs = [run for run, _ in results]
    assert_exact(runs, f"single process, data of each rank's own: {kind}")
    half = len(runs[0].steps) // 2
    if kind == "endless":
        assert len(runs[0].steps) == 12
    elif kind == "no batching":
        expected = [i for entry in range(7) for i in range(3 * entry, 3 * entry + 2 + entry % 2)]
        assert seen(runs, steps=slice(half)) == seen(runs, steps=slice(half, None)) == expected
    else:
        assert seen(runs, steps=slice(half)) == seen(runs, steps=slice(half, None)) == list(range(34))


def test_a_rank_without_any_data_takes_part(ranks: RankPools) -> None:
    runs = [run for run, _ in ranks.run(3, train_on_own, "stream", timeout_s=90)]
    assert_exact(runs, "single process, a rank without data")
    assert not any(step[0] for step in runs[2].steps)


def train_with_peek() -> Run:
    model = Recording()
    trainer = make_trainer(HeteroDDPStrategy(), 2, [KeepLogged(), PeekOnRankZero()], max_epochs=1)
    trainer.fit(model, DataLoader(Stream([23, 11]), batch_size=4))
    return Run(flat(model.network), model.steps, model.logged, 0.0)


def test_a_callback_may_look_at_a_stream_on_one_rank_alone(ranks: RankPools) -> None:
    runs = ranks.run(2, train_with_peek, timeout_s=60)
    assert_exact(runs, "single process, a callback reads from a stream")
    assert seen(runs) == list(range(34))


class Broken(Stream):
    def __iter__(self) -> Iterator[Any]:
        for count, sample in enumerate(super().__iter__()):
            if count == 9 and dist.get_rank() == 1:
                raise ValueError("a corrupt file")
            yield sample


def train_on_broken() -> None:
    fit(DataLoader(Broken([23, 23]), batch_size=4), HeteroDDPStrategy(), -1, max_epochs=1)


def test_a_loader_that_fails_on_one_rank_ends_all(ranks: RankPools) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(2, train_on_broken, timeout_s=60)
    assert "ValueError: a corrupt file" in str(caught.value)
    assert "The loader of rank 1 raised an error" in str(caught.value)


# ---- several loaders -------------------------------------------------------------------------------------------------


def train_on_several(mode: str, shares: Any, sizes: Sequence[int], batch_sizes: Sequence[int], drop_last: bool) -> Run:
    loaders = [
        DataLoader(Subset(Numbered(200), range(size)), batch_size=batch, drop_last=drop_last, shuffle=True)
        for size, batch in zip(sizes, batch_sizes, strict=True)
    ]
    return fit(CombinedLoader(loaders, mode), HeteroDDPStrategy(shares=shares), -1, max_epochs=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
@pytest.mark.parametrize(
    ("shares", "sizes", "batch_sizes", "drop_last"),
    [([1, 3], (46, 30), (4, 4), False), ([5, 2], (46, 30), (4, 6), True), ([1, 3], (45, 22), (4, 6), False)],
)
def test_several_loaders_are_divided_together(
    ranks: RankPools,
    mode: str,
    shares: list[float],
    sizes: Sequence[int],
    batch_sizes: Sequence[int],
    drop_last: bool,
) -> None:
    runs = ranks.run(2, train_on_several, mode, shares, sizes, batch_sizes, drop_last)
    assert_exact(runs, f"single process, two loaders, {mode}")
    lengths = [n // (2 * b) if drop_last else -(-n // (2 * b)) for n, b in zip(sizes, batch_sizes, strict=True)]
    steps = min(lengths) if mode == "min_size" else max(lengths)
    assert len(runs[0].steps) == 2 * steps
    longest = lengths.index(max(lengths))
    if mode == "max_size_cycle" and not drop_last:
        for epoch in range(2):
            of_epoch = slice(epoch * steps, (epoch + 1) * steps)
            assert seen(runs, longest, of_epoch) == list(range(sizes[longest]))
    first = [len(part) for part in runs[0].steps[0]], [len(part) for part in runs[1].steps[0]]
    assert first[0] != first[1], "the shares are equal: nothing was tried"


# ---- batch samplers --------------------------------------------------------------------------------------------------


class Triples(BatchSampler):
    """A batch sampler of the user's own."""


def train_with_batch_sampler(global_batch_size: int) -> Run:
    data = Subset(Numbered(200), range(46))
    sampler: Any = torch.utils.data.SequentialSampler(data)
    loader = DataLoader(data, batch_sampler=Triples(sampler, 9, False))
    strategy = HeteroDDPStrategy(shares=[1, 2], global_batch_size=global_batch_size)
    return fit(loader, strategy, -1, max_epochs=2)


def test_batches_of_ones_own_batch_sampler_are_global_batches(ranks: RankPools) -> None:
    runs = ranks.run(2, train_with_batch_sampler, 9)
    assert_exact(runs, "single process, a batch sampler of the user's")
    assert [len(runs[r].steps[0][0]) for r in (0, 1)] == [3, 6]
    assert len(runs[0].steps) == 12
    assert seen(runs, steps=slice(6)) == seen(runs, steps=slice(6, None)) == list(range(46))
    assert runs[0].steps[:6] != runs[0].steps[6:], "both epochs have the same order"


# ---- a user's DistributedSampler that drops --------------------------------------------------------------------------


def train_dropping(hetero: bool) -> Run:
    data = Subset(Numbered(200), range(47))
    sampler: DistributedSampler[Any] = DistributedSampler(data, drop_last=True, seed=3)
    strategy = HeteroDDPStrategy(shares=[5, 2]) if hetero else "ddp"
    return fit(DataLoader(data, batch_size=4, sampler=sampler), strategy, -1, max_epochs=2)


def test_what_the_users_distributed_sampler_drops_is_dropped(ranks: RankPools) -> None:
    hetero = ranks.run(2, train_dropping, True)
    plain = ranks.run(2, train_dropping, False)
    assert_exact(hetero, "single process, a DistributedSampler that drops")
    assert seen(hetero, steps=slice(6)) == seen(plain, steps=slice(6))
    assert_close(hetero[0].parameters, plain[0].parameters)
