"""Trainings on a device that is not the host: which tensors meet there, where the host waits, what its group carries.

They run on the virtual accelerator and have to end where the same trainings on CPUs end.  A tensor of the host in an
operation of the device is an error there, as it is on a card.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from harness import RankPools
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy
from profiles import thorough
from replica_trainings import planned
from stage_trainings import always_shared, scripted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import assert_close, make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy, HeteroPipelineStrategy, LoadBalancer
from lightning_hetero.balance.pipeline.orders.search import v_shapes
from lightning_hetero.balance.pipeline.replicas.plan import Replica, ReplicaPlan
from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.shards.exchange import NcclExchange
from lightning_hetero.plugin.pipeline import planning
from lightning_hetero.plugin.pipeline.replicas import planning as replica_planning

EXACT = 1e-12

STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "hetero_ddp": HeteroDDPStrategy,
    "hetero_fsdp": HeteroFSDPStrategy,
    "hetero_pipeline": HeteroPipelineStrategy,
}

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch whose backends can be written in Python, 2.10 or later",
)


@pytest.fixture(scope="module")
def accelerated() -> Iterator[RankPools]:
    """Ranks with a virtual device each; torch knows that device for as long as they live."""
    pools = RankPools()
    yield pools
    pools.close()


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        strategy: "ddp", "hetero_ddp", "hetero_fsdp" or "hetero_pipeline".
        options: Arguments of the strategy.
        trainer: Arguments of the Trainer.
        samples: Number of samples of the training.
        epochs: Number of epochs.
        metrics: Whether steps log and update metrics.
        balanced: Whether a balancer tunes and watches the shares.
        looks: Whether hooks compute with all parameters and gradients together, and a layer is unfrozen.
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    samples: int = 48
    epochs: int = 2
    metrics: bool = True
    balanced: bool = False
    looks: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a rank has seen.

    Attributes:
        parameters: The parameters afterwards.
        values: What was logged.
        saved: Parameters in the checkpoint.
        waits: For each training step, where the host would have waited for the device.
        calls: For each training step, what the device's group carried.
        other_calls: What it carried outside of training steps.
        agreed: Steps at which the balancer exchanged what it had measured.
    """

    parameters: list[float]
    values: dict[str, float]
    saved: list[float]
    waits: list[list[str]]
    calls: list[list[Any]]
    other_calls: list[Any]
    agreed: list[int]


class Network(LightningModule):
    """What people train: normalised, with metrics as attributes, in float64."""

    def __init__(self, *, metrics: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
        ).double()
        self.has_metrics = metrics
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.collected = torchmetrics.CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.has_metrics:
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.model(x)
        self.accuracy(logits, y)
        self.collected(logits.mean() + torch.zeros((), device=self.device))
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("accuracy", self.accuracy)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"},
        }


class Looking(Network):
    """Its hooks compute with all parameters and gradients at once."""

    def __init__(self) -> None:
        super().__init__(metrics=True)
        self.norms: list[float] = []

    def configure_model(self) -> None:
        # values of a virtual tensor cannot be put in the place of those of the host, as those of a card can
        if isinstance(self.trainer.strategy, HeteroFSDPStrategy):
            self.to(self.trainer.strategy.root_device)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # a virtual scalar may meet one of the host, which a card's may not in a list
        norms = [g.norm().reshape(1) for g in gradients]
        self.norms.append(float(torch.cat(norms).norm()))

    def on_train_epoch_end(self) -> None:
        norms = torch.cat([p.norm().reshape(1) for p in self.parameters()])
        self.norms.append(float(norms.sum()))


