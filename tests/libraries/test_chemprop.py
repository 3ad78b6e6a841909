"""chemprop: molecules, with and without batch normalisation, with and without missing targets."""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import RankPools
from libraries.comparing import (
    BATCH_SIZE,
    OBJECT,
    SAMPLES,
    WORLD_SIZE,
    Strategy,
    assert_trains_as_ddp,
    assert_trains_as_one_process,
    shares_differ,
    trained,
    trainer_of,
)
from lightning.pytorch import Callback

EPOCHS = 2
TARGETS = 2
VALIDATED = 5  # molecules, of which one rank has more
MISSING = 0.4  # of the targets


def fit(
    strategy: Strategy, callbacks: list[Callback], samples: int, devices: int = WORLD_SIZE, missing: float = 0.0,
    batch_norm: bool = False,
) -> None:  # fmt: skip
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    trainer = trainer_of(strategy, callbacks, devices, max_steps=-1, max_epochs=EPOCHS)
    generator = np.random.default_rng(0)
    targets = generator.normal(size=(samples, TARGETS))
    targets[generator.random(targets.shape) < missing] = np.nan
    smiles = ["C" * (1 + i % 7) + "ON"[i % 2] for i in range(samples)]
    points = [MoleculeDatapoint.from_smi(*pair) for pair in zip(smiles, targets, strict=True)]
    model = MPNN(
        BondMessagePassing(d_h=16, depth=2), MeanAggregation(),
        RegressionFFN(n_tasks=TARGETS, input_dim=16, hidden_dim=16), batch_norm=batch_norm, warmup_epochs=1,
    )  # fmt: skip
    batch_size = WORLD_SIZE * BATCH_SIZE // devices
    validation = build_dataloader(MoleculeDataset(points[:VALIDATED]), batch_size=batch_size, shuffle=False)
    trainer.fit(model, build_dataloader(MoleculeDataset(points), batch_size=batch_size, seed=0), validation)


def molecules(strategy: Strategy, callbacks: list[Callback]) -> None:
    fit(strategy, callbacks, SAMPLES // EPOCHS)


def missing_targets(strategy: Strategy, callbacks: list[Callback], devices: int) -> None:
    fit(strategy, callbacks, SAMPLES // EPOCHS, devices, MISSING)


def normalised(strategy: Strategy, callbacks: list[Callback]) -> None:
    # a last batch of which one rank would get a single molecule, which batch normalisation refuses
    fit(strategy, callbacks, 2 * WORLD_SIZE * BATCH_SIZE + 6, batch_norm=True)


def number_of_targets(batch: Any) -> int:
    return int(batch.Y.isfinite().sum())


def test_molecules(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, molecules)


def test_missing_targets(ranks: RankPools) -> None:
    assert_trains_as_one_process(ranks, missing_targets, number_of_targets)


def test_batch_normalisation_trains_with_a_warning(ranks: RankPools) -> None:
    found = trained(ranks, normalised, OBJECT)
    assert shares_differ(found)
    assert "batch normalisation" in found[0].said
