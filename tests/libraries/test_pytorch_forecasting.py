"""pytorch-forecasting: its data loaders, networks and losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import RankPools
from libraries.comparing import BATCH_SIZE, STEPS, WORLD_SIZE, Strategy, assert_trains_as_ddp, trainer_of
from lightning.pytorch import Callback

INPUT, OUTPUT = 6, 2
SETTINGS = {"optimizer": "sgd", "learning_rate": 0.05, "log_interval": -1}
NETWORKS: dict[str, dict[str, Any]] = {
    "TemporalFusionTransformer": {
        "hidden_size": 8, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.0,
    },
    "DeepAR": {"hidden_size": 8, "rnn_layers": 1, "dropout": 0.0},
    "NBeats": {
        "stack_types": ["generic"], "num_blocks": [1], "num_block_layers": [1], "widths": [8],
        "expansion_coefficient_lengths": [4], "sharing": [False], "dropout": 0.0, "backcast_loss_ratio": 0.1,
    },
}  # fmt: skip


def series(strategy: Strategy, callbacks: list[Callback], network: str) -> None:
    import pandas as pd
    import pytorch_forecasting

    trainer = trainer_of(strategy, callbacks)
    generator = np.random.default_rng(0)
    numbers, times = range(WORLD_SIZE * BATCH_SIZE), range(INPUT + OUTPUT + STEPS - 1)  # one window per step and series
    table = pd.DataFrame(
        [
            {"series": str(number), "time": time, "value": generator.normal() + number % 3, "known": generator.normal()}
            for number in numbers
            for time in times
        ]
    )
    data = pytorch_forecasting.TimeSeriesDataSet(
        table, time_idx="time", target="value", group_ids=["series"], min_encoder_length=INPUT,
        max_encoder_length=INPUT, max_prediction_length=OUTPUT, time_varying_unknown_reals=["value"],
        time_varying_known_reals=[] if network == "NBeats" else ["known"],
    )  # fmt: skip
    model = getattr(pytorch_forecasting, network).from_dataset(data, **NETWORKS[network], **SETTINGS)
    validation = pytorch_forecasting.TimeSeriesDataSet.from_dataset(data, table, predict=True)
    trainer.fit(
        model,
        data.to_dataloader(train=True, batch_size=BATCH_SIZE),
        validation.to_dataloader(train=False, batch_size=BATCH_SIZE),
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_series(ranks: RankPools, network: str) -> None:
    assert_trains_as_ddp(ranks, series, network, warning="'val_loss' is monitored, but differs between ranks")
