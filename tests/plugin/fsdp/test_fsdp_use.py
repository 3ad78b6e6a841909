"""What cannot be right is refused before the first step, and what ordinary trainings do works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from shard_models import Plain, Unused, seeded
from shard_trainings import Module, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Numbered, make_trainer

from lightning_hetero import HeteroFSDPStrategy, LargestBatchFinder, LoadBalancer
from lightning_hetero.balance.shards.memory import ModelMemory
from lightning_hetero.distributed.shards.units import find_units
from lightning_hetero.exceptions import ConfigurationError, HeteroError, UnsupportedFeatureError
from lightning_hetero.hardware.memory import MemoryUse
from lightning_hetero.plugin.fsdp.weights import model_memory

# ---- refusals --------------------------------------------------------------------------------------------------------


class WholeOptimizer(torch.optim.Optimizer):
    """Looks at rows of a parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None and p.ndim > 1:
                    p.sub_(p.grad / (p.grad.norm(dim=1, keepdim=True) + 1))
        return loss


class ByNumel(WholeOptimizer):
    """Computes something else on parts, without an operation that says so."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                local = getattr(p, "local", p)
                local.sub_(0.01 * local / local.numel())
        return loss


class With(Module):
    """A module that does one thing differently."""

    def __init__(self, change: str) -> None:
        super().__init__(seeded(Unused if change == "unused" else Plain))
        self.change = change
        self.blocks: Any = self.model.blocks
        self.kept = list(self.parameters())
        if change == "compiled":
            self.model.compile(backend="eager")
        if change == "lazy":
            self.model.last = nn.LazyLinear(1)

    def configure_optimizers(self) -> Any:
        made: dict[str, Callable[[], Any]] = {
            "kept parameters": lambda: torch.optim.SGD(self.kept, lr=0.1),
            "rows": lambda: WholeOptimizer(self.parameters()),
            "by numel": lambda: ByNumel(self.parameters()),
            "adafactor": lambda: torch.optim.Adafactor(self.parameters()),
            "lbfgs": lambda: torch.optim.LBFGS(self.parameters()),
        }
        return made.get(self.change, super().configure_optimizers)()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.change == "penalty":
            x = batch[1].clone().requires_grad_()
            torch.autograd.grad(self(x).sum(), x, create_graph=True)
        if self.change == "regulariser":
            return loss + (self.blocks[0].up.weight ** 2).sum()
        if self.change == "borrowed":
            return loss + nn.functional.linear(batch[1], self.blocks[0].up.weight).sum()
        if self.change == "own backward":
            loss.backward()
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.change == "hook":
            next(self.model.parameters()).register_hook(print)
        if self.change == "out of memory":
            self.blocks[1].register_forward_pre_hook(_no_memory)


def _no_memory(*_: Any) -> None:
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")


REFUSED = {
    "unused": "have no gradient on this rank. Set HeteroFSDPStrategy(find_unused_parameters=True)",
    "compiled": "torch.compile has compiled",
    "lazy": "must know the shape of every parameter",
    "kept parameters": "Take the parameters from `self.parameters()` inside of `configure_optimizers`",
    "rows": "cannot train with WholeOptimizer",
    "by numel": "cannot train with ByNumel",
    "adafactor": "cannot train with Adafactor",
    "lbfgs": "cannot train with LBFGS",
    "regulariser": "looks at numbers that other ranks hold",
    "borrowed": "looks at numbers that other ranks hold",
    "penalty": "gradients of gradients",
    "own backward": "Use `self.manual_backward(loss)`",
    "hook": "would never be called",
}


def refused(changes: list[str]) -> list[str]:
    found = []
    for change in changes:
        before = [p.detach().clone() for p in With(change).parameters() if not isinstance(p, nn.UninitializedParameter)]
        module = With(change)
        try:
            fit(HeteroFSDPStrategy(shard_weights=[2, 1], shares=[3, 1]), module, 2)
        except UnsupportedFeatureError as error:
            found.append(str(error))
        else:
            found.append("was trained")
        assert before
        dist.barrier()
    return found


def test_what_would_be_wrong_is_refused(ranks: RankPools) -> None:
    changes = list(REFUSED)
    for messages in ranks.run(2, refused, changes, timeout_s=150.0):
        for change, message in zip(changes, messages, strict=True):
            assert REFUSED[change] in message, change


def out_of_memory() -> str:
    try:
        fit(HeteroFSDPStrategy(shares=[3, 1]), With("out of memory"), 2)
    except HeteroError as error:
        dist.barrier()
        return str(error)
    return "was trained"


def test_memory_that_runs_out_stops_all_ranks_with_the_reason(ranks: RankPools) -> None:
    first, second = ranks.run(2, out_of_memory)
    assert first == f"Another rank has failed: {second}"
    assert second.startswith("Rank 1 (cpu) ran out of memory in the forward pass")
    assert "the ranks gather parameters together in every forward and backward pass" in second
    assert "Lower the batch size, set `max_batch_size`, or divide the model" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_weights": "even"}, '`shard_weights` must be "auto", one number per rank'),
        ({"shard_weights": [1, -1]}, "`shard_weights[1]` must be a finite number of at least 0, got -1"),
        ({"shard_weights": [0, 0]}, "`shard_weights` must not all be 0"),
        ({"shard_weights": {3: 1}}, "`shard_weights` must map device names to numbers"),
        ({"units": ["Block"]}, '`units` must be "auto" or a list of classes'),
        ({"units": []}, '`units` must be "auto" or a list of classes'),
        ({"activation_bytes": -1}, "`activation_bytes` must be a finite number of at least 0"),
        ({"find_unused_parameters": 1}, "`find_unused_parameters` must be"),
        ({"micro_batch_size": 4}, "`micro_batch_size` must be None for HeteroFSDPStrategy"),
        ({"static_graph": True}, "must not be given to HeteroFSDPStrategy: no DDP wraps the module"),
        ({"shard_weigths": [1]}, "Did you mean `shard_weights`?"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        HeteroFSDPStrategy(**arguments)
    assert message in str(error.value)


def checked_on_ranks() -> None:
    wrong: list[tuple[Any, str]] = [
        ([1, 1, 1], r"one number per rank \(2\), got 3"),
        ({"none": 1}, "must name the device"),
    ]
    for weights, message in wrong:
        with pytest.raises(ConfigurationError, match=message):
            fit(HeteroFSDPStrategy(shard_weights=weights), Module(seeded(Plain)), 2)
    callbacks: list[tuple[Callback, str]] = [
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging copies the whole model"),
        (LargestBatchFinder(), "runs steps of other sizes on each rank alone"),
    ]
    for callback, message in callbacks:
        with pytest.raises(UnsupportedFeatureError, match=message):
            fit(HeteroFSDPStrategy(), Module(seeded(Plain)), 2, callbacks=[callback])


def test_what_depends_on_ranks_is_checked(ranks: RankPools) -> None:
    ranks.run(2, checked_on_ranks)


# ---- ordinary use ----------------------------------------------------------------------------------------------------


class Watching(Module):
    """Looks at its parameters as users do."""

    def __init__(self) -> None:
        super().__init__(seeded(Plain))
        parameters: list[Any] = list(self.parameters())
        for parameter in parameters:
            parameter._mark = parameter.ndim
        self.hooked: list[float] = []
        last: Any = self.model.last
        last.weight.register_hook(lambda g: self.hooked.append(float(g.norm())))
        self.seen: dict[str, Any] = {}

    def on_after_backward(self) -> None:
        parameters: list[Any] = list(self.parameters())
        self.seen["marks"] = all(p._mark == p.ndim for p in parameters)
        self.seen["norm"] = float(torch.stack([p.grad.norm() for p in parameters]).norm())
        self.seen["whole"] = float(torch.cat([p.grad.full_tensor().flatten() for p in parameters]).norm())
        copied = copy.deepcopy(self.model)
        self.seen["copied"] = all(
            torch.equal(a.full_tensor(), b.full_tensor())
            for a, b in zip(_parameters(copied), _parameters(self.model), strict=True)
        )
        ema: list[Any] = [p.detach().clone() for p in parameters]
        for average, parameter in zip(ema, parameters, strict=True):
            average.mul_(0.9).add_(parameter.detach(), alpha=0.1)
        held = sum(p.local.numel() for p in parameters)
        total = sum(p.numel() for p in parameters)
        gradients = sum(p.grad.local.numel() for p in parameters)
        optimizer: Any = self.trainer.optimizers[0]
        states = sum(v.local.numel() for s in optimizer.state.values() for v in s.values() if hasattr(v, "local"))
        self.seen["parts"] = (held / total, gradients / total, states / total / 2)


def _parameters(module: nn.Module) -> list[Any]:
    return list(module.parameters())


def watched() -> Any:
    strategy = HeteroFSDPStrategy(shard_weights=[2, 1], shares=[3, 1])
    module: Any = Watching()
    engines: list[Any] = []
    trainer = make_trainer(strategy, 2, max_epochs=1)
    module.on_train_end = lambda: engines.append(strategy.engine)
    trainer.fit(module, DataLoader(Numbered(37), batch_size=4))
    (engine,) = engines
    predicted = trainer.predict(module, DataLoader(Numbered(15), batch_size=2))
    whole = all(type(p.data) is Tensor and p.is_leaf for p in module.parameters())
    with torch.no_grad():
        alone = module(torch.ones(1, 5, dtype=torch.float64)).item()
    return module.seen, engine.most_whole_units, len(module.hooked), whole, alone, len(predicted or [])


def test_users_see_what_they_see_under_ddp(ranks: RankPools) -> None:
    first, second = ranks.run(2, watched)
    for rank, (seen, most, hooked, whole, _, predicted) in enumerate((first, second)):
        assert seen["marks"]
        assert seen["copied"]
        assert seen["norm"] == pytest.approx(seen["whole"], rel=1e-12)
        for part in seen["parts"]:
            assert part == pytest.approx((2 / 3, 1 / 3)[rank], rel=0.01)
        assert most == 2
        assert hooked == 5
        assert whole
        assert predicted in (3, 4)
    assert first[0]["norm"] == second[0]["norm"]
    assert first[4] == second[4]


def predict_unequally() -> list[int]:
    """Predict with other numbers of batches on each rank, which no loader of ours gives."""
    module: Any = Module(seeded(Plain))
    module.predict_step = lambda batch, batch_idx: module(batch[1]).shape[0]
    trainer = make_trainer(HeteroFSDPStrategy(shard_weights=[2, 1]), 2, use_distributed_sampler=False)
    samples: Any = [(0.0, torch.ones(5, dtype=torch.float64))] * (5 if dist.get_rank() else 2)
    found: Any = trainer.predict(module, DataLoader(samples))
    return list(found or [])


def test_ranks_predict_different_numbers_of_batches(ranks: RankPools) -> None:
    assert [len(found) for found in ranks.run(2, predict_unequally)] == [2, 5]


class FakeMemory:
    """A device of known memory."""

    def __init__(self, free: float, samples: Callable[[], int] = lambda: 0) -> None:
        self.free = free
        self.samples = samples

    def restart(self) -> None:
        """Do nothing."""

    def read(self) -> MemoryUse:
        """Return what is held between steps and with the current samples."""
        return MemoryUse(1000, 1000 + 100 * self.samples(), int(self.free))


class Slow(Module):
    """Each sample takes four times as long on rank 1."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        import time

        time.sleep(len(batch[0]) * (0.012 if dist.get_rank() else 0.003))
        return super().training_step(batch, batch_idx)


