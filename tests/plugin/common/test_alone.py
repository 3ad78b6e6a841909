"""A strategy on its own, as `DDPStrategy` can be: without a Trainer, without a module, pickled, copied, used again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPools
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset
from training import Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer
from lightning_hetero.balance.types import BatchLimits
from lightning_hetero.plugin.common import base_strategy
from lightning_hetero.plugin.common.environment import UnevenTorchrunEnvironment

OURS = [HeteroDDPStrategy, HeteroPipelineStrategy]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


def sized(loader: Any) -> int:
    return len(loader)


def never_connected(strategy: DDPStrategy) -> None:
    """Leave the strategy without a module."""


def connected_to_a_new_module(strategy: DDPStrategy) -> None:
    strategy.connect(BoringModel())


def connected_to_a_module_without_the_attribute(strategy: DDPStrategy) -> None:
    module = BoringModel()
    del module.__dict__["_trainer"]
    strategy.connect(module)


CONNECT = [never_connected, connected_to_a_new_module, connected_to_a_module_without_the_attribute]


def answers(strategy: DDPStrategy, folder: Path) -> list[Any]:
    """Return what a strategy answers to everything that needs neither a Trainer nor other ranks."""
    tensor, loader = torch.tensor([1.0, 2.0]), DataLoader(Numbered(4))
    strategy.save_checkpoint({"value": 3}, folder / "saved.ckpt")
    return [
        strategy.all_gather(tensor).tolist(),
        strategy.reduce(tensor).tolist(),
        strategy.reduce(3),  # type: ignore[arg-type]  # returned as it is
        strategy.broadcast("text"),
        strategy.barrier(),
        strategy.reduce_boolean_decision(True, all=False),
        strategy.reduce_boolean_decision(False, all=False),
        strategy.process_dataloader(loader) is loader,
        strategy.load_checkpoint(folder / "saved.ckpt")["value"],
        strategy.is_global_zero,
    ]


@pytest.mark.parametrize("connect", CONNECT)
@pytest.mark.parametrize("of_trainer", [False, True])
@pytest.mark.parametrize("strategy", OURS)
def test_a_strategy_answers_without_a_trainer(
    tmp_path: Path, strategy: type[DDPStrategy], of_trainer: bool, connect: Callable[[DDPStrategy], None]
) -> None:
    found = []
    for cls in (DDPStrategy, strategy):
        one = cls() if of_trainer else cls(parallel_devices=[torch.device("cpu")])
        if of_trainer:
            Trainer(strategy=one, **QUIET)
        connect(one)
        found.append(answers(one, tmp_path))
    assert found[0] == found[1]


@pytest.mark.parametrize("strategy", OURS)
def test_every_attribute_can_be_looked_at_without_a_trainer(strategy: type[DDPStrategy]) -> None:
    """Debuggers and mocks look at all of them; `DDPStrategy` shows the way, apart from what is deprecated."""
    one = strategy(parallel_devices=[torch.device("cpu")])
    one.connect(BoringModel())
    for name in sorted(set(dir(one)) - {"is_distributed", "trainer", "_running"}):
        getattr(one, name)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_divides_the_loaders_of_its_own_trainer(make: Callable[[Any], Any]) -> None:
    original = HeteroDDPStrategy(shares=[1, 3])
    other = make(original)
    for one in (original, other):
        assert one.train_data._strategy is one
        assert one.eval_data._strategy is one
        assert one.micro_batches._strategy is one
        assert getattr(one.eval_data._training_plan, "__self__", None) is one.train_data
        assert one.micro_batches._limits is one.micro_batch_limits
    assert other.shares == [1, 3]
    assert other.timer is not original.timer
    Trainer(strategy=original, **QUIET)
    Trainer(strategy=other, **QUIET)  # one strategy cannot serve both


class Stream(IterableDataset[Any]):
    """Ranks with different numbers of samples."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        return iter([Numbered(40)[i] for i in range(rank * 20, rank * 20 + (13, 20)[rank])])


