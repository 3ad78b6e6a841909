"""A step in several micro-batches, by choice or for lack of memory, equals the step in one; on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from profiles import drawn, thorough
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from training import FEATURES, Numbered, SmallModule, assert_close, flat, make_trainer

from lightning_hetero import HeteroDDPStrategy

STEPS = 8
TRAININGS = drawn(24, 240)
BATCH_SIZE = 5
DDP_OPTIONS = ("gradient_as_bucket_view", "find_unused_parameters", "static_graph")


@dataclass(frozen=True)
class Shortage:
    """When and where a rank runs out of memory.

    Attributes:
        rank: Rank that runs out of memory.
        step: Training step in which it does; -1 for every step.
        phase: "forward" or "backward".
        layer: Layer before which it does.
        fits: Number of samples that still fit.
    """

    rank: int
    step: int
    phase: str
    layer: int
    fits: int


@dataclass(frozen=True)
class Case:
    """Everything that decides how the steps are run."""

    shares: tuple[int, ...]
    accumulate: int = 1
    clip: float | None = None
    shortages: tuple[Shortage, ...] = ()
    micro_batch_size: tuple[int, ...] | None = None
    ddp: tuple[tuple[str, Any], ...] = ()
    loss_reduction: str = "mean"
    terms: bool = False
    dictionary: bool = False
    buffer: bool = False
    gated: bool = False


class _Scarce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, allocate: Callable[[str, int], None]) -> Tensor:
        allocate("forward", len(x))
        ctx.allocate, ctx.samples = allocate, len(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.allocate("backward", ctx.samples)
        return gradients[0], None


class Scarce(SmallModule):
    """Four layers, in front of each of which memory may run out; a metric, and a buffer that DDP broadcasts."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator().manual_seed(2)
        sizes = [FEATURES, 6, 6, 6, 1]
        self.network: Any = nn.ModuleList(nn.Linear(a, b).double() for a, b in pairwise(sizes))
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
        if case.gated:  # used in some micro-batches of some ranks only
            gate = nn.Linear(1, 1).double()
            nn.init.constant_(gate.weight, 0.3)
            nn.init.constant_(gate.bias, 0.1)
            self.network.append(gate)
        if case.buffer:
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.mean = MeanMetric()
        self.step = -1
        self.micro_batches_run = 0

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.network[:4]):
            x = _Scarce.apply(x, partial(self.allocate, number))  # type: ignore[no-untyped-call]
            x = layer(x if number == 0 else x.tanh())
        return x

    def allocate(self, layer: int, phase: str, samples: int) -> None:
        for shortage in self.case.shortages:
            place = (shortage.rank, shortage.phase, shortage.layer)
            here = place == (dist.get_rank(), phase, layer) and shortage.step in (-1, self.step)
            if here and samples > shortage.fits:
                raise torch.OutOfMemoryError(f"{samples} samples in the {phase} pass")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.step = self.trainer.fit_loop.total_batch_idx

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.micro_batches_run += 1
        index, features, targets = (batch[k] for k in ("index", "x", "y")) if isinstance(batch, dict) else batch
        predictions = self(features)
        chosen = (index % 7 == 0)[:, None]
        if self.case.gated and chosen.any():
            predictions = predictions + chosen * self.network[4](predictions)
        difference = predictions - targets
        if self.case.terms:
            loss = (difference.square().sum(1) * (index % 3)).sum() / (index % 3).sum().clamp(min=1)
        else:
            loss = difference.square().sum() if self.case.loss_reduction == "sum" else difference.square().mean()
        self.mean.update(index.double())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("index", index.double().mean(), on_epoch=True, sync_dist=True, batch_size=len(index))
        return {"loss": loss, "predictions": difference} if self.case.dictionary else loss


