"""Whatever a user does between the loss and the optimiser, unequal shares give the gradients of whole batches.

Every case is trained on ranks of unequal shares and by a single process on whole global batches, and compared step by
step; where its data divide evenly, with ``ddp`` too.  On three ranks an epoch ends with a batch of one sample, so two
of them run on a stand-in, whose loss here is never finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from differences import measured
from harness import RankPools
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from profiles import thorough
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.functional import mse_loss, softplus
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler
from training import FEATURES, SEED, Numbered, SmallModule, flat, make_trainer, small_network

from lightning_hetero import HeteroDDPStrategy

TOLERANCE = 1e-10


# ---- modules ---------------------------------------------------------------------------------------------------------


class Whole(SmallModule):
    """Returns the plain loss; on a stand-in, which no single process ever sees, the loss is not finite."""

    poison = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, features, targets = batch
        self.ledger.append(index.tolist())
        dtype = next(self.network.parameters()).dtype
        return self.loss(index, features.to(dtype), targets.to(dtype)) * self.factor(index)

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(self.network(features), targets)

    def factor(self, index: Tensor) -> float:
        return self.poison if is_stand_in(index.tolist()) else 1.0


def is_stand_in(indices: Sequence[int]) -> bool:
    return len(indices) == 2 and indices[0] == indices[1]


class Adam(Whole):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)


class Lbfgs(Whole):
    """Runs the step several times on the same batch; stops by numbers of evaluations alone, which all ranks share."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3, tolerance_grad=0.0, tolerance_change=0.0)


class Adversarial(Whole):
    """Two optimisers, two backward passes that add up in one step, a gradient penalty, and clipping by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(FEATURES + 1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        generator = torch.Generator().manual_seed(3)
        for parameter in self.critic.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        index, features, targets = batch
        self.ledger.append(index.tolist())
        maker, critic = cast(list[LightningOptimizer], self.optimizers())

        self.toggle_optimizer(critic)
        critic.zero_grad()
        self.manual_backward(softplus(-self.judged(features, targets)).mean() * self.factor(index))
        made = self.network(features).detach().requires_grad_()
        judged = self.judged(features, made)
        (slope,) = torch.autograd.grad(judged.sum(), made, create_graph=True)
        self.manual_backward(softplus(judged).mean() + ((slope.abs() - 1) ** 2).mean())
        self.clip_gradients(critic.optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        critic.step()
        self.untoggle_optimizer(critic)

        self.toggle_optimizer(maker)
        maker.zero_grad()
        self.manual_backward(softplus(-self.judged(features, self.network(features))).mean() * self.factor(index))
        maker.step()
        self.untoggle_optimizer(maker)

    def judged(self, features: Tensor, values: Tensor) -> Tensor:
        judged: Tensor = self.critic(torch.cat([features, values], dim=1))
        return judged

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9),
            torch.optim.Adam(self.critic.parameters(), lr=0.01, eps=1e-3),
        ]


class ManualAccumulation(Whole):
    """Steps after every second batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer = cast(LightningOptimizer, self.optimizers())
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Frozen(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.network.get_submodule("0").requires_grad_(False)


class Branching(Whole):
    """One branch is used in some steps only; another for some samples only, which a rank may have none of."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes, self.for_some = small_network(), small_network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.in_use = batch_idx % 3 == 0
        return super().training_step(batch, batch_idx)

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        out = self.network(features)
        if self.in_use:
            out = out + self.sometimes(features)
        some = index % 8 == 0
        if some.any():
            out = out.index_put((some,), self.for_some(features[some]), accumulate=True)
        return mse_loss(out, targets)


class Checkpointed(Whole):
    reentrant = False

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        first, activation, last = self.network.children()
        hidden = checkpoint(first, features.requires_grad_(), use_reentrant=self.reentrant)
        return mse_loss(checkpoint(last, activation(hidden), use_reentrant=self.reentrant), targets)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CompiledPart(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.compile(self.network, backend="aot_eager")  # type: ignore[assignment]


class Summed(Whole):
    """A sum over the batch; like ``ddp``, ``hetero_ddp`` divides it by the number of ranks."""

    divisor = 1

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(self.network(features), targets, reduction="sum") / self.divisor


class Padded(Whole):
    """Averages over tokens; a sample has one to forty of them, the rest is padding."""

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        position = torch.arange(40, device=features.device)
        tokens = features[:, None, :] * (1 + position[None, :, None]) / 40
        kept = position < lengths(index)[:, None]
        errors = (self.network(tokens).squeeze(-1) - targets) ** 2
        mean: Tensor = (errors * kept).sum() / kept.sum()
        return mean


def lengths(index: Tensor) -> Tensor:
    return 1 + (index * index * 7) % 40


def count_tokens(batch: Any) -> int:
    return int(lengths(batch[0]).sum())


class InSinglePrecision(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.network.float()


class Larger(Whole):
    """In single precision too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.network = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class LargerAdam(Larger):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Overflowing(InSinglePrecision):
    """One sample, so one rank in one step of an epoch, has a loss that half precision cannot hold."""

    def loss(self, index: Tensor, features: Tensor, targets: Tensor) -> Tensor:
        return super().loss(index, features, targets + 1e6 * (index == 0)[:, None])


# ---- callbacks -------------------------------------------------------------------------------------------------------


class Record(Callback):
    """Keeps the gradients that the optimisers are given, and the parameters before each of their steps."""

    def __init__(self) -> None:
        self.gradients: list[list[float]] = []
        self.parameters: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in pl_module.parameters()]
        self.gradients.append(torch.cat([gradient.flatten() for gradient in gradients]).tolist())
        self.parameters.append(flat(pl_module))


