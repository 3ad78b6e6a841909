"""Layers of every kind train in stages as on one device, or are refused with the reason."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.exceptions import UnsupportedFeatureError

WIDTH, LENGTH, BATCH_SIZE, SAMPLES = 6, 7, 6, 18


def texts() -> DataLoader[Any]:
    """Batches whose samples have several lengths: the first has no padding, the last is shorter."""
    generator = torch.Generator().manual_seed(1)
    data: list[Any] = []
    for i in range(SAMPLES):
        tokens = torch.randint(1, 20, (LENGTH,), generator=generator)
        if i >= BATCH_SIZE:
            tokens[1 + i % LENGTH :] = 0
        data.append((tokens[: LENGTH if i < 2 * BATCH_SIZE else 5], torch.randn(1, generator=generator)))
    return DataLoader(data, BATCH_SIZE)  # type: ignore[arg-type]


class Training(LightningModule):
    """A training of ``self.model``, which is called with tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = self.build().double()
        self.values: list[float] = []

    def build(self) -> nn.Module:
        raise NotImplementedError

    def output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.model(tokens)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, y = batch
        return nn.functional.mse_loss(self.output(tokens), y.double())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.output(batch[0]).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)

    def forward(self, tokens: Tensor) -> Any:
        embedded: Tensor = self.table(tokens)
        return embedded


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x.mean(1))
        return output


class Sum(Mean):
    """The sum, to which padding adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x.sum(1))
        return output


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(Embed(), *layers, Mean())


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(linear(), nn.Tanh(), linear())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class BothCheckpoints(Training):
    def build(self) -> nn.Module:
        return sequence(Checkpointed(True), Checkpointed(False), Checkpointed(True), Checkpointed(False))


class CheckpointedByTheModel(Training):
    """The model's own code puts a checkpoint around each of its blocks, one kind after the other."""

    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = Embed()
                self.blocks = nn.ModuleList(nn.Sequential(linear(), nn.Tanh()) for _ in range(4))
                self.head = Mean()

            def forward(self, tokens: Tensor) -> Any:
                x = self.embed(tokens)
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=False)
                return self.head(x)

        return Model()


# ---- in place --------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.9).add_(0.1)


class InPlace(Training):
    def build(self) -> nn.Module:
        return sequence(linear(), nn.ReLU(inplace=True), linear(), Scale(), linear(), Scale(), nn.ReLU(inplace=True))