class Thawing(BaseFinetuning):
    """Compares parameters with those that the optimiser has, as Lightning does."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model[0], optimizer, lr=0.01)


class Steps(Callback):
    """Divides what happens into training steps."""

    def __init__(self) -> None:
        from accelerator import waits
        from accelerator_group import calls

        self._watching: tuple[Any, Any] = (waits, calls)
        self._inside: list[Any] = []
        self.waits: list[list[str]] = []
        self.calls: list[list[Any]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.on_train_end()
        self._inside = [watch() for watch in self._watching]
        found = [context.__enter__() for context in self._inside]
        self.waits.append(found[0])
        self.calls.append(found[1])

    def on_validation_start(self, *_: Any) -> None:
        self.on_train_end()

    def on_train_end(self, *_: Any) -> None:
        for context in self._inside:
            context.__exit__(None, None, None)
        self._inside = []


class NotingBalancer(LoadBalancer):
    """Notes the steps after which ranks exchange what they have measured."""

    def __init__(self, noted: list[int]) -> None:
        super().__init__(warmup_steps=1, tune_steps=2)
        self._noted = noted

    def _exchange_reports(self) -> None:
        assert self._strategy is not None
        self._noted.append(self._strategy.trainer.fit_loop.total_batch_idx)
        super()._exchange_reports()


def loader(size: int, batch_size: int, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(size) % 3), batch_size=batch_size, shuffle=seed == 1)


def on_the_device(group: str) -> None:
    """Give this process a virtual device, and a process group that carries its tensors."""
    import accelerator_group

    if dist.get_backend() != accelerator_group.BACKEND:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        dist.destroy_process_group()
        dist.init_process_group(
            accelerator_group.BACKEND, init_method=f"file://{group}", rank=rank, world_size=world_size
        )


def trained(case: Case, folder: str, *, accelerated: bool) -> Outcome:
    world_size = dist.get_world_size()
    if accelerated:
        on_the_device(f"{folder}/group")
    from accelerator import VirtualAccelerator, values_of
    from accelerator_group import calls

    steps = Steps()
    agreed: list[int] = []
    callbacks: list[Callback] = [steps]
    if case.balanced:
        callbacks.append(NotingBalancer(agreed))
    if case.looks and case.strategy == "hetero_pipeline":
        callbacks.append(Thawing())
    strategy = STRATEGIES[case.strategy](**case.options)
    strategy.determine_ddp_device_ids = lambda: None  # Lightning takes every other device for one of CUDA
    settings: dict[str, Any] = {"max_epochs": case.epochs, "limit_val_batches": 1.0, "num_sanity_val_steps": 1}
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks,
        accelerator=VirtualAccelerator() if accelerated else "cpu",
        **settings | case.trainer,
    )
    module = Looking() if case.looks else Network(metrics=case.metrics)
    batch_size = 8 if case.strategy == "hetero_pipeline" else 4
    with calls() as other_calls, shards_on_a_virtual_device() if accelerated else nullcontext():
        trainer.fit(module, loader(case.samples, batch_size, 1), loader(13, batch_size, 2))
        path = os.path.join(folder, "saved.ckpt")
        values = {k: float(values_of(v)) for k, v in trainer.callback_metrics.items()}
        trainer.save_checkpoint(path)
        values |= {f"test_{k}": v for k, v in trainer.test(module, loader(11, batch_size, 4), verbose=False)[0].items()}
    if isinstance(module, Looking):
        values |= {f"norm {number}": norm for number, norm in enumerate(module.norms)}
    checkpoint = torch.load(path, weights_only=False)
    states = checkpoint["optimizer_states"][0]["state"]
    saved = {**checkpoint["state_dict"], **{f"model {i} {k}": v for i in states for k, v in states[i].items()}}
    return Outcome(
        flat_values(module.state_dict()), values, flat_values(saved), steps.waits, steps.calls, other_calls, agreed
    )


@contextmanager
def shards_on_a_virtual_device() -> Iterator[None]:
    """The virtual group takes lists of parts, as NCCL does, and has no name by which torch could end a second one."""
    fsdp = "lightning_hetero.plugin.fsdp.strategy"
    with (
        mock.patch(
            "lightning_hetero.distributed.shards.engine.exchange_for",
            lambda _, groups, __: NcclExchange(groups.forward),
        ),
        mock.patch(f"{fsdp}.refuse_module"),  # a virtual tensor has a class of its own
        mock.patch(f"{fsdp}.ShardEngine.leave_group"),
    ):
        yield


SENT_AS_BYTES = ("layer_profile.py", "links.py", "flat.py", "shard_tensor.py")


def flat_values(state: dict[str, Tensor]) -> list[float]:
    from accelerator import values_of

    return torch.cat([values_of(v).detach().flatten().double() for k, v in state.items() if "model" in k]).tolist()


CASES = {
    "ddp": Case("hetero_ddp", {"shares": [1.0, 1.0]}),
    "unequal": Case("hetero_ddp", {"shares": [1.0, 3.0]}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}),
    "an empty rank": Case("hetero_ddp", {"shares": [1.0, 30.0]}, samples=45),
    "micro-batches": Case("hetero_ddp", {"shares": [3.0, 1.0], "micro_batch_size": 2}),
    "balanced": Case("hetero_ddp", balanced=True),
    "shards": Case(
        "hetero_fsdp",
        {"shares": [1.0, 3.0], "shard_weights": [2, 1], "units": [nn.Linear]},
        {"gradient_clip_val": 0.5},
        looks=True,
    ),
    "pipeline": Case("hetero_pipeline", {"splits": [3]}, {"gradient_clip_val": 0.5}),
    "hooks of a pipeline": Case("hetero_pipeline", {"splits": [3]}, looks=True),
    "found stages": Case("hetero_pipeline"),
    "replicas": Case("hetero_pipeline", {"replicas": [[0], [1]], "speeds": [1, 3]}, {"gradient_clip_val": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_device_trains_as_the_host_does(name: str, accelerated: RankPools, ranks: RankPools, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    expected = ranks.run(2, partial(trained, accelerated=False), CASES[name], f"{tmp_path}/host")
    found = accelerated.run(2, partial(trained, accelerated=True), CASES[name], str(tmp_path))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.parameters, other.parameters, EXACT)
        assert one.values.keys() == other.values.keys()
        assert_close(list(one.values.values()), list(other.values.values()), EXACT)
        for call in (*one.other_calls, *(call for step in one.calls for call in step)):
            assert call.on_device, call  # what is on the host goes through the hosts' group
            # as objects do; the profile of layers sends messages of the size of activations
            assert call.dtype != "torch.uint8" or any(file in call.line for file in SENT_AS_BYTES), call
    assert_close(found[0].saved, expected[0].saved, EXACT)


def moved(folder: str, *, accelerated: bool) -> Outcome:
    with scripted([StagePlan((1, 0), ends) for ends in ((1, 6), (5, 6), (3, 6))]):
        return trained(Case("hetero_pipeline", {"schedule": "1f1b", "watch_steps": 1}), folder, accelerated=accelerated)


def replicas(folder: str, *, accelerated: bool) -> Outcome:
    """Other shares, and layers that move within the first replica."""
    alone = Replica((1,), StagePlan((0,), (6,)), 1.0)
    plans = [(5, 1.0), (5, 3.0), (2, 3.0), (3, 0.5)]
    held = [ReplicaPlan((Replica((0, 2), StagePlan((1, 0), (end, 6)), share), alone)) for end, share in plans]
    with scripted(held):
        case = Case("hetero_pipeline", {"watch_steps": 1, "replicas": [[0, 2], [1]]}, {"gradient_clip_val": 0.5})
        return trained(case, folder, accelerated=accelerated)


def planned_replicas(folder: str, *, accelerated: bool) -> Outcome:
    with mock.patch.object(replica_planning, "solve_ordered_replicas", partial(planned, "split v")):
        case = Case("hetero_pipeline", {"replicas": [[0, 2], [1]]}, {"gradient_clip_val": 0.5})
        return trained(case, folder, accelerated=accelerated)


def shared(folder: str, *, accelerated: bool) -> Outcome:
    with mock.patch.object(planning, "choose_order", partial(always_shared, v_shapes)):
        return trained(Case("hetero_pipeline", {"schedule": "auto"}), folder, accelerated=accelerated)


@pytest.mark.parametrize(
    ("run", "size"),
    [(moved, 2), (shared, 2), *(pytest.param(run, 3, marks=thorough) for run in (replicas, planned_replicas))],
)
def test_layers_move_between_devices(
    run: Any, size: int, accelerated: RankPools, ranks: RankPools, tmp_path: Path
) -> None:
    (tmp_path / "host").mkdir()
    expected = ranks.run(size, partial(run, accelerated=False), f"{tmp_path}/host")
    for one, other in zip(accelerated.run(size, partial(run, accelerated=True), str(tmp_path)), expected, strict=True):
        assert_close(one.parameters, other.parameters, EXACT)
        assert all(call.on_device for step in one.calls for call in step)


# The first steps of DDP itself: it arranges its buckets after the first. hetero_ddp asks once what steps are made of.
FIRST_STEPS = 2


@pytest.mark.parametrize(
    "options", [{"shares": [1.0, 3.0]}, {"shares": [1.0, 1.0]}, {"shares": [1.0, 30.0]}], ids=lambda o: str(o["shares"])
)
def test_an_ordinary_step_waits_and_communicates_as_under_ddp(
    options: dict[str, Any], accelerated: RankPools, tmp_path: Path
) -> None:
    trainer = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "log_every_n_steps": 3}
    seen = []
    for case in (Case("ddp", trainer=trainer), Case("hetero_ddp", options, trainer)):
        (tmp_path / case.strategy).mkdir()
        found = accelerated.run(2, partial(trained, accelerated=True), case, f"{tmp_path}/{case.strategy}")
        seen.append([[(waits_at(o, i), carried_at(o, i)) for i in range(FIRST_STEPS, len(o.calls))] for o in found])
    assert seen[0] == seen[1]
    assert sum(bool(step[1]) for step in seen[1][0]) >= 5  # gradients


def test_a_balanced_training_waits_and_communicates_where_it_measures(accelerated: RankPools, tmp_path: Path) -> None:
    case = Case("hetero_ddp", metrics=False, samples=240, balanced=True)
    for outcome in accelerated.run(2, partial(trained, accelerated=True), case, str(tmp_path)):
        ordinary = [i for i in range(len(outcome.calls)) if i >= FIRST_STEPS and i not in outcome.agreed]
        assert 0 < len(outcome.agreed) <= 12  # most of them while it tunes
        assert len(ordinary) >= 40
        unusual = {i: (waits_at(outcome, i), carried_at(outcome, i)) for i in ordinary}
        assert {i: seen for i, seen in unusual.items() if seen != ([], [("allreduce", PARAMETERS)])} == {}


def test_an_ordinary_step_of_a_pipeline_makes_nobody_wait(accelerated: RankPools, tmp_path: Path) -> None:
    case = Case("hetero_pipeline", {"splits": [3]}, {"gradient_clip_val": 0.5})
    for outcome in accelerated.run(2, partial(trained, accelerated=True), case, str(tmp_path)):
        per_epoch = len(outcome.calls) // case.epochs
        for step in range(FIRST_STEPS, len(outcome.calls)):
            if (step + 1) % per_epoch:  # what steps have left in the module reaches other hosts before a hook reads it
                assert waits_at(outcome, step) == []
            carried = Counter(carried_at(outcome, step))
            # activations and their gradients, the step's output, the norm of the gradients
            assert carried == {("send", 24): 4, ("recv", 24): 4, ("broadcast", 2): 1, ("allreduce", 1): 1}


def test_an_ordinary_step_of_replicas_makes_nobody_wait(accelerated: RankPools, tmp_path: Path) -> None:
    case = Case("hetero_pipeline", {"replicas": [[0], [1]], "speeds": [1, 3]}, {"gradient_clip_val": 0.5})
    for rank, outcome in enumerate(accelerated.run(2, partial(trained, accelerated=True), case, str(tmp_path))):
        per_epoch = len(outcome.calls) // case.epochs
        for step in range(3, len(outcome.calls)):  # the first ones are looked at
            if (step + 1) % per_epoch:
                assert waits_at(outcome, step) == []
            carried = carried_at(outcome, step)
            # what the other replica has returned and given to metrics, in one message for each type
            assert {name for name, _ in carried} == {"allreduce", "broadcast", "send" if rank else "recv"}
            # gradients, the norm of the gradients; the step's output
            collectives = Counter(call for call in carried if call[0] in ("allreduce", "broadcast"))
            assert collectives == {("allreduce", PARAMETERS): 1, ("allreduce", 1): 1, ("broadcast", 2): 1}


PARAMETERS = 303


# Under every strategy of several ranks, Lightning's loop asks rank 0 before each step whether it has got a signal.
LIGHTNING = "training_epoch_loop.py"


def waits_at(outcome: Outcome, step: int) -> list[str]:
    """Return where the host waits in a step, without the lines that lead there."""
    found = (wait.split(" in ") for wait in outcome.waits[step])
    return sorted(what for what, line in found if LIGHTNING not in line)


def carried_at(outcome: Outcome, step: int) -> list[tuple[str, int]]:
    """Return what the device's group carries in a step: methods and numbers of elements."""
    return [(call.name, call.elements) for call in outcome.calls[step] if LIGHTNING not in call.line]