class FreezeForAWhile(Callback):
    """Fine-tunes the last layer at first, then all, then the last layer again."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        trained = 4 <= trainer.fit_loop.total_batch_idx < 11
        pl_module.get_submodule("network.0").requires_grad_(trained)


class RegisterHook(Callback):
    """Lightning itself registers hooks on GPUs only."""

    def __init__(self, hook: Any, rank: int | None = None) -> None:
        self.hook = hook
        self.rank = rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            state = self.rank and powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.rank, start_powerSGD_iter=2, min_compression_rate=0.5
            )
            trainer.model.register_comm_hook(state, self.hook)


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is trained, the same way on all ranks and in the single process."""

    module: type[Whole] = Whole
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    hetero: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callable[[], Callback], ...] = ()
    cls: type[HeteroDDPStrategy] = HeteroDDPStrategy
    single: str = "auto"
    compiled: bool = False


@dataclass
class Run:
    """What a training produced on one rank."""

    parameters: list[float]
    gradients: list[list[float]]
    before: list[list[float]]
    ledger: list[list[int]]
    scale: float


@dataclass(frozen=True)
class Division:
    """How many samples there are, and which part of the 4 x ranks of a batch each rank has."""

    size: int
    shares: list[float]
    poison: float = 1.0

    @property
    def world_size(self) -> int:
        return len(self.shares)

    @property
    def batch(self) -> int:
        return 4 * self.world_size


EVEN = Division(46, [5, 2])  # ddp has equal parts of every batch
STAND_IN = Division(49, [1, 2, 4], math.inf)  # the last batch of an epoch has one sample
STAND_IN_NAN = Division(41, [1, 3], math.nan)


def fit(kind: str, case: Case, division: Division) -> Run:
    """Train on this rank; ``kind`` is "hetero", "ddp" or "single", on one rank and whole batches."""
    data = Numbered(division.size)
    if kind == "single":
        order: DistributedSampler[Any] = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True, seed=SEED)
        loader = DataLoader(data, batch_size=division.batch, sampler=order)
    else:
        loader = DataLoader(data, batch_size=4, shuffle=True)
    strategy: DDPStrategy | str = case.single
    if kind == "hetero":
        strategy = case.cls(shares=division.shares, **case.strategy, **case.hetero)
    elif kind == "ddp":
        strategy = DDPStrategy(**case.strategy)
    model = case.module()
    model.poison = division.poison
    if isinstance(model, Summed) and kind == "single":
        model.divisor = division.world_size
    settings: dict[str, Any] = {"max_epochs": 3} | case.trainer
    if settings.get("precision") == "16-mixed":
        # the scaler that Lightning makes is for GPUs
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        settings["plugins"] = [MixedPrecision(settings.pop("precision"), "cpu", scaler=scaler)]
    record = Record()
    callbacks = [make() for make in case.callbacks]
    trainer = make_trainer(strategy, dist.get_world_size(), [record, *callbacks], **settings)
    fitted: Any = torch.compile(model, backend="aot_eager") if case.compiled else model
    trainer.fit(fitted, loader)
    precision = trainer.precision_plugin
    scale = float(precision.scaler.get_scale()) if isinstance(precision, MixedPrecision) and precision.scaler else 1.0
    return Run(flat(model), record.gradients, record.parameters, model.ledger, scale)


def on_ranks(ranks: RankPools, kind: str, case: Case, division: Division) -> list[Run]:
    runs: list[Run] = ranks.run(1 if kind == "single" else division.world_size, fit, kind, case, division)
    # the ranks agree to the last bit: on the gradients of each step, and on where they end
    for run in runs[1:]:
        assert torch.equal(steps_of(run).nan_to_num(nan=7e7), steps_of(runs[0]).nan_to_num(nan=7e7))
        assert run.scale == runs[0].scale
    return runs