# ---- structures ------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Hands on a mask, or None where nothing is padded, and an extra output that nobody may use."""

    def __init__(self, *, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.inner = Embed() if first else linear()
        self.unused = linear() if first else None

    def forward(self, value: Any) -> Any:
        if self.first:
            x, mask, extra = self.inner(value), None, {"extra": None}
            if (value == 0).any():
                mask = value != 0
                assert self.unused is not None
                extra = {"extra": self.unused(x)}
        else:
            x, mask, extra = value
            x = self.inner(x).tanh()
            if mask is not None:
                x = x * mask[..., None]
        return x if self.last else (x, mask, extra)


class DataDependent(Training):
    """The first micro-batches have no mask; later ones do, and are cut to the length of their longest sample."""

    def build(self) -> nn.Module:
        return nn.Sequential(Masked(first=True), Masked(), Masked(), Masked(last=True), Sum())

    def output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.model(tokens[:, : int((tokens != 0).sum(1).max())])
        return output


class Shortening(nn.Module):
    """Returns sequences whose length depends on the values of the earlier layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : 2 + int(x.detach().sum() > 0)]


class LengthsFromLayers(Training):
    def build(self) -> nn.Module:
        return sequence(linear(), Shortening(), linear(), linear())


# ---- keyword arguments and side inputs ---------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = x + scale * self.linear(x).tanh()
        return x if mask is None else x * mask[..., None]


class SideInputs(Training):
    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = Embed(), Mean()
                self.blocks = nn.ModuleList(Block() for _ in range(4))

            def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
                x = self.embed(tokens)
                for block in self.blocks:
                    x = block(x, mask, scale=scale)
                return self.head(x)

        return Model()

    def output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.model(tokens, mask=tokens != 0, scale=0.5)
        return output


class DeclaredSideInputs(SideInputs):
    """The same, with layers that are declared."""

    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.embed, *model.blocks, model.head]


# ---- models that call their layers themselves -------------------------------------------------------------------


class Output(dict):  # type: ignore[type-arg]
    """What libraries return: a mapping with attributes."""

    loss: Any
    logits: Any

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__ = self


class Language(nn.Module):
    """Positions and a mask that the model makes itself, a parameter of its own, tied weights, a loss from labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("positions", torch.linspace(0, 1, 16)[:, None], persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        x = self.tokens(tokens)
        positions: Any = self.positions
        mask = torch.ones(tokens.shape, dtype=torch.bool, device=x.device) if mask is None or mask.all() else mask
        x = x + positions[torch.arange(x.shape[1], device=x.device)]
        for block in self.blocks:
            x = block(x * self.scale, mask)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
        return Output(loss=loss, logits=logits)


class LanguageModel(Training):
    def build(self) -> nn.Module:
        return Language()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, _ = batch
        output = self.model(tokens, mask=tokens != 0, labels=tokens)
        assert isinstance(output, Output)
        assert output.logits.shape == (*tokens.shape, 20)
        return output.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, _ = batch
        self.log("value", self.model(tokens, tokens != 0, labels=tokens).loss)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        return self.act(x + self.conv(x))


class Convolutions(Training):
    """Nested stacks, functions between layers, and an activation in place, under a name of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.model
        del self.model

    def build(self) -> nn.Module:
        class Stages(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = Embed()
                self.act = nn.ReLU(inplace=True)
                self.stages = nn.Sequential(*(nn.Sequential(Residual(), Residual()) for _ in range(3)))
                self.head = Mean()

            def forward(self, tokens: Tensor) -> Any:
                x = self.act(self.stem(tokens)).transpose(1, 2)
                return self.head(self.stages(x).transpose(1, 2))

        return Stages()

    def output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.net(tokens)
        return output


# ---- state, several uses, modes ----------------------------------------------------------------------------------


class Counting(nn.Module):
    """Computes with how often it has run, which it keeps in an attribute, in a list and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.seen: list[int] = []
        self.total: Any
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.runs += 1
            self.seen.append(self.runs)
            self.total += 1
        return x * (1 + self.runs / 10 + len(self.seen) / 10 + self.total / 10)


class KeepingState(Training):
    def build(self) -> nn.Module:
        return sequence(linear(), Counting(), linear(), linear(), Counting())


class Shared(Training):
    """One layer in two places, and two that share a weight."""

    def build(self) -> nn.Module:
        a, b = linear(), linear()
        b.weight = a.weight
        return sequence(a, nn.Tanh(), linear(), a, nn.Tanh(), linear(), b)


class Dropping(Training):
    """A wrapper that is made for the pipeline, with dropout, which must be off in validation."""

    def build(self) -> nn.Module:
        return sequence(linear(), linear())

    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model[0], nn.Sequential(nn.Dropout(0.5), model[1]), nn.Sequential(model[2], nn.Dropout(0.5)), model[3]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


TRAINED: dict[str, tuple[type[Training], Any, int]] = {
    "checkpoints of both kinds": (BothCheckpoints, "auto", 3),
    "checkpoints around blocks": (CheckpointedByTheModel, "auto", 3),
    "in place, timed": (InPlace, "auto", 3),
    "in place at the border": (InPlace, [2], 3),
    "None here, a tensor there": (DataDependent, [2], 3),
    "None here, a tensor there, timed": (DataDependent, "auto", 3),
    "lengths that layers decide": (LengthsFromLayers, [3], 1),
    "keyword arguments": (SideInputs, "auto", 3),
    "keyword arguments of declared layers": (DeclaredSideInputs, [2], 3),
    "language model": (LanguageModel, "auto", 3),
    "language model, early border": (LanguageModel, [1], 3),
    "convolutions": (Convolutions, "auto", 3),
    "state in attributes": (KeepingState, "auto", 1),
    "shared": (Shared, [3], 3),
    "wrappers follow modes": (Dropping, [2], 3),
}


def tokens_to_predict(batch: Any) -> int:
    return int((batch[0][:, 1:] != 0).sum())


def train(name: str) -> tuple[dict[str, Tensor], float]:
    kind, splits, micro_batches = TRAINED[name]
    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": None}
    if "LOCAL_RANK" in os.environ:
        terms = tokens_to_predict if kind is LanguageModel else None
        strategy = HeteroPipelineStrategy(
            splits=splits, num_microbatches=micro_batches, num_loss_terms=terms, verbose=False
        )
        trainer = make_trainer(strategy, dist.get_world_size(), **options)
    else:
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip
    module = kind()
    trainer.fit(module, texts(), texts())
    return {n: v.detach().clone() for n, v in module.state_dict().items()}, float(trainer.callback_metrics["value"])


def train_all() -> dict[str, tuple[dict[str, Tensor], float]]:
    return {name: train(name) for name in TRAINED}


# ---- refusals --------------------------------------------------------------------------------------------------------


class LeavingOut(SideInputs):
    """Leaves out a layer."""

    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.embed, *model.blocks[1:], model.head]


class InAnotherOrder(LeavingOut):
    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.embed, *reversed(model.blocks), model.head]


