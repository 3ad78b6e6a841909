"""scvi-tools: its sampler gives each rank batches of its own, which are never divided."""

from __future__ import annotations

import numpy as np
import pytest
from harness import RankError, RankPools
from libraries.comparing import BATCH_SIZE, OBJECT, QUIET, SAMPLES, SEED, WORLD_SIZE, Strategy, difference, trained
from lightning.pytorch import Callback

EPOCHS = 2


def cells(strategy: Strategy, callbacks: list[Callback]) -> None:
    import anndata
    import scvi

    scvi.settings.seed = SEED  # without it each rank splits the cells differently
    counts = np.random.default_rng(0).poisson(3.0, size=(SAMPLES // EPOCHS, 12)).astype(np.float32)
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_hidden=8, n_latent=2)
    model.train(
        max_epochs=EPOCHS, batch_size=BATCH_SIZE, train_size=0.9, check_val_every_n_epoch=1, accelerator="cpu",
        devices=WORLD_SIZE, strategy=strategy, callbacks=callbacks, **QUIET,
    )  # fmt: skip


def test_nothing_is_balanced_and_nothing_differs(ranks: RankPools) -> None:
    found = trained(ranks, cells, "hetero_ddp_find_unused_parameters_true")
    assert "nothing is balanced" in found[0].said
    assert difference(found, trained(ranks, cells, "ddp_find_unused_parameters_true")) == 0.0


def test_shares_are_refused(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="`shares` cannot be honoured for the training loader 'AnnDataLoader'"):
        trained(ranks, cells, OBJECT, find_unused_parameters=True)
