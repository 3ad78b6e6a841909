"""neuralforecast, which imports ``pytorch_lightning``: each rank draws windows from its part of the series."""

from __future__ import annotations

import numpy as np
import torch
from harness import RankPools
from libraries.comparing import (
    BATCH_SIZE,
    NAME,
    QUIET,
    STEPS,
    TOLERANCE,
    WORLD_SIZE,
    Strategy,
    assert_trains_as_ddp,
    difference,
    trained,
)
from lightning.pytorch import Callback


def series(strategy: Strategy, callbacks: list[Callback], windows: int | None) -> None:
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import MLP

    generator = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=24)
    table = pd.concat(
        pd.DataFrame({"unique_id": str(number), "ds": days, "y": generator.normal(size=len(days)) + number % 3})
        for number in range(WORLD_SIZE * BATCH_SIZE)
    )
    model = MLP(
        h=2, input_size=6, hidden_size=8, num_layers=1, max_steps=STEPS, batch_size=BATCH_SIZE,
        windows_batch_size=windows, optimizer=torch.optim.SGD, learning_rate=0.05, accelerator="cpu",
        devices=WORLD_SIZE, strategy=strategy, callbacks=callbacks, **QUIET,
    )  # fmt: skip
    NeuralForecast(models=[model], freq="D").fit(table, val_size=4)


def test_all_windows_of_the_series(ranks: RankPools) -> None:
    # a false alarm: it gathers sums and counts
    assert_trains_as_ddp(ranks, series, None, unequal=NAME, warning="`all_gather`")


def test_a_fixed_number_of_windows_depends_on_the_shares(ranks: RankPools) -> None:
    """Each rank draws from its own series; the page on libraries says so."""
    found, expected = (trained(ranks, series, name, 16) for name in (NAME, "ddp"))
    assert difference(found, expected) > TOLERANCE