class Batches:
    """No DataLoader; all ranks train on the same batches."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        return iter(DataLoader(Numbered(12), batch_size=4))


def make_loader(kind: str) -> Any:
    if kind == "stream":
        return DataLoader(Stream(), batch_size=4)
    if kind == "iterable":
        return Batches()
    return DataLoader(Numbered(46), batch_size=4, shuffle=True)


def stages_of_a_trainer(strategy: Any, folder: str, kind: str) -> list[Any]:
    """Train, and use the Trainer and the strategy after that in every way in which `ddp` can be used."""
    module = SmallModule()
    trainer = make_trainer(strategy, 2, max_steps=7, limit_val_batches=2, limit_test_batches=2, limit_predict_batches=2)
    evaluation = DataLoader(Numbered(10), batch_size=2)
    trainer.validate(module, evaluation, verbose=False)
    trainer.fit(module, make_loader(kind), evaluation)
    for make in (pickled, copy.deepcopy):
        again = make(trainer)
        for one in (again.strategy, make(trainer.strategy)):
            if isinstance(one, HeteroDDPStrategy):
                assert one.train_data._strategy is one
        assert again.train_dataloader is not trainer.train_dataloader
        assert sized(again.train_dataloader) == sized(trainer.train_dataloader)
        assert make(module).network is not module.network
        copied = copy.copy(trainer)
        assert copied.strategy is trainer.strategy
    tested = trainer.test(module, evaluation, verbose=False)
    found = [flat(module.network), tested]
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit(module, make_loader(kind), evaluation)
    found.append(flat(module.network))
    path = Path(folder) / f"{type(trainer.strategy).__name__}{kind}.ckpt"
    trainer.save_checkpoint(path)
    module.__dict__.pop("_trainer")
    trainer.strategy.save_checkpoint({"value": trainer.strategy.reduce(torch.tensor(2.0)).item()}, path)
    trainer.strategy.barrier()
    found.append(torch.load(path)["value"])
    found.append(trainer.strategy.all_gather(torch.tensor([1.0])).tolist())
    for balancer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(balancer, LoadBalancer):
            strategy = trainer.strategy
            assert (balancer.advice is None) == (not balancer.step_times)
            assert strategy.limits == BatchLimits()
    return found


@pytest.mark.parametrize("kind", ["divided", "iterable"])
def test_a_trainer_is_pickled_copied_and_used_again(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    strategies = ["ddp", "hetero_ddp"] + ([HeteroDDPStrategy(shares=[1, 3])] if kind == "divided" else [])
    ddp, *ours = (ranks.run(2, stages_of_a_trainer, strategy, str(tmp_path), kind) for strategy in strategies)
    for found in ours:
        for of_rank, expected in zip(found, ddp, strict=True):
            assert_close(of_rank[0], expected[0])
            assert_close(of_rank[2], expected[2])
            assert of_rank[1] == [{name: pytest.approx(value, abs=1e-10) for name, value in expected[1][0].items()}]
            assert of_rank[3:] == expected[3:]


def pickled_stream(folder: str) -> bool:
    module = SmallModule()
    trainer = make_trainer("hetero_ddp", 2, max_steps=4)
    trainer.fit(module, make_loader("stream"))
    trainer.strategy.barrier()
    strategy = pickled(trainer).strategy
    return isinstance(strategy, HeteroDDPStrategy) and strategy.train_data._strategy is strategy


def test_a_trainer_of_streams_is_pickled(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks.run(2, pickled_stream, str(tmp_path)) == [True, True]


def test_a_second_trainer_does_not_follow_the_plans_of_the_first() -> None:
    """Its steps have the same numbers."""
    strategy = HeteroDDPStrategy(shares=[1, 3])
    first, second = BoringModel(), BoringModel()
    first.trainer, second.trainer = Trainer(**QUIET), Trainer(**QUIET)
    strategy.connect(first)
    data = strategy.train_data
    strategy.connect(first)
    assert strategy.train_data is data
    strategy.connect(second)
    assert strategy.train_data is not data


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize(
    ("started", "here", "cls"),
    [(2, 2, TorchElasticEnvironment), (5, 2, UnevenTorchrunEnvironment), (3, 3, UnevenTorchrunEnvironment)],
)
def test_only_uneven_nodes_need_another_environment(
    monkeypatch: pytest.MonkeyPatch, strategy: type[DDPStrategy], started: int, here: int, cls: type[Any]
) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1",
             "WORLD_SIZE": str(started), "LOCAL_WORLD_SIZE": str(here)}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    one = strategy(parallel_devices=[torch.device("cpu")] * 2)
    one.cluster_environment = TorchElasticEnvironment()
    one.set_world_ranks()
    assert type(one.cluster_environment) is cls


def test_a_checkpoint_callback_saves_a_trainer_that_lost_its_module(tmp_path: Path) -> None:
    """neuralforecast deletes the attribute, then saves the weights."""
    for strategy in ("ddp", "hetero_ddp"):
        trainer = Trainer(
            **{**QUIET, "devices": 1, "enable_checkpointing": True}, strategy=strategy, max_steps=1,
            callbacks=ModelCheckpoint(tmp_path / strategy), default_root_dir=tmp_path, limit_val_batches=0,
        )  # fmt: skip
        module = BoringModel()
        trainer.strategy.connect(module)
        module.__dict__.pop("_trainer")
        trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=True)
        assert set(torch.load(tmp_path / "one.ckpt")["state_dict"]) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize(
    ("reason", "calls"),
    [
        ("Rank 0 (cpu) ran out of memory", 0),
        ("Rank 0 could not load a batch: OSError: none", 0),
        ("rank 1 with\nValueError", 1),
        ("rank 01", 1),
        ("the ranks do not agree", 1),
    ],
)
@pytest.mark.parametrize("strategy", OURS)
def test_a_rank_is_not_told_of_its_own_failure_as_of_anothers(
    monkeypatch: pytest.MonkeyPatch, strategy: type[DDPStrategy], reason: str, calls: int
) -> None:
    """Peers may have been told, and have passed it on, before it gets here."""
    errors: list[Any] = []
    monkeypatch.setattr(base_strategy, "announced", lambda: reason)
    monkeypatch.setattr(base_strategy, "stay_in_group", lambda: None)
    monkeypatch.setattr(base_strategy, "lightning_closes_group", lambda _: None)
    monkeypatch.setattr(base_strategy._log, "error", lambda *told: errors.append(told))
    strategy().on_exception(OSError("none"))
    assert len(errors) == calls
