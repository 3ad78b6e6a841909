"""How much of a training is left is known where anything says so."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightning_hetero.plugin.common.loop_progress import TrainingProgress


class Left(Callback):
    """Notes how many steps are left before each step, this one included."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(TrainingProgress(trainer).remaining_steps)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        ({"max_epochs": 2, "limit_train_batches": 3}, [6, 5, 4, 3, 2, 1]),
        ({"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 2}, [6, 6, 4, 4, 2]),
        ({"max_steps": 7, "max_epochs": 1}, [5, 4, 3, 2, 1]),
    ],
)
def test_the_steps_that_are_left_are_known(options: dict[str, Any], expected: list[float]) -> None:
    left = Left()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[left], **options,
    )  # fmt: skip
    trainer.fit(BoringModel(), DataLoader(RandomDataset(32, 10), 2))
    assert left.seen[: len(expected)] == expected


def test_a_training_without_an_end_has_steps_left() -> None:
    trainer = Trainer(max_epochs=-1, logger=False, accelerator="cpu")
    assert TrainingProgress(trainer).remaining_steps == inf
