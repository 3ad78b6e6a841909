"""timm: models in a LightningModule, with layer and with batch normalisation."""

from __future__ import annotations

from typing import Any

import torch
from harness import RankPools
from libraries.comparing import (
    BATCH_SIZE,
    OBJECT,
    SAMPLES,
    WORLD_SIZE,
    Strategy,
    assert_trains_as_ddp,
    shares_differ,
    trained,
    trainer_of,
)
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4
ODD_ONES = 6  # samples in a ragged last batch


class Model(LightningModule):
    def __init__(self, model: Any, mixup: Any = None) -> None:
        super().__init__()
        self.model = model
        self.mixup = mixup

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch if self.mixup is None else self.mixup(*batch)
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def images(samples: int) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(CLASSES, (samples,)))
    return DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)


def vision_transformer(strategy: Strategy, callbacks: list[Callback]) -> None:
    import timm

    trainer = trainer_of(strategy, callbacks)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    )
    trainer.fit(Model(model), images(SAMPLES))


def resnet(strategy: Strategy, callbacks: list[Callback], mixup: bool) -> None:
    import timm

    trainer = trainer_of(strategy, callbacks, max_steps=-1, max_epochs=2)
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    mixed = timm.data.Mixup(num_classes=CLASSES) if mixup else None
    trainer.fit(Model(model, mixed), images(2 * WORLD_SIZE * BATCH_SIZE + ODD_ONES))


def test_a_vision_transformer(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, vision_transformer)


def test_batch_normalisation_trains_with_a_warning(ranks: RankPools) -> None:
    """Also a last batch of which one rank would get a single image, which batch normalisation refuses."""
    found = trained(ranks, resnet, OBJECT, False)
    assert shares_differ(found)
    assert "batch normalisation" in found[0].said


def test_mixup_gets_pairs(ranks: RankPools) -> None:
    found = trained(ranks, resnet, OBJECT, True, batch_multiple=2)
    assert shares_differ(found)
    assert all(samples % 2 == 0 for rank in found for samples in rank.samples)
