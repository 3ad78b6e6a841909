"""transformers: a model that computes its loss itself, in a LightningModule."""

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
from torch.utils.data import DataLoader

LENGTH = 12
IGNORED = -100  # a label that transformers leaves out of the mean


class Model(LightningModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.model(**batch).loss
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def classifier(strategy: Strategy, callbacks: list[Callback]) -> None:
    from transformers import BertConfig, BertForSequenceClassification, default_data_collator

    trainer = trainer_of(strategy, callbacks)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    data: Any = [
        {"input_ids": torch.randint(50, (LENGTH,)), "attention_mask": first(4 + i % 9), "labels": i % 2}
        for i in range(SAMPLES)
    ]
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, collate_fn=default_data_collator)
    trainer.fit(Model(BertForSequenceClassification(config)), loader)


def language_model(strategy: Strategy, callbacks: list[Callback], devices: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

    trainer = trainer_of(strategy, callbacks, devices)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    data: Any = []
    for i in range(SAMPLES):
        tokens, kept = torch.randint(50, (LENGTH,)), first(2 + i % 11)
        data.append(
            {"input_ids": tokens, "attention_mask": kept, "labels": tokens.where(kept.bool(), torch.tensor(IGNORED))}
        )
    batch_size = WORLD_SIZE * BATCH_SIZE // devices
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, collate_fn=default_data_collator)
    trainer.fit(Model(LlamaForCausalLM(config)), loader)


def first(length: int) -> Tensor:
    """Return a mask of the first tokens."""
    return (torch.arange(LENGTH) < length).long()


def predicted_tokens(batch: Any) -> int:
    """Return how many tokens the loss is a mean over: the first of a text is not predicted."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def test_a_classifier(ranks: RankPools) -> None:
    assert_trains_as_ddp(ranks, classifier)


def test_a_language_model_of_texts_of_several_lengths(ranks: RankPools) -> None:
    assert_trains_as_one_process(ranks, language_model, predicted_tokens)