def steps_of(run: Run) -> Tensor:
    """Return the gradients of every step, the parameters before it, and those at the end."""
    assert run.gradients
    return torch.tensor([*run.gradients, *run.before, run.parameters], dtype=torch.float64)


def largest_difference(runs: Sequence[Run], reference: Run) -> float:
    """Return that of any gradient and any parameter in any step; NaN where one of them is."""
    return float((steps_of(runs[0]) - steps_of(reference)).abs().max())


def relative_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    return float((a - b).norm() / b.norm())


def norm_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    a, b = (torch.tensor(values, dtype=torch.float64).norm() for values in (ours, theirs))
    return float((a - b).abs() / b)


def stand_ins(runs: Sequence[Run]) -> int:
    return sum(is_stand_in(indices) for run in runs for indices in run.ledger)


def hooked(hook: Any, rank: int | None = None) -> tuple[Callable[[], Callback], ...]:
    return (partial(RegisterHook, hook, rank),)


UNUSED = {"find_unused_parameters": True}
ACCUMULATE_LATER = (partial(GradientAccumulationScheduler, {0: 1, 1: 3, 2: 2}),)
BY_VALUE = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}

CASES = {
    "plain": Case(),
    "adam": Case(Adam),
    "accumulation": Case(trainer={"accumulate_grad_batches": 4}),
    "accumulation_that_changes": Case(callbacks=ACCUMULATE_LATER),
    "clip_norm": Case(trainer={"gradient_clip_val": 0.2}),
    "clip_value": Case(trainer=BY_VALUE),
    "clip_norm_accumulation": Case(trainer={"gradient_clip_val": 0.2, "accumulate_grad_batches": 4}),
    "clip_value_accumulation": Case(trainer=BY_VALUE | {"accumulate_grad_batches": 4}),
    "manual": Case(Adversarial, strategy=UNUSED),
    "manual_accumulation": Case(ManualAccumulation),
    "manual_static_graph": Case(ManualAccumulation, strategy={"static_graph": True}),
    "frozen": Case(Frozen),
    "frozen_for_a_while": Case(strategy=UNUSED, callbacks=(FreezeForAWhile,)),
    "unused_branches": Case(Branching, strategy=UNUSED),
    "unused_branches_accumulation": Case(Branching, strategy=UNUSED, trainer={"accumulate_grad_batches": 2}),
    "static_graph": Case(strategy={"static_graph": True}),
    # not from the first step on: a static graph is learnt in a step that communicates, under ddp too
    "static_graph_accumulation": Case(strategy={"static_graph": True}, callbacks=ACCUMULATE_LATER),
    "bucket_view": Case(strategy={"gradient_as_bucket_view": True}),
    "bucket_view_accumulation": Case(
        strategy={"gradient_as_bucket_view": True}, trainer={"accumulate_grad_batches": 4, "gradient_clip_val": 0.2}
    ),
    "checkpointing": Case(Checkpointed),
    "checkpointing_reentrant": Case(CheckpointedReentrant),
    "checkpointing_static_graph": Case(CheckpointedReentrant, strategy={"static_graph": True}),
    "double_precision": Case(InSinglePrecision, trainer={"precision": "64-true"}),
    "hook_allreduce": Case(callbacks=hooked(default_hooks.allreduce_hook)),
    "hook_power_sgd": Case(callbacks=hooked(powerSGD_hook.powerSGD_hook, rank=1), single="ddp"),
    "sum": Case(Summed, hetero={"loss_reduction": "sum"}),
    "sum_accumulation": Case(Summed, hetero={"loss_reduction": "sum"}, trainer={"accumulate_grad_batches": 4}),
    "lbfgs": Case(Lbfgs, trainer={"max_epochs": 1}),  # it amplifies rounding, by 1e7 in three epochs
}
# compared with a single process only: ``ddp`` averages the averages of the ranks; and compiling takes long
MORE_CASES = {
    "compiled": Case(compiled=True, trainer={"max_epochs": 1}),
    "compiled_part": Case(CompiledPart, trainer={"max_epochs": 1}),
    "tokens": Case(Padded, hetero={"num_loss_terms": count_tokens}),
    "tokens_accumulation": Case(
        Padded, hetero={"num_loss_terms": count_tokens}, trainer={"accumulate_grad_batches": 4}
    ),
}