class Limited(HeteroFSDPStrategy):
    """Its devices have room for 14 samples besides their shards."""

    def setup_environment(self) -> None:
        super().setup_environment()
        self.memory = FakeMemory((1000 + 14.5 * 100) / 0.92, lambda: getattr(self.training_slice, "samples", 0))


def tuned() -> list[int]:
    balancer = LoadBalancer(tune_steps=12, watch_steps=0, verbose=False, record=False)
    fit(
        Limited(shard_weights=[2, 1]),
        Slow(seeded(Plain)),
        2,
        callbacks=[balancer],
        batch_size=10,
        max_steps=24,
        limit_val_batches=0,
    )
    return list(balancer.changes[-1][1].samples) if balancer.changes else []


def test_waiting_for_parameters_is_not_own_time_and_plans_fit_beside_shards(ranks: RankPools) -> None:
    fast, slow = ranks.run(2, tuned)[0]
    assert fast > 1.5 * slow  # 10 to 10 if waiting counted
    assert fast <= 14  # 16 to 4 would be fastest


# ---- weights and units -----------------------------------------------------------------------------------------------


class OnDevice(HeteroFSDPStrategy):
    """Its devices have this much memory."""

    def __init__(self, free: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.free = free

    def setup_environment(self) -> None:
        """Replace the meter."""
        super().setup_environment()
        self.memory = FakeMemory(self.free[self.global_rank])


def weights_on(free: list[int]) -> tuple[float, ...]:
    strategy = OnDevice(free, activation_bytes=10.0, shares=[3, 1], global_batch_size=8)
    kept: list[tuple[float, ...]] = []
    module: Any = Module(seeded(Plain))
    module.on_train_start = lambda: kept.append(strategy._weights)
    fit(strategy, module, 2, max_steps=1)
    return kept[0]


def test_weights_follow_the_memory_of_the_devices(ranks: RankPools) -> None:
    module = seeded(Plain)
    memory = model_memory(module, find_units(module))
    first, second = (0.92 * free - memory.gathered_bytes for free in (60_000, 40_000))
    assert ranks.run(2, weights_on, [60_000, 40_000])[1] == pytest.approx((first - 60, second - 20))
    with pytest.raises(RankError, match=r"are missing\. A model of .*% of the size would fit"):
        ranks.run(2, weights_on, [9_000, 9_000])


def test_memory_of_a_model() -> None:
    module: Any = seeded(Plain)
    total = sum(p.numel() for p in module.parameters()) * 8
    block = sum(p.numel() for p in module.blocks[0].parameters()) * 8
    assert model_memory(module, find_units(module)) == ModelMemory(4 * total, total - 3 * block + 4 * block)


def test_units_of_a_model() -> None:
    model: Any = seeded(Plain)
    assert find_units(model) == [*model.blocks]
    assert find_units(model, [nn.LayerNorm]) == [block.norm for block in model.blocks]
    assert find_units(nn.Linear(2, 2)) == []
    nested: Any = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})])
    assert find_units(nested) == [*nested[0].values()]
    with pytest.raises(ConfigurationError, match="`units` must name classes of modules of the model"):
        find_units(model, [nn.Conv2d])
