"""Fine-tune a small decoder of transformers whose layers are split over two CPU ranks, one of which runs at half speed.

    python examples/fine_tuning.py fit --config examples/fine_tuning.yaml

The model is built from a configuration and the text is the source code of modules of Python's standard library, so
nothing is downloaded. The module calls the model as on one device. It needs ``pip install transformers``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hetero.cli import HeteroCLI

PADDING, IGNORED = 0, -100


def predicted_tokens(batch: Any) -> int:
    """Return how many tokens the loss is a mean over: a decoder predicts each token but the first."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class SourceLines(LightningDataModule):
    """Lines of the standard library's source code, each byte a token, padded to the longest line of a batch.

    Args:
        batch_size: Number of lines in a global batch.
        length: Largest number of characters in a line; the rest of longer lines is cut off.
    """

    def __init__(self, batch_size: int = 32, length: int = 64) -> None:
        super().__init__()
        self.batch_size, self.length = batch_size, length

    def setup(self, stage: str) -> None:
        """Read the source code; ``stage`` is ignored."""
        text = "".join(inspect.getsource(module) for module in (inspect, json, textwrap, argparse))
        lines = [line.encode()[: self.length] for line in text.splitlines() if len(line) > 1]
        self.evaluation, self.training = lines[::10], [line for i, line in enumerate(lines) if i % 10]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return nine lines of ten."""
        return DataLoader(self.training, self.batch_size, shuffle=True, collate_fn=self.padded)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the others."""
        return DataLoader(self.evaluation, self.batch_size, collate_fn=self.padded)  # type: ignore[arg-type]

    @staticmethod
    def padded(lines: list[bytes]) -> dict[str, Tensor]:
        """Return lines as a batch of one length, with a mask of what is not padding."""
        longest = max(map(len, lines))
        tokens = torch.tensor([[*line, *[PADDING] * (longest - len(line))] for line in lines])
        mask = tokens != PADDING
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.where(mask, torch.tensor(IGNORED))}


class FineTuning(LightningModule):
    """A decoder with the sizes of a configuration.

    Args:
        width: Number of features of a token.
        blocks: Number of blocks.
        learning_rate: Learning rate of AdamW.
    """

    def __init__(self, width: int = 64, blocks: int = 6, learning_rate: float = 1e-3) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.learning_rate = learning_rate
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
            num_attention_heads=4, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=PADDING,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss that the model computes."""
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss that the model computes."""
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    HeteroCLI(FineTuning, SourceLines)
