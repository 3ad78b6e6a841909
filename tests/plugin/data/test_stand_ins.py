"""No rank without samples hangs, dies or changes a value: metrics of every kind, over several epochs, in every hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from profiles import drawn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import (
    CatMetric,
    CosineSimilarity,
    ExplainedVariance,
    KendallRankCorrCoef,
    MaxMetric,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    MetricTracker,
    MinMaxMetric,
    MinMetric,
    R2Score,
    SpearmanCorrCoef,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryCalibrationError,
    BinaryConfusionMatrix,
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassAUROC,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import ClasswiseWrapper, MultioutputWrapper, Running
from training import make_trainer

from lightning_hetero import HeteroDDPStrategy


class Scores(Dataset[Any]):
    """Two scores and a class per sample."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.scores = torch.rand(size, 2, generator=generator)
        self.classes = torch.tensor([i % 2 for i in range(size)])

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Any:
        return self.scores[index], self.classes[index]


class OwnState(Metric):
    """States that are a mean, a list with an entry per sample, and combined by a function of its own."""

    average: Tensor
    furthest: Tensor
    entries: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.samples = 0
        self.add_state("average", torch.zeros(()), dist_reduce_fx="mean")
        self.add_state("furthest", torch.zeros(()), dist_reduce_fx=lambda of_ranks: of_ranks.abs().amin())
        self.add_state("entries", [], dist_reduce_fx=None)

    def update(self, values: Tensor) -> None:
        self.average = (self.average * self.samples + values.sum()) / (self.samples + len(values))
        self.furthest = self.average.abs() + 1
        self.samples += len(values)
        self.entries += list(values)

    def compute(self) -> Tensor:
        assert self.furthest >= 1, "the initial state of a rank without samples"
        return self.average + sum(self.entries, torch.zeros(())) / len(self.entries)

    def reset(self) -> None:
        super().reset()
        self.samples = 0


class TensorOfAll(Metric):
    """Keeps one growing tensor, which torchmetrics does not concatenate if ranks have different numbers."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.zeros(0), dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        self.rows = torch.cat([self.rows, values])

    def compute(self) -> Tensor:
        return self.rows.mean() + self.rows.numel()


class GathersItself(Metric):
    """Gathers its state in its own way."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx=None)

    def update(self, values: Tensor) -> None:
        self.rows += list(values)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, self.rows)
        self.rows = [row for rows in of_ranks for row in rows]

    def compute(self) -> Tensor:
        return torch.stack(self.rows).mean() + len(self.rows)


Update = Callable[[Any, Tensor, Tensor], None]


def first_score(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores[:, 0])


def classified(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores[:, 0], classes)


def regressed(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores[:, 0], scores[:, 1])


def multiclass(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores.softmax(1), classes)


def retrieved(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores[:, 0], classes, indexes=torch.zeros_like(classes))


def both(metric: Any, scores: Tensor, classes: Tensor) -> None:
    metric.update(scores, scores.flip(1))


METRICS: dict[str, tuple[Callable[[], Any], Update]] = {
    "mean": (MeanMetric, first_score),
    "sum": (SumMetric, first_score),
    "max": (MaxMetric, first_score),
    "min": (MinMetric, first_score),
    "states of its own": (OwnState, first_score),
    "a growing tensor": (TensorOfAll, first_score),
    "gathers itself": (GathersItself, first_score),
    "auroc": (BinaryAUROC, classified),
    "average precision": (BinaryAveragePrecision, classified),
    "f1": (BinaryF1Score, classified),
    "mcc": (BinaryMatthewsCorrCoef, classified),
    "calibration": (BinaryCalibrationError, classified),
    "multiclass auroc": (lambda: MulticlassAUROC(2), multiclass),
    "accuracy": (lambda: MulticlassAccuracy(2), multiclass),
    "mse": (MeanSquaredError, regressed),
    "mae": (MeanAbsoluteError, regressed),
    "r2": (R2Score, regressed),
    "explained variance": (ExplainedVariance, regressed),
    "similarity": (CosineSimilarity, both),
    "spearman": (SpearmanCorrCoef, regressed),
    "kendall": (KendallRankCorrCoef, regressed),
    "retrieval": (RetrievalMAP, retrieved),
    "min and max": (lambda: MinMaxMetric(MeanMetric()), first_score),
    "running": (lambda: Running(SumMetric(), window=3), first_score),
    "outputs": (lambda: MultioutputWrapper(MeanSquaredError(), 2), both),
    "on each step": (lambda: MeanMetric(dist_sync_on_step=True), lambda m, scores, _: m(scores[:, 0])),
    "by forward": (BinaryF1Score, lambda m, scores, classes: m(scores[:, 0], classes)),
    "classes": (lambda: ClasswiseWrapper(MulticlassAccuracy(2, average=None)), multiclass),
    "confusion": (lambda: BinaryConfusionMatrix(), classified),
    "cat": (CatMetric, first_score),
    "collection": (lambda: MetricCollection([BinaryF1Score(), BinaryAUROC(), BinaryMatthewsCorrCoef()]), classified),
}
# A window of updates and a running extreme depend on which batches there are, not on samples alone.
UPDATES_MATTER = {"running", "min and max"}
# What one process cannot compute of one sample.
TWO_SAMPLES = {"r2", "explained variance"}
# What Lightning cannot log, because it is no single number.
NO_SCALAR = {"collection", "classes", "cat", "confusion", "min and max", "outputs"}