# ---- double precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(n, marks=thorough) if n == "compiled_part" else n for n in MORE_CASES)]
)
def test_the_gradients_are_those_of_whole_batches_and_nothing_of_a_stand_in(ranks: RankPools, name: str) -> None:
    case = (CASES | MORE_CASES)[name]
    (single,) = on_ranks(ranks, "single", case, STAND_IN)
    runs = on_ranks(ranks, "hetero", case, STAND_IN)
    assert stand_ins(runs) >= 2
    assert measured(f"single process, {name}", largest_difference(runs, single)) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_ddp(ranks: RankPools, name: str) -> None:
    plain = on_ranks(ranks, "ddp", CASES[name], EVEN)
    runs = on_ranks(ranks, "hetero", CASES[name], EVEN)
    assert {len(run.ledger[0]) for run in runs} == {6, 2}
    assert measured(f"ddp, {name}", largest_difference(runs, plain[0])) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["plain", "manual", "accumulation", "static_graph", "checkpointing", "checkpointing_reentrant", "tokens", "lbfgs"],
)
def test_a_stand_in_may_be_nan(ranks: RankPools, name: str) -> None:
    case = (CASES | MORE_CASES)[name]
    (single,) = on_ranks(ranks, "single", case, STAND_IN_NAN)
    runs = on_ranks(ranks, "hetero", case, STAND_IN_NAN)
    assert stand_ins(runs) >= 2
    assert measured(f"single process, NaN on stand-ins, {name}", largest_difference(runs, single)) < TOLERANCE


# ---- lower precision -------------------------------------------------------------------------------------------------

BF16, FP16 = 2.0**-7, 2.0**-10  # distance from 1 to the next number
ROUNDED = {
    "bf16_mixed": (Case(InSinglePrecision, trainer={"precision": "bf16-mixed"}), BF16),
    "bf16_true": (Case(InSinglePrecision, trainer={"precision": "bf16-true"}), BF16),
    "fp16_mixed": (Case(InSinglePrecision, trainer={"precision": "16-mixed"}), FP16),
    "hook_fp16": (Case(callbacks=hooked(default_hooks.fp16_compress_hook)), FP16),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("division", [STAND_IN, EVEN], ids=["stand_in", "even"])
def test_lower_precision_differs_by_its_rounding_only(ranks: RankPools, name: str, division: Division) -> None:
    """Half precision rounds a rank's gradient: other parts of a batch, other roundings, as under ``ddp``."""
    case, epsilon = ROUNDED[name]
    (single,) = on_ranks(ranks, "single", case, division)
    runs = on_ranks(ranks, "hetero", case, division)
    assert relative_difference(runs[0].gradients[0], single.gradients[0]) < epsilon
    difference = relative_difference(runs[0].parameters, single.parameters)
    assert measured(f"single process, {name} (relative)", difference) < 2 * epsilon
    assert runs[0].scale == single.scale


@pytest.mark.parametrize("division", [STAND_IN, EVEN], ids=["stand_in", "even"])
def test_all_ranks_skip_the_step_whose_gradient_overflows(ranks: RankPools, division: Division) -> None:
    case = Case(Overflowing, trainer={"precision": "16-mixed"})
    (single,) = on_ranks(ranks, "single", case, division)
    runs = on_ranks(ranks, "hetero", case, division)
    skipped = [0 in {index for run in runs for index in run.ledger[step]} for step in range(len(runs[0].ledger))]
    assert sum(skipped) == 3
    for run in (*runs, single):
        after = [*run.before[1:], run.parameters]
        assert [a == b for a, b in zip(run.before, after, strict=True)] == skipped
    assert relative_difference(runs[0].parameters, single.parameters) < 2 * FP16
    assert runs[0].scale == single.scale


@pytest.mark.parametrize("module", [Larger, LargerAdam])
@pytest.mark.parametrize("division", [STAND_IN, EVEN], ids=["stand_in", "even"])
def test_single_precision_stays_with_a_single_process(
    ranks: RankPools, module: type[Whole], division: Division
) -> None:
    """After 100 steps."""
    case = Case(module, trainer={"max_epochs": -1, "max_steps": 100})
    (single,) = on_ranks(ranks, "single", case, division)
    runs = on_ranks(ranks, "hetero", case, division)
    norm = norm_difference(runs[0].gradients[-1], single.gradients[-1])
    assert measured(f"float32 after 100 steps, {module.__name__}, gradient norm (relative)", norm) <= 1e-6
    parameters = relative_difference(runs[0].parameters, single.parameters)
    assert measured(f"float32 after 100 steps, {module.__name__}, parameters (relative)", parameters) <= 1e-5


# ---- the checks above can fail ---------------------------------------------------------------------------------------


class Lopsided(HeteroDDPStrategy):
    """Gives rank r a weight r + 1 times too large."""

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss * (self.global_rank + 1), *args, **kwargs)


@pytest.mark.parametrize("name", ["accumulation", "clip_norm", "manual", "checkpointing", "hook_power_sgd", "tokens"])
def test_a_wrong_weight_is_caught(ranks: RankPools, name: str) -> None:
    case = replace((CASES | MORE_CASES)[name], cls=Lopsided)
    (single,) = on_ranks(ranks, "single", case, STAND_IN)
    assert largest_difference(on_ranks(ranks, "hetero", case, STAND_IN), single) > 1e-3
