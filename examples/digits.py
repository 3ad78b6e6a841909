"""Train on scanned digits with ``ddp`` and with ``hetero_ddp``, on two CPU ranks, one of which runs at half speed.

Without arguments it trains with both strategies, one after the other, and compares them:

    python examples/digits.py

With a subcommand it is a LightningCLI:

    python examples/digits.py fit --config examples/digits.yaml

The data are the 1797 scans of handwritten digits that ship with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_hetero.cli import HeteroCLI
from lightning_hetero.testing import SlowDown

EVALUATION_SIZE = 358


class DigitsData(LightningDataModule):
    """Scans of 8 x 8 pixels, split into 1438 for training and 358 for evaluation.

    One of the 1797 scans is left out: ``ddp`` pads datasets of odd size with duplicates, so the two strategies would
    not train on the same data.

    Args:
        batch_size: Number of samples per rank in one step under equal shares.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Read the scans; ``stage`` is ignored."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:-1]
        self.evaluation = TensorDataset(images[order[:EVALUATION_SIZE]], labels[order[:EVALUATION_SIZE]])
        self.training = TensorDataset(images[order[EVALUATION_SIZE:]], labels[order[EVALUATION_SIZE:]])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches in order."""
        return DataLoader(self.evaluation, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches in order."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches in order."""
        return self.val_dataloader()


class DigitsClassifier(LightningModule):
    """A small convolutional network; an ordinary LightningModule that knows nothing of lightning_hetero.

    Args:
        width: Number of channels of the first layer.
        learning_rate: Learning rate of SGD with momentum.
    """

    def __init__(self, width: int = 8, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 4, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def _evaluate(self, batch: Any) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("accuracy", self.accuracy)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the accuracy."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update and log the accuracy."""
        self._evaluate(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the most probable digits."""
        best: Tensor = self.network(batch[0]).argmax(-1)
        return best

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], momentum=0.9)


class Throughput(Callback):
    """Measures the samples per second of the training, from its start to its end."""

    samples_per_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start_s = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        samples = trainer.current_epoch * len(trainer.datamodule.training)  # type: ignore[attr-defined]
        self.samples_per_s = samples / (time.perf_counter() - self._start_s)


def train(strategy: str, epochs: int, width: int, slow_down: SlowDown) -> tuple[float, float, Tensor]:
    """Train with ``strategy`` on two ranks; return samples/s, accuracy and all parameters."""
    seed_everything(0, verbose=False)
    model, data, throughput = DigitsClassifier(width), DigitsData(), Throughput()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[slow_down, throughput],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["accuracy"]
    return throughput.samples_per_s, accuracy, parameters


def compare(factors: list[float], epochs: int, width: int, seconds_per_sample: float | None) -> None:
    """Train with both strategies, and compare speed, accuracy and parameters."""
    warnings.filterwarnings("ignore", module="lightning.*|torch.*")
    runs = {}
    for strategy in ("ddp", "hetero_ddp"):
        slow_down = SlowDown(factors, seconds_per_sample)
        rank_zero_info(f"training with {strategy}")
        runs[strategy] = train(strategy, epochs, width, slow_down)
    if not _is_rank_zero():
        return
    (ddp_samples_per_s, ddp_accuracy, ddp_parameters), (samples_per_s, accuracy, parameters) = runs.values()
    table = Table()
    for heading in ("", "ddp", "hetero_ddp"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("samples/s, tuning included", f"{ddp_samples_per_s:.0f}", f"{samples_per_s:.0f}")
    table.add_row("accuracy", f"{ddp_accuracy:.4f}", f"{accuracy:.4f}")
    bound = max(factors) * sum(1 / factor for factor in factors) / len(factors)
    console = Console(highlight=False)
    console.print(
        f"digits, {epochs} epochs on two CPU ranks, slowed down by factors of {factors[0]:g} and {factors[1]:g}"
    )
    console.print(table)
    console.print(f"ratio {samples_per_s / ddp_samples_per_s:.2f} of at most {bound:.2f}")
    console.print(f"largest difference of a parameter {(parameters - ddp_parameters).abs().max():.1e}")


def _is_rank_zero() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def main() -> None:
    """Compare the strategies, or run the LightningCLI if a subcommand is given."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
        # No copy of the configuration is saved, so that the command can be repeated.
        HeteroCLI(DigitsClassifier, DigitsData, save_config_callback=None)
        return
    parser = argparse.ArgumentParser(description="Compare ddp and hetero_ddp on two unequal CPU ranks.")
    parser.add_argument(
        "--factors",
        type=float,
        nargs=2,
        default=[1.0, 2.0],
        help="how many times as long each rank takes (default: 1 2)",
    )
    parser.add_argument("--epochs", type=int, default=20, help="number of epochs of 12 steps each (default: 20)")
    parser.add_argument(
        "--width", type=int, default=8, help="number of channels of the network's first layer (default: 8)"
    )
    parser.add_argument(
        "--seconds-per-sample",
        type=float,
        default=0.001,
        help="seconds that a sample takes on a rank of factor 1; 0 slows down the machine's real work instead"
        " (default: 0.001)",
    )
    arguments = parser.parse_args()
    compare(arguments.factors, arguments.epochs, arguments.width, arguments.seconds_per_sample or None)


if __name__ == "__main__":
    main()