class Measured(LightningModule):
    """Updates the metrics of ``names``, in the step, in the module's hooks or in a callback's."""

    def __init__(self, names: list[str], where: str) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.names, self.where = names, where
        self.metrics: Any = nn.ModuleDict({name: METRICS[name][0]() for name in names})
        self.tracker: Any = MetricTracker(BinaryF1Score())
        self.hidden = {"not registered": MeanMetric()}
        self.values: list[dict[str, Any]] = []

    def measure(self, batch: Any) -> None:
        scores, classes = batch
        for name, metric in self.metrics.items():
            METRICS[name][1](metric, scores, classes)
        self.tracker.update(scores[:, 0], classes)
        self.hidden["not registered"].update(scores[:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch[0]).sum() * 0.0
        return loss

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("first score", batch[0][:, 0].mean(), sync_dist=True, on_step=True, on_epoch=True)
        if self.where == "step":
            self.measure(batch)
            for name, metric in self.metrics.items():
                if name not in NO_SCALAR:
                    self.log(name, metric)

    def on_validation_batch_end(self, outputs: Any, batch: Any, *_: Any) -> None:
        if self.where == "hook":
            self.measure(batch)
        self.log("largest", batch[0].max(), reduce_fx="max", sync_dist=True)
        self.log("count", float(len(batch[0])), reduce_fx="sum", sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        found: dict[str, Any] = {name: metric.compute() for name, metric in self.metrics.items()}
        found |= {"tracked": self.tracker.compute(), "not registered": self.hidden["not registered"].compute()}
        self.values.append(found)
        for name, metric in (*self.metrics.items(), ("", self.hidden["not registered"])):
            if self.where != "step" or name in {*NO_SCALAR, ""}:  # Lightning resets what it has logged
                metric.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MeasureInCallback(Callback):
    """Updates what it keeps itself, as callbacks do."""

    def __init__(self) -> None:
        self.auroc = BinaryAUROC()
        self.values: list[Any] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.auroc.update(batch[0][:, 0], batch[1])
        pl_module.log("from a callback", batch[0][:, 1].mean(), sync_dist=True)
        if pl_module.where == "callback":
            pl_module.measure(batch)  # type: ignore[operator]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(self.auroc.compute())
        self.auroc.reset()


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return sorted(value.flatten().tolist()) if isinstance(value, Tensor) else value


def validate(names: list[str], where: str, size: int, strategy: Any, world_size: int) -> Any:
    module, callback = Measured(names, where), MeasureInCallback()
    trainer = make_trainer(
        strategy, world_size, [callback], max_epochs=3, max_steps=-1, limit_val_batches=1.0, num_sanity_val_steps=1
    )
    module.values.clear()
    trainer.fit(module, DataLoader(Scores(8), batch_size=2), DataLoader(Scores(size), batch_size=3))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return [plain(value) for value in module.values[-3:]], [plain(v) for v in callback.values[-3:]], logged


def validate_on_ranks(names: list[str], where: str, size: int, shares: list[float] | None) -> Any:
    strategy = "ddp" if shares is None else HeteroDDPStrategy(shares=shares)
    return validate(names, where, size, strategy, dist.get_world_size())


def check(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            if not set(name.split("_")) & UPDATES_MATTER:
                check(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            check(one, other, f"{where}[{i}]")
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True), where


def cases() -> list[tuple[int, int, str, tuple[str, ...]]]:
    """Return world size, number of samples, where metrics are updated, and which; every size, every metric."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(world, size) for world in (2, 3, 4) for size in range(world + 1)]
    sizes += [(2, 11), (3, 19)]  # no stand-ins, but unequal numbers of samples
    found = []
    for i, (world, size) in enumerate(sizes * drawn(1, 10)):
        order = torch.randperm(len(METRICS), generator=generator)[:20].tolist()
        names = tuple(name for j, name in enumerate(METRICS) if j in order and (size > 1 or name not in TWO_SAMPLES))
        found.append((world, size, ("step", "hook", "callback")[i % 3], names))
    return found


@pytest.mark.parametrize(("world", "size", "where", "names"), cases(), ids=lambda value: str(value)[:8])
def test_metrics_are_those_of_one_process(
    ranks: RankPools, world: int, size: int, where: str, names: tuple[str, ...]
) -> None:
    shares = [1.0, 3.0, 2.0, 1.0][:world]
    (expected,) = ranks.run(1, validate_on_ranks, list(names), where, size, None)
    for found in ranks.run(world, validate_on_ranks, list(names), where, size, shares, timeout_s=120):
        check(found[:2], expected[:2])
        logged, of_one = found[2], expected[2]
        assert logged.keys() == of_one.keys()
        of_batches = {name for name in logged if name.endswith("_step")} | UPDATES_MATTER
        for name in logged.keys() - of_batches - {"count"}:
            check(logged[name], of_one[name], name)
        assert logged.get("count", 0) == size
