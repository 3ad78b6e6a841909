"""Families of models as their libraries build them, and one short training of each on one device or in stages.

Libraries are imported inside the functions: what collects the tests needs none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH_SIZE, BATCHES, LENGTH, IMAGE = 8, 3, 12, 64
VOCABULARY, CLASSES, IGNORED = 50, 3, -100
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """How a model is built, and what it is trained on.

    Attributes:
        build: Function that returns the model, with small sizes and random parameters.
        data: "text" for a language model, "classes" for texts with a class, "images".
        lora: Names of the modules to which LoRA adds parameters; empty if it is not tried.
        normalises: Whether batches are normalised, so that micro-batches make a difference.
        library: Where it comes from.
    """

    build: Callable[[], Any]
    data: str
    lora: tuple[str, ...] = ()
    normalises: bool = False
    library: str = "transformers"


def _decoder(name: str, **options: Any) -> Family:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**SMALL, **options}))

    return Family(build, "text", ("qkv_proj",) if name == "Phi3" else ("q_proj", "v_proj"))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32, **no_dropout)
    )


def _encoder(name: str, **options: Any) -> Family:
    def build() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**{**SMALL, **NO_DROPOUT, "num_labels": CLASSES, **options})
        return getattr(transformers, f"{name}ForSequenceClassification")(config)

    return Family(build, "classes", ("Wqkv",) if name == "ModernBert" else ("query", "value"))


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    return ViTForImageClassification(ViTConfig(**sizes, **NO_DROPOUT, image_size=IMAGE, num_labels=CLASSES))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def _timm(name: str, normalises: bool = False, **options: Any) -> Family:
    def build() -> Any:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return Family(build, "images", normalises=normalises, library="timm")


def _torchvision(name: str, normalises: bool = False, **options: Any) -> Family:
    def build() -> Any:
        import libraries.torchvision_operators  # noqa: F401  before torchvision
        import torchvision

        make: Any = getattr(torchvision.models, name)
        return make(num_classes=CLASSES, **options)

    return Family(build, "images", normalises=normalises, library="torchvision")


FAMILIES: dict[str, Family] = {
    "GPT-2": Family(_gpt2, "text", ("c_attn",)),
    "Llama": _decoder("Llama"),
    "Qwen2": _decoder("Qwen2", num_key_value_heads=1, use_sliding_window=True, max_window_layers=1, sliding_window=4),
    "Qwen3": _decoder("Qwen3", num_key_value_heads=1, head_dim=8),
    "Mistral": _decoder("Mistral", num_key_value_heads=1, sliding_window=4),
    "Gemma": _decoder("Gemma", num_key_value_heads=1, head_dim=8),
    "Gemma 2": _decoder("Gemma2", num_key_value_heads=1, head_dim=8, sliding_window=4),
    "Gemma 3": _decoder("Gemma3", num_key_value_heads=1, head_dim=8, sliding_window=4),
    "Phi-3": _decoder("Phi3", num_key_value_heads=1, pad_token_id=0),
    "OPT": _decoder("OPT", ffn_dim=32, word_embed_proj_dim=16, dropout=0.0),
    "T5": Family(_t5, "text", ("q", "v")),
    "BERT": _encoder("Bert"),
    "RoBERTa": _encoder("Roberta"),
    "ModernBERT": _encoder("ModernBert", pad_token_id=0),
    "ViT": Family(_vit, "images"),
    "ResNet (timm)": _timm("resnet18", normalises=True),
    "ViT (timm)": _timm("vit_tiny_patch16_224", img_size=IMAGE, depth=4),
    "ConvNeXt (timm)": _timm("convnext_atto"),
    "EfficientNet (timm)": _timm("efficientnet_b0", normalises=True),
    "Swin (timm)": _timm("swin_tiny_patch4_window7_224", img_size=IMAGE, window_size=2, drop_path_rate=0.0),
    "ResNet (torchvision)": _torchvision("resnet18", normalises=True),
    "ViT (torchvision)": _torchvision("vit_b_16", image_size=IMAGE),
    "ConvNeXt (torchvision)": _torchvision("convnext_tiny", stochastic_depth_prob=0.0),
    "EfficientNet (torchvision)": _torchvision(
        "efficientnet_b0", normalises=True, dropout=0.0, stochastic_depth_prob=0.0
    ),
}  # fmt: skip


class Module(LightningModule):
    """Calls the model as its documentation does, and knows nothing of this package."""

    def __init__(self, model: Any, data: str) -> None:
        super().__init__()
        self.model = model
        self.data = data
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        if self.data != "images":
            loss: Tensor = self.model(**batch).loss
            return loss
        images, classes = batch
        output = self.model(images)
        return nn.functional.cross_entropy(getattr(output, "logits", output), classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)


def predicted_tokens(batch: Any) -> int:
    """Return how many tokens the loss is a mean over: a decoder does not predict the first one."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def labelled_tokens(batch: Any) -> int:
    """Return how many tokens have a label, for an encoder with a decoder."""
    return int((batch["labels"] != IGNORED).sum())


