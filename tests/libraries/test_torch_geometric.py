"""PyTorch Geometric: batches of graphs, which count by graphs, and losses over nodes."""

from __future__ import annotations

from typing import Any

import torch
from harness import RankPools
from libraries.comparing import (
    BATCH_SIZE,
    SAMPLES,
    WORLD_SIZE,
    Strategy,
    assert_trains_as_ddp,
    assert_trains_as_one_process,
    trainer_of,
)
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

FEATURES = 4


class OfGraphs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCN

        self.network = GCN(FEATURES, 16, 2, out_channels=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        return torch.nn.functional.mse_loss(global_mean_pool(self.of_nodes(batch), batch.batch), batch.of_graph)

    def of_nodes(self, batch: Any) -> Tensor:
        result: Tensor = self.network(batch.x, batch.edge_index)
        return result

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OfNodes(OfGraphs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.mse_loss(self.of_nodes(batch), batch.of_nodes)


def random_graphs() -> list[Any]:
    from torch_geometric.data import Data

    return [
        Data(
            x=torch.randn(nodes, FEATURES), edge_index=torch.randint(nodes, (2, 2 * nodes)),
            of_graph=torch.randn(1, 1), of_nodes=torch.randn(nodes, 1),
        )
        for nodes in (3 + i % 5 for i in range(SAMPLES))
    ]  # fmt: skip


def graphs(strategy: Strategy, callbacks: list[Callback]) -> None:
    from torch_geometric.loader import DataLoader

    trainer = trainer_of(strategy, callbacks)
    trainer.fit(OfGraphs(), DataLoader(random_graphs(), batch_size=BATCH_SIZE, shuffle=True))


def data_module(strategy: Strategy, callbacks: list[Callback]) -> None:
    from torch_geometric.data.lightning import LightningDataset

    trainer = trainer_of(strategy, callbacks)
    trainer.fit(OfGraphs(), datamodule=LightningDataset(random_graphs(), batch_size=BATCH_SIZE))


def nodes(strategy: Strategy, callbacks: list[Callback], devices: int) -> None:
    from torch_geometric.loader import DataLoader

    trainer = trainer_of(strategy, callbacks, devices)
    batch_size = WORLD_SIZE * BATCH_SIZE // devices
    trainer.fit(OfNodes(), DataLoader(random_graphs(), batch_size=batch_size, shuffle=True))


def number_of_nodes(batch: Any) -> int:
    return int(batch.num_nodes)


def test_a_loss_of_graphs(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, graphs)


def test_a_data_module(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, data_module)


def test_a_loss_of_nodes(ranks: RankPools) -> None:
    assert_trains_as_one_process(ranks, nodes, number_of_nodes)
