"""What ordinary modules do beside computing a loss, and what is refused, under ``hetero_pipeline``."""

from __future__ import annotations

import os
import re
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC
from training import make_trainer

from lightning_hetero import HeteroPipelineStrategy
from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.distributed.pipeline import messages
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.plugin.pipeline import planning
from lightning_hetero.plugin.pipeline.refusals import refuse_backend

BATCH_SIZE = 10


def loader(size: int = 46, *, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), BATCH_SIZE, shuffle=shuffle)


class Collecting(LightningModule):
    """Logs metrics in every way, collects outputs and uses them at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.accuracy = BinaryAccuracy()
        self.scores = MetricCollection({"auroc": BinaryAUROC(), "accuracy": BinaryAccuracy()}, prefix="val_")
        self.by_hand = BinaryAUROC()
        self.collected: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        scores = self.model(x)[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(scores, y.float())
        self.accuracy(scores.detach().sigmoid(), y)  # scores of a few samples may look like probabilities
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"loss": loss, "largest": scores.max()}, on_step=False, on_epoch=True, reduce_fx="max")
        return {"loss": loss, "scores": scores.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert len(outputs["scores"]) == len(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores: Tensor = self.model(x)[:, 0]
        assert self.all_gather(scores) is scores
        self.trainer.strategy.barrier()
        self.scores.update(scores, y)
        self.by_hand.update(scores, y)
        self.log_dict(self.scores)
        self.collected.append(scores)
        return scores

    def on_validation_epoch_end(self) -> None:
        self.log("mean_score", torch.cat(self.collected).mean(), sync_dist=True)
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()
        self.collected.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Watching(Callback):
    """What callbacks see."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.append((outputs["scores"].tolist(), metrics, pl_module.global_step))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append((outputs.tolist(), {}, len(batch[0])))


def use(splits: tuple[int, ...]) -> tuple[list[Any], dict[str, float]]:
    watching = Watching()
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": None, "num_sanity_val_steps": 2}
    callbacks: list[Callback] = [watching, EarlyStopping("val_auroc", mode="max")]
    if "LOCAL_RANK" in os.environ:
        strategy = HeteroPipelineStrategy(splits=list(splits), num_microbatches=3)
        trainer = make_trainer(strategy, dist.get_world_size(), callbacks, **options)
    else:
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False, **options)  # fmt: skip
    module = Collecting()
    trainer.fit(module, loader(), loader(26))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    validated = trainer.validate(module, loader(36), verbose=False)[0]
    return watching.seen, metrics | {f"again {name}": value for name, value in validated.items()}


def test_metrics_collected_outputs_and_callbacks(ranks: RankPools) -> None:
    """On every rank as in one process: scores kept in lists, values computed by hand, what hooks are handed."""
    expected_seen, expected_metrics = use(())
    assert {"val_auroc", "by_hand", "mean_score", "accuracy", "largest"} <= set(expected_metrics)
    for seen, metrics in ranks.run(3, use, (2, 3), timeout_s=90):
        assert metrics == pytest.approx(expected_metrics, abs=1e-6)
        for (a, ma, sa), (b, mb, sb) in zip(seen, expected_seen, strict=True):
            assert a == pytest.approx(b, abs=1e-6)
            assert ma == pytest.approx(mb, abs=1e-6)
            assert sa == sb


