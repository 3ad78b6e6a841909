"""A user's script: ``other_package.py IMPORTS PACKAGE STRATEGY...`` trains with each strategy on two ranks.

IMPORTS are Python statements that come before all others. Prints one line of JSON per strategy: the parameters, and the
sizes of the mini-batches of each rank.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
exec(sys.argv[1])

import torch  # noqa: E402  # after the imports that are tested
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import lightning_hetero  # noqa: E402

PACKAGE = import_module(sys.argv[2])
HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer = (
    globals().get(name, getattr(lightning_hetero, name))
    for name in ("HeteroDDPStrategy", "HeteroPipelineStrategy", "LoadBalancer")
)
lightning_hetero.register("one_to_three", "hetero_ddp_fork", shares=[1, 3])
lightning_hetero.register("split_after_one", "hetero_pipeline", start_method="fork", splits=[1], num_microbatches=2)


class Module(PACKAGE.LightningModule):  # type: ignore[name-defined,misc]  # whichever package is tried
    def __init__(self, folder: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.folder = folder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, targets = batch
        with Path(self.folder, f"rank{self.global_rank}").open("a") as file:
            file.write(f"{len(features)} ")
        loss = nn.functional.mse_loss(self.model(features), targets)
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features, targets = batch
        self.log("val_loss", nn.functional.mse_loss(self.model(features), targets), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(given: str) -> None:
    """Train with a strategy: "alone" for one device, a name, or an expression, in which callbacks may follow."""
    strategy = given if given.isidentifier() else eval(given)
    callbacks = []
    if isinstance(strategy, tuple):
        strategy, *callbacks = strategy
    PACKAGE.seed_everything(7, verbose=False)
    generator = torch.Generator().manual_seed(1)
    features, targets = (torch.randn(44, width, generator=generator).double() for width in (5, 1))
    data = TensorDataset(features, targets)
    with tempfile.TemporaryDirectory() as folder:
        module = Module(folder)
        ranks = {"strategy": "auto", "devices": 1} if given == "alone" else {"strategy": strategy, "devices": 2}
        trainer = PACKAGE.Trainer(
            accelerator="cpu", **ranks, max_epochs=3, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        loader = DataLoader(data, batch_size=4, shuffle=True)
        trainer.fit(module, loader, DataLoader(data, batch_size=4))
        if trainer.is_global_zero:
            sizes = [[int(n) for n in path.read_text().split()] for path in sorted(Path(folder).iterdir())]
            parameters = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
            value = float(trainer.callback_metrics["val_loss"])
            sys.stdout.write(json.dumps({"parameters": [*parameters, value], "sizes": sizes}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    for strategy in sys.argv[3:]:
        main(strategy)