def loader(data: str) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    samples: list[Any] = []
    for i in range(BATCH_SIZE * BATCHES):
        if data == "images":
            samples.append((torch.randn(3, IMAGE, IMAGE, generator=generator), i % CLASSES))
            continue
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        # the first batch has no padding, for which masks are None, and the last one is shorter
        length = LENGTH if i < BATCH_SIZE else 2 + i % 11
        cut = slice(None, None if i < 2 * BATCH_SIZE else 9)
        kept = (torch.arange(LENGTH) < length).long()
        labels = tokens.where(kept.bool(), torch.tensor(IGNORED))
        label = labels[cut] if data == "text" else torch.tensor(i % CLASSES)
        samples.append({"input_ids": tokens[cut], "attention_mask": kept[cut], "labels": label})
    return DataLoader(samples, BATCH_SIZE)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Way:
    """How a family is trained."""

    stages: int = 1
    splits: tuple[int, ...] | None = None
    precision: str = "32-true"
    checkpointed: bool = False
    lora: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a training has led to; only the parameters that were trained, and the output of a validation."""

    losses: list[float]
    val_loss: float
    parameters: dict[str, Tensor]
    seconds: float = 0.0


def train(name: str, way: Way) -> Outcome:
    """Train a family on one device, or on the ranks of this process group."""
    torch.manual_seed(3)
    family = FAMILIES[name]
    model = family.build()
    if way.checkpointed:
        for method in ("gradient_checkpointing_enable", "set_grad_checkpointing"):
            if hasattr(model, method):
                getattr(model, method)()
    if way.lora:
        import peft

        torch.manual_seed(4)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=list(family.lora)))
        for parameter in model.parameters():  # otherwise half of them would have no gradient at first
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    strategy: Any = "auto"
    ranked = "LOCAL_RANK" in os.environ and way.stages > 1
    if ranked:
        from lightning_hetero import HeteroPipelineStrategy

        terms: Any = None
        if family.data == "text":
            terms = labelled_tokens if name == "T5" else predicted_tokens
        strategy = HeteroPipelineStrategy(
            splits="auto" if way.splits is None else list(way.splits),
            num_microbatches=1 if family.normalises else 3,
            num_loss_terms=terms,
            verbose=False,
        )
    trainer = Trainer(
        accelerator="cpu", devices=dist.get_world_size() if ranked else 1, strategy=strategy, max_epochs=1,
        precision=way.precision, logger=False, enable_checkpointing=False, enable_progress_bar=False,  # type: ignore[arg-type]
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Module(model, family.data)
    if not ranked:
        module.train()
    data = loader(family.data)
    trainer.fit(module, data, data)
    trained = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    statistics = {n: b.detach().clone() for n, b in module.named_buffers() if "running" in n}
    return Outcome(module.losses, float(trainer.callback_metrics["val_loss"]), {**trained, **statistics})


def difference(found: Outcome, expected: Outcome) -> float:
    """Return the largest difference of losses and parameters."""
    losses = [
        abs(a - b) for a, b in zip([*found.losses, found.val_loss], [*expected.losses, expected.val_loss], strict=True)
    ]
    pairs = [(found.parameters[name], value) for name, value in expected.parameters.items()]
    return max([*losses, *(float((a.double() - b.double()).abs().max()) for a, b in pairs)])