class Seen(Callback):
    """Keeps what other callbacks are told of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.predictions: list[int] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append(float(trainer.callback_metrics["loss_step"]))
        self.predictions.append(len(outputs.get("predictions", ())))


@dataclass(frozen=True)
class Outcome:
    """What a training did on one rank."""

    parameters: list[float]
    mean: float
    logged: list[float]
    losses: list[float]
    predictions: list[int]
    micro_batches_run: int
    times_out_of_memory: int
    limit: int | None


def collate(samples: list[Any]) -> dict[str, Tensor]:
    index, x, y = torch.utils.data.default_collate(samples)
    return {"index": index, "x": x, "y": y}


def count_terms(batch: Any) -> int:
    return int((batch[0] % 3).sum())


def train(case: Case) -> Outcome:
    world_size = dist.get_world_size()
    model, seen = Scarce(case), Seen()
    strategy = HeteroDDPStrategy(
        shares=list(case.shares),
        micro_batch_size=None if case.micro_batch_size is None else list(case.micro_batch_size),
        loss_reduction=case.loss_reduction,  # type: ignore[arg-type]
        num_loss_terms=count_terms if case.terms else None,
        **{"bucket_cap_mb": 1e-5, **dict(case.ddp)},  # each layer is all-reduced on its own, as soon as it is ready
    )
    trainer = make_trainer(
        strategy, world_size, [seen], max_steps=STEPS // case.accumulate, accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
    )  # fmt: skip
    size = BATCH_SIZE * world_size * 3 + 4  # four steps an epoch, the last one ragged
    loader = DataLoader(
        Numbered(size), batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate if case.dictionary else None
    )
    trainer.fit(model, loader)
    return Outcome(
        parameters=flat(model.network),
        mean=float(model.mean.compute()),
        logged=[*seen.logged, *(float(trainer.callback_metrics[name]) for name in ("loss_epoch", "index"))],
        losses=seen.losses,
        predictions=seen.predictions,
        micro_batches_run=model.micro_batches_run,
        times_out_of_memory=strategy.micro_batch_limits.times_out_of_memory,
        limit=strategy.micro_batch_limits.limit,
    )


POOLS: list[RankPools] = []


@cache
def undisturbed(case: Case) -> list[Outcome]:
    return POOLS[0].run(len(case.shares), train, case, timeout_s=60)


def check(ranks: RankPools, case: Case, comparison: str) -> list[Outcome]:
    """Compare a training with the same one in one micro-batch per step and with all the memory that it needs."""
    POOLS[:] = [ranks]
    expected = undisturbed(replace(case, shortages=(), micro_batch_size=None))
    outcomes = ranks.run(len(case.shares), train, case, timeout_s=60)
    for found, other in zip(outcomes, expected, strict=True):
        assert_close(found.parameters, other.parameters, comparison=comparison)
        assert found.mean == pytest.approx(other.mean, rel=1e-6), "a metric counts each sample once"
        assert found.logged == pytest.approx(other.logged, rel=1e-5)
        assert found.losses == pytest.approx(other.losses, rel=1e-9)
        assert found.predictions == other.predictions
    return outcomes


# ---- micro-batches that the user asks for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1), micro_batch_size=(1, 5)),
        Case((3, 7), micro_batch_size=(2, 2), accumulate=2),
        Case((1, 4), micro_batch_size=(3, 2), clip=0.5),
        Case((2, 3), micro_batch_size=(2, 3), accumulate=2, clip=0.1, ddp=(("gradient_as_bucket_view", True),)),
        Case((1, 1), micro_batch_size=(2, 2), loss_reduction="sum", clip=1.0),
        Case((1, 2), micro_batch_size=(1, 3), terms=True),
        Case((1, 2), micro_batch_size=(2, 4), dictionary=True, buffer=True),
        Case((1, 2, 4), micro_batch_size=(1, 2, 3), ddp=(("find_unused_parameters", True),)),
        Case((1, 2), micro_batch_size=(2, 2), gated=True, ddp=(("find_unused_parameters", True),)),
        Case((2, 3), micro_batch_size=(2, 2), buffer=True, ddp=(("static_graph", True),)),
        Case((3,), micro_batch_size=(2,)),
    ],
    ids=str,
)
def test_micro_batches_are_the_step_in_one(ranks: RankPools, case: Case) -> None:
    outcomes = check(ranks, case, "several passes, one pass")
    assert max(outcome.micro_batches_run for outcome in outcomes) >= 2 * STEPS - 2


# ---- running out of memory -------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world_size = draw(st.sampled_from([1, 2, 2, 2, 3]))
    shares: list[tuple[int, ...]] = {1: [(1,)], 2: [(1, 1), (1, 3)], 3: [(1, 2, 3)]}[world_size]  # type: ignore[assignment]

    def shortage() -> Shortage:
        return Shortage(
            rank=draw(st.integers(0, world_size - 1)),
            step=draw(st.integers(-1, STEPS - 1)),
            phase=draw(st.sampled_from(["forward", "backward"])),
            layer=draw(st.integers(0, 3)),
            fits=draw(st.integers(1, 4)),
        )

    option = draw(st.sampled_from([None, *DDP_OPTIONS]))
    return Case(
        shares=draw(st.sampled_from(shares)),
        # plain ddp fails with a static graph whose first batch is accumulated
        accumulate=1 if option == "static_graph" else draw(st.sampled_from([1, 2, 4])),
        shortages=tuple(shortage() for _ in range(draw(st.integers(1, 3)))),
        micro_batch_size=draw(st.none() | st.just((3,) * world_size)),
        ddp=() if option is None else ((option, True),),
        buffer=draw(st.booleans()),
    )


def test_no_step_is_lost_where_memory_runs_out(ranks: RankPools) -> None:
    """At any step, rank, phase, layer and position of accumulation, several times in a run too."""
    ran_out = []

    @settings(max_examples=TRAININGS, suppress_health_check=list(HealthCheck))
    @given(cases())
    def drawn(case: Case) -> None:
        outcomes = check(ranks, case, f"memory runs out, {TRAININGS} drawn trainings")
        ran_out.append(sum(outcome.times_out_of_memory for outcome in outcomes))

    drawn()
    assert sum(count > 0 for count in ran_out) >= TRAININGS / 2, "in most of them memory has to run out"


def test_smaller_micro_batches_are_kept_after_a_shortage(ranks: RankPools) -> None:
    shortage = Shortage(rank=1, step=-1, phase="backward", layer=1, fits=2)
    outcomes = check(ranks, Case((1, 1), shortages=(shortage,)), "memory runs out, one by hand")
    assert [outcome.limit for outcome in outcomes] == [None, 2]
    # five samples, then three, then two fit; every later step begins with three micro-batches
    assert [outcome.times_out_of_memory for outcome in outcomes] == [0, 2]


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("view", [False, True])
def test_a_shortage_in_accumulated_batches(ranks: RankPools, step: int, view: bool) -> None:
    """DDP combines no gradients in the batches before the last one of an optimiser step."""
    shortage = Shortage(rank=1, step=step, phase="backward", layer=1, fits=3)
    case = Case((1, 1), accumulate=2, shortages=(shortage,), ddp=(("gradient_as_bucket_view", view),))
    outcomes = check(ranks, case, "memory runs out in accumulated batches")
    assert [outcome.times_out_of_memory for outcome in outcomes] == [0, 1]


# ---- where a step cannot be repeated ---------------------------------------------------------------------------------


class Unsplittable(Scarce):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a batch"], batch_idx)


class Gathers(Scarce):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.all_gather(batch[0])
        return super().training_step(batch, batch_idx)


class Manual(Scarce):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.manual_backward(super().training_step(batch, batch_idx))


def collate_in_an_object(samples: list[Any]) -> Any:
    return {"a batch": torch.utils.data.default_collate(samples), "made by": object()}


def train_alone(kind: type[Scarce], phase: str, fits: int) -> None:
    model = kind(Case((1,), shortages=(Shortage(0, 2, phase, 2, fits),)))
    loader = DataLoader(Numbered(40), BATCH_SIZE, collate_fn=collate_in_an_object if kind is Unsplittable else None)
    make_trainer(HeteroDDPStrategy(), 1, max_steps=5).fit(model, loader)


@pytest.mark.parametrize(
    ("kind", "phase", "fits", "message"),
    [
        (Scarce, "forward", 0, "in the forward pass .* with 5 samples, and a single sample does not fit"),
        (Scarce, "backward", 0, "in the backward pass .* with 5 samples, and a single sample does not fit"),
        (Manual, "forward", 3, "in the forward pass .* only automatic optimisation can be repeated"),
        (Manual, "backward", 3, "in a backward pass .* only automatic optimisation can be repeated"),
        (Gathers, "forward", 3, "in the forward pass .* the step had already communicated"),
        (Unsplittable, "forward", 3, "its repetition in smaller micro-batches failed: .* an object of type 'object'"),
        (Unsplittable, "backward", 3, "its repetition in smaller micro-batches failed: .* an object of type 'object'"),
    ],
)
def test_a_rank_that_cannot_go_on_says_why(
    ranks: RankPools, kind: type[Scarce], phase: str, fits: int, message: str
) -> None:
    with pytest.raises(RankError, match=rf"(?s)RankOutOfMemoryError: Rank 0 \(cpu\) ran out of memory .*{message}"):
        ranks.run(1, train_alone, kind, phase, fits, timeout_s=60)


# ---- communication hooks ---------------------------------------------------------------------------------------------


class HookState:
    """Where a hook runs out of memory, and a count of its calls in the current step."""

    def __init__(self, step: int, fails_at: int) -> None:
        self.step, self.fails_at, self.calls = step, fails_at, 0


def compress(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with types, not with texts
    """Average what it has allocated, and copy it back where the bucket is."""
    state.calls += 1
    if state.calls == state.fails_at:
        raise torch.OutOfMemoryError("in the hook")
    sent = bucket.buffer().clone().div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


class Hooked(Callback):
    """Gives DDP a communication hook, which runs out of memory in one step of rank 1 if at all."""

    def __init__(self, step: int, fails_at: int, builtin: bool) -> None:
        self.state, self.step, self.fails_at, self.builtin = HookState(step, 0), step, fails_at, builtin

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.builtin:
            trainer.strategy.model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)  # type: ignore[attr-defined]
        else:
            trainer.strategy.model.register_comm_hook(self.state, compress)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        here = dist.get_rank() == 1 and trainer.fit_loop.total_batch_idx == self.step
        self.state.calls, self.state.fails_at = 0, self.fails_at if here else 0


def train_hooked(
    view: bool, shortages: tuple[Shortage, ...], fails_at: int, builtin: bool, accumulate: int = 1
) -> list[float]:
    model = Scarce(Case((1, 1), shortages=shortages))
    strategy = HeteroDDPStrategy(shares=[1, 1], bucket_cap_mb=1e-5, gradient_as_bucket_view=view)
    trainer = make_trainer(strategy, 2, [Hooked(2, fails_at, builtin)], max_steps=4, accumulate_grad_batches=accumulate)
    trainer.fit(model, DataLoader(Numbered(60), batch_size=BATCH_SIZE))
    assert strategy.micro_batch_limits.times_out_of_memory == (len(shortages) if dist.get_rank() else 0)
    return flat(model.network)


@pytest.mark.parametrize("builtin", [False, True])
def test_memory_that_runs_out_beside_a_communication_hook(ranks: RankPools, builtin: bool) -> None:
    expected = ranks.run(2, train_hooked, False, (), 0, builtin)
    shortage = Shortage(rank=1, step=2, phase="backward", layer=1, fits=3)
    for parameters in ranks.run(2, train_hooked, False, (shortage,), 0, builtin, timeout_s=60):
        comparison = "memory runs out beside a communication hook"
        assert_close(parameters, expected[0], comparison=comparison)


def test_memory_that_runs_out_where_no_hook_is_called(ranks: RankPools) -> None:
    """The second of three accumulated batches is not communicated, so it is repeated, whatever hook there is."""
    expected = ranks.run(2, train_hooked, True, (), 0, False, 3)
    shortage = Shortage(rank=1, step=1, phase="backward", layer=1, fits=3)
    for parameters in ranks.run(2, train_hooked, True, (shortage,), 0, False, 3, timeout_s=60):
        assert_close(parameters, expected[0], comparison="memory runs out beside a communication hook")


# each ends its ranks, which takes seconds to make up for
@pytest.mark.parametrize(
    ("call", "view"),
    [
        (1, False),
        (3, False),
        (2, True),
        *(pytest.param(*case, marks=thorough) for case in ((2, False), (1, True), (3, True))),
    ],
)
def test_memory_that_runs_out_in_a_communication_hook_ends_the_training(
    ranks: RankPools, call: int, view: bool
) -> None:
    """The bucket was not sent, so the rank would go on with gradients of its own, and its peer would wait."""
    where = "in the backward pass .* whether a communication hook has sent" if view else "in a communication hook of"
    with pytest.raises(RankError, match=rf"(?s)RankOutOfMemoryError: Rank 1 .* {where}"):
        ranks.run(2, train_hooked, view, (), call, False, timeout_s=60)
