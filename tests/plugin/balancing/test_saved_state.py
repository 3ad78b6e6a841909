"""Real checkpoints hold plain values, load without running code, and do no harm if they are damaged."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from training import Numbered, SaveAt, SmallModule, make_trainer, reference_batches

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer

SIZE, GLOBAL_BATCH, SAVED, STEPS = 70, 12, 12, 16
WEIGHTS_ONLY = "weights_only" in inspect.signature(Trainer.fit).parameters
KEY = "LoadBalancer"


class Watched(LoadBalancer):
    """Notes whether the tuning was over when the run began."""

    was_tuned = False

    @property
    def state_key(self) -> str:
        return KEY

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.was_tuned = self.finished


def train(steps: int, path: Path, resume: Path | None = None) -> tuple[list[list[int]], bool, list[str]]:
    """Return the samples of each step, whether the tuning was over at the beginning, and the warnings."""
    # with a gain that is never predicted, no change by chance prolongs the tuning beyond the steps of this test
    balancer = Watched(warmup_steps=0, tune_steps=2, min_gain=1e6, verbose=False, record=False)
    model = SmallModule()
    trainer = make_trainer(HeteroDDPStrategy(), 2, [balancer, *_saving(steps, path, resume)], max_steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, DataLoader(Numbered(SIZE), batch_size=GLOBAL_BATCH // 2), ckpt_path=resume, **_loading())
    return model.ledger, balancer.was_tuned, [str(w.message) for w in caught if "hetero_ddp" in str(w.message)]


def _saving(steps: int, path: Path, resume: Path | None) -> list[Callback]:
    # after the last step and not after `fit`, when Lightning counts the epoch as done
    return [SaveAt(steps - 1, path)] if resume is None else []


def _loading() -> dict[str, Any]:
    return {"weights_only": True} if WEIGHTS_ONLY else {}


class Layers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch[1]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def train_pipeline(steps: int, path: Path, resume: Path | None = None) -> int:
    model = Layers().double()
    trainer = make_trainer(
        HeteroPipelineStrategy(num_microbatches=2, verbose=False), 2, _saving(steps, path, resume), max_steps=steps
    )
    trainer.fit(model, DataLoader(Numbered(20), batch_size=4), ckpt_path=resume, **_loading())
    return trainer.global_step


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) is str
            assert_plain(item)
    elif isinstance(value, list):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (bool, int, float, str), type(value)


@pytest.fixture(scope="module")
def checkpoint(ranks: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "saved.ckpt"
    ranks.run(2, train, SAVED, path)
    return path


def test_a_checkpoint_holds_plain_values_and_is_loaded_without_running_code(ranks: RankPools, checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    assert_plain(state["callbacks"])
    assert state["callbacks"][KEY]["finished"]
    for ledger, tuned, warned in ranks.run(2, train, STEPS, checkpoint, checkpoint):
        assert (len(ledger), tuned, warned) == (STEPS - SAVED, True, [])


def test_a_pipelines_checkpoint_is_loaded_without_running_code(ranks: RankPools, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    ranks.run(2, train_pipeline, 3, path)
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert ranks.run(2, train_pipeline, 5, path, path) == [5, 5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            {"schedule": {"first_steps": [0], "plans": [[4, 4, 4]]}},
            "All parts of the state must have the same number of ranks",
        ),
        ({"schedule": {"first_steps": [0], "plans": [[2**70, 1]]}}, "`plans` must be an integer"),
        ({"balance": {"initial": [6, 6], "model": {"_scale_n": [1.0, 1.0]}}}, "`_scale_s` must be present"),
        ({"step_times": "fast"}, "`step_times` must be a list, got 'fast'"),
        ({"devices": None}, "`devices` must be a list"),
    ],
)
def test_a_damaged_state_causes_one_warning_and_a_new_tuning(
    ranks: RankPools, checkpoint: Path, tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    state = torch.load(checkpoint, weights_only=True)
    state["callbacks"][KEY].update(damage)
    path = tmp_path / "damaged.ckpt"
    torch.save(state, path)
    results = ranks.run(2, train, STEPS, path, path)
    assert [tuned for _, tuned, _ in results] == [False, False]
    assert [len(warned) for _, _, warned in results] == [1, 0]
    assert "the shares in the checkpoint cannot be used, tuning again" in results[0][2][0]
    assert message in results[0][2][0]
    seen = [{index for ledger, _, _ in results for index in ledger[step]} for step in range(STEPS - SAVED)]
    assert seen == reference_batches(SIZE, GLOBAL_BATCH, epochs=3)[SAVED:STEPS]
