"""darts, which imports ``pytorch_lightning``."""

from __future__ import annotations

import numpy as np
import torch
from harness import RankPools
from libraries.comparing import BATCH_SIZE, NAME, QUIET, SEED, STEPS, WORLD_SIZE, Strategy, assert_trains_as_ddp
from lightning.pytorch import Callback

INPUT, OUTPUT = 6, 2


def series(strategy: Strategy, callbacks: list[Callback]) -> None:
    from darts import TimeSeries
    from darts.models import NBEATSModel

    generator = np.random.default_rng(0)
    length = INPUT + OUTPUT + STEPS - 1  # one window per step and series
    data = [
        TimeSeries.from_values(generator.normal(size=length).astype(np.float32)) for _ in range(WORLD_SIZE * BATCH_SIZE)
    ]
    settings = {"strategy": strategy, "accelerator": "cpu", "devices": WORLD_SIZE, "callbacks": callbacks}
    model = NBEATSModel(
        input_chunk_length=INPUT, output_chunk_length=OUTPUT, num_stacks=1, num_blocks=1, num_layers=2, layer_widths=8,
        n_epochs=1, batch_size=BATCH_SIZE, random_state=SEED, optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.05}, pl_trainer_kwargs={**QUIET, **settings},
    )  # fmt: skip
    model.fit(data, val_series=data[:1])


def test_series(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, series, unequal=NAME)
