"""lightly: losses of each image by itself, and losses that compare the images of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import RankError, RankPools
from libraries.comparing import (
    BATCH_SIZE,
    OBJECT,
    SAMPLES,
    TOLERANCE,
    Strategy,
    assert_trains_as_ddp,
    difference,
    shares_differ,
    trained,
    trainer_of,
)
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

PIXELS = 48


class TwoViews(Dataset[Any]):
    """Two views of each image, as lightly's transforms make them; always the same two."""

    def __init__(self) -> None:
        self.views = torch.randn(SAMPLES, 1, PIXELS) + 0.1 * torch.randn(SAMPLES, 2, PIXELS)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Any:
        return list(self.views[index]), index, f"{index}.png"


class Siamese(LightningModule):
    """SimSiam, without batch normalisation in its heads."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules.heads import ProjectionHead

        self.backbone = nn.Linear(PIXELS, 16)
        self.projection = ProjectionHead([(16, 16, None, nn.ReLU()), (16, 8, None, None)])
        self.prediction = ProjectionHead([(8, 8, None, nn.ReLU()), (8, 8, None, None)])
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z0, z1 = (self.projection(self.backbone(view)) for view in batch[0])
        p0, p1 = self.prediction(z0), self.prediction(z1)
        loss: Tensor = (self.criterion(p0, z1.detach()) + self.criterion(p1, z0.detach())) / 2
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Compared(LightningModule):
    """A loss that compares the images of a batch, for example SimCLR's, for which the others are the negatives."""

    def __init__(self, loss: str, gather: bool) -> None:
        super().__init__()
        import lightly.loss
        from lightly.models.modules.heads import ProjectionHead

        self.backbone = nn.Linear(PIXELS, 16)
        self.projection = ProjectionHead([(16, 16, None, nn.ReLU()), (16, 8, None, None)])
        self.criterion = getattr(lightly.loss, loss)(gather_distributed=gather)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(*(self.projection(self.backbone(view)) for view in batch[0]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005)


def siamese(strategy: Strategy, callbacks: list[Callback]) -> None:
    trainer = trainer_of(strategy, callbacks)
    trainer.fit(Siamese(), DataLoader(TwoViews(), batch_size=BATCH_SIZE, shuffle=True))


def compared(strategy: Strategy, callbacks: list[Callback], loss: str, gather: bool) -> None:
    trainer = trainer_of(strategy, callbacks)
    trainer.fit(Compared(loss, gather), DataLoader(TwoViews(), batch_size=BATCH_SIZE, shuffle=True))


def test_a_loss_of_each_image(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, siamese)


# which gather embeddings, and sum what has the same shape on all ranks
of_all_ranks = pytest.mark.parametrize("loss", ["NTXentLoss", "VICRegLoss", "BarlowTwinsLoss"])


@of_all_ranks
def test_a_loss_of_all_ranks_keeps_the_shares_equal(ranks: RankPools, loss: str) -> None:
    found = trained(ranks, compared, "hetero_ddp", loss, True)
    assert not shares_differ(found)
    assert "shares stay equal" in found[0].said
    assert difference(found, trained(ranks, compared, "ddp", loss, True)) < TOLERANCE


@of_all_ranks
def test_a_loss_of_all_ranks_refuses_unequal_shares(ranks: RankPools, loss: str) -> None:
    with pytest.raises(RankError, match="UnsupportedFeatureError"):
        trained(ranks, compared, OBJECT, loss, True)


def test_a_loss_over_the_images_of_a_rank_depends_on_the_shares(ranks: RankPools) -> None:
    """As it depends on the number of ranks under ddp; the page on libraries says so."""
    found, expected = (trained(ranks, compared, name, "NTXentLoss", False) for name in (OBJECT, "ddp"))
    assert difference(found, expected) > TOLERANCE
