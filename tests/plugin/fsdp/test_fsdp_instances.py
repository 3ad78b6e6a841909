"""What people write in modules, hooks and steps is trained as under `hetero_ddp`, or refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from profiles import THOROUGH, thorough
from shard_instances import HOOKS, MODELS, Hooks, ManualSteps, Step, WithLion
from shard_models import Plain, seeded
from shard_trainings import Module, check, differences, fit
from torch import Tensor, nn
from torch.nn import functional
from training import assert_close

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy
from lightning_hetero.distributed.shards.passes.meeting import Meeting
from lightning_hetero.distributed.shards.passes.places import Place
from lightning_hetero.distributed.shards.passes.watch import PassWatch
from lightning_hetero.exceptions import HeteroError, UnsupportedFeatureError
from lightning_hetero.plugin.fsdp.refusals import warn_of_kept

SHARES, WEIGHTS = {"shares": [3, 1]}, {"shard_weights": [2, 1]}


class LogsSeen(Hooks):
    """Lets the comparison look at what hooks have seen."""

    @property
    def norms(self) -> list[float]:
        return self.seen

    @norms.setter
    def norms(self, value: list[float]) -> None:
        """Leave the norms of gradients out."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the norms of gradients out."""


def compared(cases: list[tuple[str, Callable[[], Module], dict[str, Any]]]) -> list[tuple[str, dict[str, float]]]:
    found = []
    for name, make, changed in cases:
        ddp = {**SHARES, **changed.pop("ddp", {})}
        options = {"max_steps": 4, "limit_val_batches": 1, **changed}
        kind: Any = lambda _, make=make: make()  # noqa: E731
        try:
            found.append((name, differences(kind, Plain, ddp, dict(WEIGHTS), 2, options)))
        except Exception as error:
            raise RuntimeError(name) from error
    return found


def of_model(name: str) -> Module:
    return Module(seeded(MODELS[name]))


def with_lion() -> Module:
    return WithLion(seeded(Plain))


MORE = [
    "weight norm of hooks",
    "spectral norm",
    "parametrised unit",
    "in place",
    "dropout",
    "odd shapes",
    "spectral norm of hooks",
    "returned objects",
]  # if there is time


def test_modules_of_all_kinds(ranks: RankPools) -> None:
    names = [name for name in MODELS if THOROUGH or name not in MORE]
    check(ranks.run(2, compared, [(name, partial(of_model, name), {}) for name in names], timeout_s=200.0))


STEPS = ["teacher", "kept written", "saved"]
MANUAL = ["two losses", "sharpness-aware"]
if THOROUGH:
    STEPS += ["adversarial", "written", "no gradient", "average", "of the root"]
    MANUAL += ["sometimes two steps"]


def test_steps_and_hooks_of_all_kinds(ranks: RankPools, tmp_path: Path) -> None:
    cases: list[Any] = [(kind, partial(Step, kind), {}) for kind in STEPS]
    unused = {"find_unused_parameters": True}
    cases += [(kind, partial(ManualSteps, kind), {"ddp": unused}) for kind in MANUAL]
    cases += [("hooks", partial(LogsSeen, HOOKS), {"max_steps": 6, "batch_size": 6})]
    cases += [("Lion", with_lion, {})]
    check(ranks.run(2, in_folder, str(tmp_path), cases, timeout_s=200.0))


def in_folder(folder: str, cases: list[Any]) -> list[tuple[str, dict[str, float]]]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return compared(cases)
    finally:
        os.chdir(before)


