"""Train a transformer whose layers are split over two CPU ranks, one of which runs at half speed.

Without arguments it trains with equal stages and with those that ``hetero_pipeline`` finds, and compares them:

    python examples/characters.py

With a subcommand it is a LightningCLI:

    python examples/characters.py fit --config examples/characters.yaml

The text is the source code of modules of Python's standard library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import textwrap
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.cli import HeteroCLI
from lightning_hetero.testing import SlowLayers

PREPARING_STEPS = 2


class SourceText(LightningDataModule):
    """Pieces of the standard library's source code: characters, and for each the one that follows it.

    Args:
        batch_size: Number of pieces in a global batch.
        length: Number of characters in a piece.
    """

    def __init__(self, batch_size: int = 32, length: int = 64) -> None:
        super().__init__()
        self.batch_size, self.length = batch_size, length

    def setup(self, stage: str) -> None:
        """Read the source code; ``stage`` is ignored."""
        text = "".join(inspect.getsource(module) for module in (inspect, json, textwrap, argparse)).encode()
        pieces = (len(text) - 1) // self.length
        characters = torch.tensor(list(text[: pieces * self.length + 1]))
        inputs, targets = characters[:-1].view(-1, self.length), characters[1:].view(-1, self.length)
        order = torch.randperm(pieces, generator=torch.Generator().manual_seed(0))
        evaluation, training = order[: pieces // 10], order[pieces // 10 :]
        self.training = TensorDataset(inputs[training], targets[training])
        self.evaluation = TensorDataset(inputs[evaluation], targets[evaluation])

    def _loader(self, data: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(data, batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of nine tenths of the text."""
        return self._loader(self.training, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of the remaining tenth of the text."""
        return self._loader(self.evaluation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the same tenth as for validation."""
        return self._loader(self.evaluation)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of the same tenth as for validation."""
        return self._loader(self.evaluation)


class Embedding(nn.Module):
    """Turns characters and their positions into vectors."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(256, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Return vectors of shape ``(pieces, length, width)``."""
        vectors: Tensor = self.characters(characters) + self.positions[: characters.shape[1]]
        return vectors


class Block(nn.Module):
    """Attention to the preceding characters, and a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return vectors of the same shape."""
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], device=hidden.device)
        output: Tensor = self.layer(hidden, src_mask=mask, is_causal=True)
        return output


class CharacterModel(LightningModule):
    """Predicts the next character; an ordinary LightningModule whose model is a sequence of layers.

    Args:
        width: Size of the vectors between layers.
        blocks: Number of layers between the embedding and the scores.
        length: Largest number of characters in a piece.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, width: int = 32, blocks: int = 10, length: int = 64, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            Embedding(width, length), *(Block(width) for _ in range(blocks)), nn.Linear(width, 256)
        )

    def _loss(self, batch: Any) -> Tensor:
        characters, following = batch
        return nn.functional.cross_entropy(self.model(characters).transpose(1, 2), following)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean negative log-likelihood of the following characters."""
        loss = self._loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the most probable characters."""
        best: Tensor = self.model(batch[0]).argmax(-1)
        return best

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        # Biases of keys have no gradient but for rounding, which AdamW would scale up with its usual `eps`.
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], eps=1e-6)


class StepTimes(Callback):
    """Measures the duration of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note when the step ends."""
        self.ends.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Return the median duration of a step, without the first steps, which prepare the stages."""
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return 1e3 * statistics.median(steps[PREPARING_STEPS:])


def train(strategy: HeteroPipelineStrategy, steps: int, slow: SlowLayers) -> tuple[float, float, Tensor]:
    """Train on two ranks; return milliseconds per step, the last loss and all parameters."""
    seed_everything(0, verbose=False)
    model, times = CharacterModel(), StepTimes()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=steps,
        callbacks=[slow, times],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=SourceText())
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return times.milliseconds(), float(trainer.callback_metrics["loss"]), parameters


def compare(factors: list[float], steps: int, seconds_per_sample: float) -> None:
    """Train with equal stages and with those found, and compare speed, loss and parameters."""
    warnings.filterwarnings("ignore", module="lightning.*|torch.*")
    layers = len(list(CharacterModel().model))
    equal = HeteroPipelineStrategy(splits=[layers // 2], num_microbatches=8)
    found = HeteroPipelineStrategy(num_microbatches=8)
    runs = [train(strategy, steps, SlowLayers(factors, seconds_per_sample)) for strategy in (equal, found)]
    if torch.distributed.get_rank():
        return
    (equal_ms, equal_loss, equal_parameters), (found_ms, found_loss, found_parameters) = runs
    table = Table()
    for heading in ("", "equal stages", "hetero_pipeline"):
        table.add_column(heading, justify="right" if heading else "left")
    assert equal.plan is not None
    assert found.plan is not None
    table.add_row("layers per rank", *(", ".join(map(str, p.layers_of_ranks)) for p in (equal.plan, found.plan)))
    table.add_row("ms per step", f"{equal_ms:.0f}", f"{found_ms:.0f}")
    table.add_row("last loss", f"{equal_loss:.4f}", f"{found_loss:.4f}")
    console = Console(highlight=False)
    console.print(
        f"{layers} layers, {steps} steps on two CPU ranks, slowed down by factors of {factors[0]:g} and {factors[1]:g}"
    )
    console.print(table)
    console.print(f"speed-up {equal_ms / found_ms:.2f} over equal stages")
    console.print(f"largest difference of a parameter {(found_parameters - equal_parameters).abs().max():.1e}")


def main() -> None:
    """Compare, or run the LightningCLI if a subcommand is given."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
        # No copy of the configuration is saved, so that the command can be repeated.
        HeteroCLI(CharacterModel, SourceText, save_config_callback=None)
        return
    parser = argparse.ArgumentParser(
        description="Compare equal stages with those that hetero_pipeline finds, on two unequal CPU ranks."
    )
    parser.add_argument(
        "--factors",
        type=float,
        nargs=2,
        default=[1.0, 2.0],
        help="how many times as long each rank takes (default: 1 2)",
    )
    parser.add_argument("--steps", type=int, default=20, help="number of training steps of each run (default: 20)")
    parser.add_argument(
        "--seconds-per-sample",
        type=float,
        default=0.002,
        help="seconds that a layer takes per sample on a rank of factor 1 (default: 0.002)",
    )
    arguments = parser.parse_args()
    compare(arguments.factors, arguments.steps, arguments.seconds_per_sample)


if __name__ == "__main__":
    main()