class WithoutScale(LanguageModel):
    """Leaves out a parameter that belongs to the model itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(batch[0]).logits.mean()

    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.tokens, *model.blocks, model.norm, Wrapped(model.head)]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return Output(loss=None, logits=self.inner(x))


class Unknown(LeavingOut):
    """Creates a layer that the module does not know."""

    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.embed, *model.blocks, nn.Sequential(nn.LayerNorm(WIDTH).double()), model.head]


class UnknownBuffer(Unknown):
    def pipeline_layers(self) -> Any:
        model: Any = self.model
        return [model.embed, Counting(), *model.blocks, model.head]


class SharedStatistics(Training):
    def build(self) -> nn.Module:
        normal = nn.BatchNorm1d(LENGTH)
        return sequence(normal, linear(), normal)


class Skipping(Training):
    """The last layers use what the first ones have returned."""

    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = Embed(), Mean()
                self.blocks = nn.ModuleList(Block() for _ in range(3))

            def forward(self, tokens: Tensor) -> Any:
                first = x = self.embed(tokens)
                for block in self.blocks:
                    x = block(x)
                return self.head(x + first)

        return Model()


class CallingTwice(Skipping):
    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = Embed(), Mean()
                self.blocks = nn.ModuleList(Block() for _ in range(2))

            def forward(self, tokens: Tensor) -> Any:
                x = self.embed(tokens)
                for block in (*self.blocks, *self.blocks):
                    x = block(x)
                return self.head(x)

        return Model()


class CheckpointedTogether(CallingTwice):
    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = Embed(), Mean()
                self.blocks = nn.ModuleList(Block() for _ in range(2))

            def forward(self, tokens: Tensor) -> Any:
                def both(x: Tensor) -> Any:
                    return self.blocks[1](self.blocks[0](x))

                return self.head(checkpoint(both, self.embed(tokens), use_reentrant=False))

        return Model()


class Generating(SideInputs):
    def build(self) -> nn.Module:
        model: Any = super().build()
        type(model).generate = lambda self, tokens: self(tokens)
        made: nn.Module = model
        return made

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model.generate(batch[0]).mean()  # type: ignore[operator]


REFUSED: list[tuple[type[Training], str]] = [
    (LeavingOut, r"must compute what `Model.forward\(\)` computes, got values that differ.*'blocks.0.linear.weight'"),
    (InAnotherOrder, r"must compute what `Model.forward\(\)` computes, got values that differ"),
    (WithoutScale, r"must compute what `Language.forward\(\)` computes.*No layer contains .*'scale'"),
    (Unknown, r"belong to the module, got \['0.bias', '0.weight'\] of layer 5"),
    (UnknownBuffer, r"belong to the module, got \['total'\] of layer 1"),
    (SharedStatistics, "cannot share batch normalisation"),
    (Skipping, "'head' also uses that of an earlier one"),
    (CallingTwice, "call each of its layers once, got another call of 'blocks.0'"),
    (CheckpointedTogether, "cannot separate layers that one `torch.utils.checkpoint` contains, got 'blocks.0' and 'bl"),
]


def refused(kind: type[Training]) -> str:
    strategy = HeteroPipelineStrategy(
        splits=[2] if dist.get_world_size() > 1 else "auto", num_microbatches=3, verbose=False
    )
    with pytest.raises(UnsupportedFeatureError) as caught:
        make_trainer(strategy, dist.get_world_size(), max_epochs=1).fit(kind(), texts())
    return str(caught.value)


@pytest.mark.parametrize(("kind", "message"), REFUSED)
def test_layers_that_would_train_another_model_are_refused(
    ranks: RankPools, kind: type[Training], message: str
) -> None:
    for found in ranks.run(2, refused, kind):
        assert re.search(message, found), found


def test_generating_within_a_step_is_refused(ranks: RankPools) -> None:
    assert "cannot call `generate` within a step" in ranks.run(1, refused, Generating)[0]


def test_layers_train_as_on_one_device(ranks: RankPools) -> None:
    found = ranks.run(2, train_all, timeout_s=200.0)
    wrong: list[str] = []
    for name in TRAINED:
        parameters, value = train(name)
        for outcome in found:
            off = [k for k, v in parameters.items() if not torch.allclose(outcome[name][0][k], v, rtol=0, atol=1e-10)]
            if off or outcome[name][1] != pytest.approx(value, rel=1e-10):
                wrong.append(f"{name}: {off}, {outcome[name][1]} instead of {value}")
    assert not wrong