class Drawing(LightningModule):
    """Draws random numbers before and after the call of the model, and when a batch has arrived."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5), nn.Linear(1, 1, bias=False))
        for weight in self.model.parameters():
            nn.init.ones_(weight)
        self.drawn: list[list[float]] = []
        self.noise: list[float] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [torch.randn(len(batch[0]), 1, device=self.device)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        noise = torch.randn(len(x), 1, device=x.device)
        noisy = x + noise
        out = self.model(noisy)
        # each sample passes, twice as large, or is dropped: what went in is what is compared with here
        passed = (out - 2 * noisy).abs() < 1e-5
        assert bool((passed | (out == 0)).all())
        self.drawn.append(x[:, 0].tolist())
        self.noise += noise[:, 0].tolist()
        loss: Tensor = 0 * out.sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def draw() -> tuple[list[list[float]], list[float], float]:
    strategy = HeteroPipelineStrategy(splits=[1], num_microbatches=2)
    trainer = make_trainer(strategy, 2, max_epochs=1)
    module = Drawing()
    torch.manual_seed(dist.get_rank())
    trainer.fit(module, loader(40))
    return module.drawn, module.noise, float(torch.rand(()))


def test_random_numbers_of_a_step_are_the_same_on_both_its_ranks(ranks: RankPools) -> None:
    """A step that mixes samples before the model and labels after it would be silently wrong otherwise."""
    last, first = ranks.run(2, draw)
    assert last[0] == [] or len(last[0]) == 8
    assert len(last[1]) == 40
    assert len(set(last[1])) == 40, "no micro-batch repeats the numbers of another"
    assert first[2] != last[2], "each rank goes on with random numbers of its own"


# ---- refusals --------------------------------------------------------------------------------------------------------


class Manual(Collecting):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Newton(Collecting):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class NoLayers(Collecting):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(5, 1)  # type: ignore[assignment]


# refused by all ranks alike; what one rank finds out in a step ends the others too, see test_launchers.py
REFUSED: list[tuple[type[Collecting], dict[str, Any], dict[str, Any], str]] = [
    (Manual, {}, {}, "manual optimisation runs its own backward passes"),
    (Newton, {}, {}, "cannot train with LBFGS"),
    (NoLayers, {}, {}, "`self.model` must be an nn.Sequential, or the module must define `pipeline_layers"),
    (Collecting, {"splits": [5]}, {}, "`splits` must be below the number of the model's layers, 5, got"),
    (Collecting, {}, {"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging copies the whole"),
    (
        Collecting,
        {},
        {"callbacks": [OnExceptionCheckpoint(".")], "enable_checkpointing": True},
        "OnExceptionCheckpoint saves after a rank has failed",
    ),
    (
        Collecting,
        {},
        {"callbacks": [ModelCheckpoint(".", save_on_exception=True)], "enable_checkpointing": True},
        "ModelCheckpoint saves after a rank has failed",
    ),
]


def refused(kind: type[Collecting], strategy: dict[str, Any], trainer: dict[str, Any]) -> str:
    with pytest.raises((UnsupportedFeatureError, ConfigurationError)) as caught:  # noqa: PT012  # at either of them
        options = {"splits": [2], "num_microbatches": 2, **strategy}
        make_trainer(HeteroPipelineStrategy(**options), 2, **{"max_epochs": 1, **trainer}).fit(kind(), loader(20))
    return str(caught.value)


@pytest.mark.parametrize(("kind", "strategy", "trainer", "message"), REFUSED)
def test_what_is_refused_before_the_first_step(
    ranks: RankPools, kind: Any, strategy: Any, trainer: Any, message: str
) -> None:
    for found in ranks.run(2, refused, kind, strategy, trainer):
        assert re.search(message, found)


def test_a_scaled_loss_is_refused() -> None:
    """On processors Lightning itself replaces "16-mixed"."""
    strategy = HeteroPipelineStrategy()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    strategy.precision_plugin = MixedPrecision("16-mixed", "cuda")
    module = Collecting()
    module.trainer = trainer
    trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(UnsupportedFeatureError, match='precision "16-mixed" scales the loss'):
        strategy.connect(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": [4, 2]}, r"`splits` must be positive and strictly increasing, got \[4, 2\]"),
        ({"splits": "even"}, "`splits` must be \"auto\", or a list with the first layer of every stage but the first"),
        ({"splits": [2], "speeds": [1, 2]}, "`speeds` must be None if `splits` says"),
        ({"speeds": [1, 0]}, r"`speeds\[1\]` must be"),
        ({"num_microbatches": 0}, "`num_microbatches` must be"),
        ({"schedule": "zb"}, "`schedule` must be one of"),
        ({"loss_reduction": "max"}, "`loss_reduction` must be one of"),
        ({"num_loss_terms": 3}, "`num_loss_terms` must be a function"),
        ({"max_memory_bytes": 0}, "`max_memory_bytes` must be"),
    ],
)  # fmt: skip
def test_arguments_that_break_their_rule(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HeteroPipelineStrategy(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": [1, 2]}, r"`splits` must have one number fewer than there are ranks \(2\), got 2"),
        ({"speeds": [1, 2, 3]}, r"`speeds` must have one number per rank \(2\), got 3"),
        ({"max_memory_bytes": [10**9]}, r"`max_memory_bytes` must have one number per rank \(2\), got 1"),
    ],
)
def test_arguments_that_do_not_match_the_number_of_ranks(arguments: dict[str, Any], message: str) -> None:
    """Known when the Trainer is constructed, before any process is launched."""
    with pytest.raises(ConfigurationError, match=message):
        Trainer(accelerator="cpu", devices=2, strategy=HeteroPipelineStrategy(**arguments))


def set_up_with_a_gpu(device: str) -> str:
    """Set up a pipeline whose layers are on ``device``, which this machine does not have, over gloo."""

    class OnGpu(HeteroPipelineStrategy):
        pretends = False

        @property
        def root_device(self) -> torch.device:
            return torch.device(device if self.pretends else "cpu")

        def model_to_device(self) -> None:
            self.pretends = True
            try:
                super().model_to_device()
            finally:
                self.pretends = False

    try:
        make_trainer(OnGpu(), dist.get_world_size(), max_steps=1).fit(Collecting(), loader())
    except UnsupportedFeatureError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_gloo_is_refused_where_layers_are_on_gpus(ranks: RankPools, device: str) -> None:
    """Its send would take a pointer to the memory of the device for one to that of the host."""
    for message in ranks.run(2, set_up_with_a_gpu, device, timeout_s=60.0):
        assert f"cannot send tensors of {device}" in message
        assert "process_group_backend" in message


@pytest.mark.parametrize(
    ("device", "config", "refused"),
    [
        ("cuda", "cpu:gloo,cuda:gloo", True),
        ("xpu", "cpu:gloo,xpu:gloo", True),
        ("cuda", "cpu:gloo,cuda:nccl", False),
        ("cuda", "cuda:nccl", False),
        ("cpu", "cpu:gloo,cuda:gloo", False),
    ],
)
def test_backends_of_devices(monkeypatch: pytest.MonkeyPatch, device: str, config: str, refused: bool) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    with pytest.raises(UnsupportedFeatureError) if refused else nullcontext():
        refuse_backend(torch.device(device))


def received_in_training(num_microbatches: int) -> tuple[int, float, list[Any]]:
    """Return the most bytes that hold what this rank received, those its budget counts, and whose generators fork."""
    received: list[weakref.ref[Any]] = []
    held: list[int] = []
    forked: list[Any] = []
    fork_rng = torch.random.fork_rng

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def irecv(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            received.append(weakref.ref(tensor))
            held.append(sum(there.nbytes for ref in received if (there := ref()) is not None))
            return dist.irecv(tensor, *args, **kwargs)

    def forking(devices: Any = None, *args: Any, **kwargs: Any) -> Any:
        forked.append(devices)
        return fork_rng(devices, *args, **kwargs)

    strategy = HeteroPipelineStrategy(num_microbatches=num_microbatches, max_memory_bytes=10**9)
    trainer = make_trainer(strategy, dist.get_world_size(), max_epochs=2, limit_val_batches=1.0)
    with (
        mock.patch.object(messages, "dist", Noting()),
        mock.patch.object(torch.random, "fork_rng", forking),
        mock.patch.object(planning, "StageMemory", side_effect=StageMemory) as memories,
    ):
        trainer.fit(Collecting(), loader(), loader(23))
    needed = 0.0
    if dist.get_rank() == 0:
        plan, memory = strategy.plan, StageMemory(**memories.call_args.kwargs)
        assert plan is not None
        needed = replace(memory, received_bytes=()).left_bytes(plan)[0] - memory.left_bytes(plan)[0]
    return max(held), needed, forked


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_budgets_count_what_a_stage_receives_into(ranks: RankPools, num_microbatches: int) -> None:
    """What the micro-batches of a step receive is there at the same time, at most."""
    (received, counted, forked), *_ = ranks.run(2, received_in_training, num_microbatches, timeout_s=60.0)
    assert 0 < received <= counted
    assert forked
    assert set(map(str, forked)) == {"[]"}, "torch forks the generators of all devices by default, and warns"