class Finetuning(BaseFinetuning):
    """Trains the blocks from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.blocks, optimizer, lr=0.01)


def finetuned(strategy: Any, world_size: int) -> list[float]:
    module = Module(seeded(Plain))
    options = {"max_epochs": 3, "max_steps": -1, "batch_size": 8 // world_size, "limit_val_batches": 0}
    found = fit(strategy, module, world_size, callbacks=[Finetuning()], **options)
    return torch.cat([value.flatten() for value in found["parameters"].values()]).tolist()


def test_parameters_that_are_trained_later(ranks: RankPools) -> None:
    # DDP warns and diverges; one device is what is right
    expected = torch.tensor(ranks.run(1, finetuned, HeteroFSDPStrategy(), 1)[0])
    for found in ranks.run(2, finetuned, HeteroFSDPStrategy(shares=[3, 1], shard_weights=[2, 1]), 2):
        assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=1e-10)


class Averaged(Module):
    """Averages its weights in parts, and keeps them in its checkpoint."""

    def on_train_start(self) -> None:
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]

    def on_train_batch_end(self, *_: Any) -> None:
        for average, parameter in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.5)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["average"] = {"weights": self.average, "steps": self.global_step}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["average"]["weights"]


def averaged(path: str, strategy: Any) -> list[float]:
    module = Averaged(seeded(Plain))
    module.on_train_end = lambda: module.trainer.save_checkpoint(path)  # type: ignore[method-assign]
    fit(strategy, module, 2, max_steps=4)
    dist.barrier()
    loaded: list[Tensor] = torch.load(path, weights_only=True)["average"]["weights"]
    dist.barrier()
    return torch.cat([value.flatten() for value in loaded]).tolist()


def test_averages_of_weights_in_a_checkpoint_are_whole(ranks: RankPools, tmp_path: Path) -> None:
    path = str(tmp_path / "averaged.ckpt")
    expected = ranks.run(2, averaged, path, HeteroDDPStrategy(shares=[3, 1]))[0]
    found = ranks.run(2, averaged, path, HeteroFSDPStrategy(shares=[3, 1], shard_weights=[2, 1]))[0]
    assert_close(found, expected)


# ---- refusals --------------------------------------------------------------------------------------------------------


class Wrong(Module):
    """Does something that shards cannot do."""

    def __init__(self, kind: str) -> None:
        super().__init__(seeded(Plain))
        self.kind = kind
        net: Any = self.model
        if kind == "scripted":
            net.blocks[1] = torch.jit.script(nn.Linear(6, 6).double())
        if kind == "subclass":
            net.blocks[1].up.weight = nn.Parameter(net.blocks[1].up.weight.data.as_subclass(Quantised))
        self.automatic_optimization = kind not in ("backward left out",)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        _, x, y = batch
        net: Any = self.model
        loss = functional.mse_loss(self(x), y)
        if self.kind == "functional call":
            with torch.no_grad():
                halved = {name: p.detach() * 0.5 for name, p in net.named_parameters()}
                torch.func.functional_call(net, halved, (x,))
        if self.kind == "replaced":
            net.blocks[0].up.weight = nn.Parameter(torch.ones(7, 6, dtype=torch.float64))
        if self.kind == "gradients":
            torch.autograd.grad(loss, [*self.parameters()], retain_graph=True, allow_unused=True)
        if self.kind == "elementwise penalty":
            return loss + _pick(net.blocks[1].up.weight)
        if self.kind == "kept penalty":
            return loss + (self.kept_list()[6] ** 2).sum()
        if self.kind == "array":
            net.blocks[0].up.weight.detach().numpy()
        if not self.automatic_optimization and not (batch_idx == 1 and dist.get_rank() == 1):
            self.manual_backward(loss)
        return loss

    def kept_list(self) -> list[Any]:
        return list(self.model.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        if self.kind == "hook of one rank" and dist.get_rank() == 0:
            with torch.no_grad():
                self(torch.ones(2, 5, dtype=torch.float64))
        if self.kind == "frozen on one rank" and dist.get_rank() == 0:
            next(self.model.parameters()).requires_grad_(False)


class Quantised(Tensor):
    """A tensor that is more than its numbers."""


def _pick(weight: Tensor) -> Tensor:
    """Return a number whose gradient is computed element by element."""
    result: Tensor = weight.norm(1)
    return result


REFUSED = {
    "scripted": "torch.jit has scripted",
    "subclass": "of the class Quantised",
    "functional call": "has been replaced after the set-up",
    "replaced": "has been replaced after the set-up",
    "gradients": "`torch.autograd.grad` cannot compute",
    "elementwise penalty": "outside of the `forward` of the unit that owns it",
    "kept penalty": "looks at numbers that other ranks hold",
    "array": "`numpy` cannot be computed",
}
ON_ONE_RANK = {
    "backward left out": "the ranks are at different points of the program: rank 0 in the backward pass",
    "hook of one rank": "a hook uses the model on rank 0, but not on all others: rank 1 waits",
}


def refused(kinds: list[str]) -> list[str]:
    found = []
    for kind in kinds:
        try:
            fit(HeteroFSDPStrategy(shares=[3, 1], shard_weights=[2, 1]), Wrong(kind), 2, max_steps=3)
        except HeteroError as error:
            found.append(str(error))
        else:
            found.append("was trained")
        dist.barrier()
    return found


def test_what_would_be_wrong_is_refused(ranks: RankPools) -> None:
    for messages in ranks.run(2, refused, list(REFUSED), timeout_s=150.0):
        for kind, message in zip(REFUSED, messages, strict=True):
            assert REFUSED[kind] in message, (kind, message)


def on_one_rank(kind: str) -> None:
    with mock.patch.object(PassWatch, "tick_s", 0.2), mock.patch.object(PassWatch, "stuck_ticks", 5):
        fit(HeteroFSDPStrategy(shares=[3, 1], shard_weights=[2, 1]), Wrong(kind), 2, max_steps=3)


def test_parameters_that_one_rank_freezes_end_all_with_the_reason(ranks: RankPools) -> None:
    for (message,) in ranks.run(2, refused, ["frozen on one rank"]):
        assert "the ranks train different parameters" in message


@thorough  # the rank that waits elsewhere is ended after ten seconds
@pytest.mark.parametrize("kind", ON_ONE_RANK)
def test_what_one_rank_does_alone_ends_all_with_the_reason(ranks: RankPools, kind: str) -> None:
    with pytest.raises(RankError) as error:
        ranks.run(2, on_one_rank, kind)
    assert ON_ONE_RANK[kind] in str(error.value)


def waiting_elsewhere() -> str:
    """Wait in a hook on rank 0, and in another collective on rank 1."""
    group: Any = dist.new_group()
    told: list[str] = []
    with mock.patch.object(PassWatch, "tick_s", 0.1), mock.patch.object(PassWatch, "stuck_ticks", 5):
        watch = PassWatch(group, told.append)
        watch.note(Place.of("train", 1, 0))
        if dist.get_rank() == 0:
            watch.note(Place.of("hook", 1, 1))
            work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
            with pytest.raises(UnsupportedFeatureError) as error:
                watch.wait(work)
            dist.barrier()
            reason = str(error.value)
        else:
            dist.barrier()
            dist.all_reduce(torch.ones(1), group=group)
            reason = watch.reason or ""
        watch.stop()
    dist.barrier()
    return reason


def test_a_hook_of_one_rank_is_noticed_while_the_others_wait_elsewhere(ranks: RankPools) -> None:
    for reason in ranks.run(2, waiting_elsewhere):
        assert (
            "a hook uses the model on rank 0, but not on all others: rank 1 waits for other ranks elsewhere" in reason
        )


Row = tuple[str, int, int, int]


def met(mine: list[Row]) -> str:
    reasons: list[str] = []
    group: Any = dist.group.WORLD
    watch = PassWatch(group, reasons.append)
    meeting = Meeting(group, nullcontext, watch)
    meeting.begin(Place.of("train", 1, 0, 7))
    meeting.check()
    meeting.begin(Place.of(*mine[dist.get_rank()]))
    with pytest.raises(UnsupportedFeatureError):
        meeting.check()
    watch.stop()
    assert meeting.failed
    return reasons[0]


def test_ranks_in_different_passes_notice_it(ranks: RankPools) -> None:
    cases: list[tuple[list[Row], str]] = [
        (
            [("backward", 2, 0, 0), ("end", 2, 1, 0)],
            "rank 0 in the backward pass of training step 2, rank 1 in the end of",
        ),
        ([("hook", 2, 1, 0), ("train", 3, 0, 7)], "rank 0 in the hook that uses the model after step 2, rank 1 in the"),
        ([("validate", 2, 0, 0), ("validate", 3, 0, 0)], "rank 0 in the evaluation step 2, rank 1 in the evaluation"),
        ([("train", 2, 0, 0), ("train", 2, 0, 1)], "the ranks train different parameters"),
    ]
    for rows, reason in cases:
        for found in ranks.run(2, met, rows):
            assert reason in found


def pruned() -> None:
    with pytest.raises(UnsupportedFeatureError, match="ModelPruning compares all weights of a layer"):
        fit(HeteroFSDPStrategy(), Module(seeded(Plain)), 2, callbacks=[ModelPruning("l1_unstructured", amount=0.3)])


def test_pruning_is_refused(ranks: RankPools) -> None:
    ranks.run(2, pruned)


@pytest.mark.parametrize("make", [set, list, lambda found: {id(p) for p in found}, lambda found: {"first": found[0]}])
def test_collections_of_parameters_are_named(make: Callable[[list[Any]], Any]) -> None:
    module: Any = seeded(Plain)
    parameters = list(module.parameters())
    module.blocks[1].mine = make(parameters)
    with pytest.warns(UserWarning, match=r"the attribute 'blocks\.1\.mine' keeps parameters"):
        warn_of_kept(module, parameters)
