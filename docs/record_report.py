"""Train on three ranks of known speed, and take a picture of the run's report with Chromium.

    python docs/record_report.py docs/images/report.png

Rank 0 is twice as fast as the others. It becomes half as fast at step 80, and recovers at step 160.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroDDPStrategy, LoadBalancer
from lightning_hetero.testing import SlowDown

STEPS, THROTTLED_AT, RECOVERED_AT = 240, 80, 160
RANKS, BATCH_SIZE = 3, 64
WIDTH, HEIGHT = 1200, 2790


class Model(LightningModule):
    """A network whose own time does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 1)

    def training_step(self, batch: Any) -> Tensor:
        """Return the mean squared error of the batch."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Throttle(Callback):
    """Changes the speed of rank 0 at two steps.

    Args:
        slow_down: Callback whose factors are changed.
    """

    def __init__(self, slow_down: SlowDown) -> None:
        self.slow_down = slow_down

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Change the speed after the step before the change."""
        self.slow_down.factors[0] *= {THROTTLED_AT: 2.0, RECOVERED_AT: 0.5}.get(trainer.global_step, 1.0)


def train(folder: str) -> None:
    """Train, and keep the record of the run in ``folder``."""
    slow_down = SlowDown([1, 2, 2], seconds_per_sample=0.0025, overhead_s=0.010)
    data = TensorDataset(torch.randn(STEPS * RANKS * BATCH_SIZE, 8), torch.randn(STEPS * RANKS * BATCH_SIZE, 1))
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=HeteroDDPStrategy(start_method="fork"),
        max_epochs=1,
        callbacks=[slow_down, Throttle(slow_down), LoadBalancer(record=folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(data, batch_size=BATCH_SIZE))


def main(picture: str) -> None:
    """Train, write the report, and take its picture."""
    with tempfile.TemporaryDirectory() as folder:
        train(folder)
        page = Path(folder, "report.html")
        subprocess.run([sys.executable, "-m", "lightning_hetero", "report", folder, "--output", str(page)], check=True)
        window = f"--window-size={WIDTH},{HEIGHT}"
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={Path(picture).resolve()}", window]
        subprocess.run(["chromium", *options, page.as_uri()], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
