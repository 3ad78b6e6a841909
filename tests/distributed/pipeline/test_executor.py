"""Every order that is proven to end gives the same gradients, in ranks that are threads and in real ones."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import RankPools
from orders import random_order, random_ranks
from profiles import drawn
from torch import Tensor, nn

from lightning_hetero.balance.pipeline.orders.order import Order
from lightning_hetero.balance.pipeline.orders.proof import most_held
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, plan_order, v_shapes
from lightning_hetero.balance.pipeline.simulation import Timeline
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.distributed.pipeline import messages, pipeline
from lightning_hetero.distributed.pipeline.chain import Chain
from lightning_hetero.distributed.pipeline.pipeline import Pipeline
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.exceptions import ConfigurationError

D = 4
CPU = torch.device("cpu")


class Fork(nn.Module):
    """Hands on several tensors: one without a gradient, and one that the next layer may leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return {"x": self.layer(x), "extra": (x * 2, len(x)), "mask": x.detach() > 0}


class Join(nn.Module):
    """Uses one or two of the tensors, which depends on how many samples there are, and changes one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, value: Any) -> Any:
        x = value["x"].mul_(1.5)
        if value["extra"][1] % 2:
            x = x + value["extra"][0]
        return self.layer(x.masked_fill(value["mask"], 0.5))


def layers_of(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    kinds: list[Any] = [lambda: nn.Linear(D, D, dtype=torch.float64), Fork, Join, lambda: nn.Tanh()]
    return [kinds[i % 4]() for i in range(count)]


def batches(sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, D, generator=generator, dtype=torch.float64) for size in sizes]


def loss_of(number: int, output: Any) -> Tensor:
    x: Tensor = output["x"] if isinstance(output, dict) else output
    return x.square().sum() * (number + 1)


def alone(count: int, sizes: tuple[int, ...]) -> list[Tensor | None]:
    layers = layers_of(count)
    for number, x in enumerate(batches(sizes)):
        loss_of(number, Chain(layers).run(range(count), None, Call((x,)))).backward()
    return [p.grad for layer in layers for p in layer.parameters()]


def plan_of(random: Random, ranks: tuple[int, ...], count: int, micro_batches: int) -> StagePlan:
    """Draw stages; some of their borders are within a layer that two ranks share."""
    ends = sorted(random.sample(range(1, count), len(ranks) - 1))
    lent = [random.sample(range(micro_batches), random.randint(0, micro_batches)) for _ in ends]
    try:
        return StagePlan(ranks, (*ends, count), tuple(tuple(sorted(row)) for row in lent))
    except ConfigurationError:  # a stage would have no layer for a micro-batch
        return StagePlan(ranks, (*ends, count))


@dataclass(frozen=True)
class Case:
    """Stages, an order, and sizes of the micro-batches."""

    plan: StagePlan
    order: Order
    sizes: tuple[int, ...]

    @classmethod
    def drawn(cls, seed: int, ranks: tuple[int, ...] | None = None) -> Case:
        random = Random(seed)
        ranks = ranks or random_ranks(random)
        sizes = tuple(random.randint(1, 3) for _ in range(random.randint(1, 5)))
        plan = plan_of(random, ranks, random.randint(len(ranks), 9), len(sizes))
        return cls(plan, random_order(random, ranks, len(sizes), random.choice((None, 1, 2, 3))), sizes)

    def run(self, rank: int, layers: list[nn.Module]) -> tuple[Pipeline, list[Any]]:
        """Train and evaluate one rank's part; return what evaluation returns."""
        one = Pipeline(Chain(layers), self.plan, self.order, rank, CPU)
        calls = [Call((x,)) for x in batches(self.sizes)]
        one.train(len(calls), calls, loss_of)
        with torch.no_grad():
            return one, one.evaluate(len(calls), calls)

    def check(self, gradients: list[Tensor | None], outputs: list[Any]) -> None:
        count = self.plan.num_layers
        for found, expected in zip(gradients, alone(count, self.sizes), strict=True):
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert len(outputs) == len(self.sizes)
        for number, x in enumerate(batches(self.sizes)):
            expected = Chain(layers_of(count)).run(range(count), None, Call((x,)))
            torch.testing.assert_close(loss_of(number, outputs[number]), loss_of(number, expected))


# ---- ranks that are threads ----------------------------------------------------------------------------------------


@dataclass
class Network:
    """Messages between threads: those of one group, or of one tag, arrive in the order in which they were sent."""

    here: threading.local = field(default_factory=threading.local)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    sent: dict[Any, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    awaited: dict[Any, int] = field(default_factory=lambda: defaultdict(int))
    receives: dict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def synchronize(self) -> None:
        """Wait until the rank has received all that it has begun to receive, as for a device in which this happens."""
        for wait in self.receives[self.here.rank]:
            wait()

    def isend(self, tensor: Tensor, target: int, *, group: Any, tag: int = 0) -> Any:
        with self.arrived:
            self.sent[group, tag, self.here.rank, target].append(tensor.clone())
            self.arrived.notify_all()
        return SimpleNamespace(wait=lambda: True, is_completed=lambda: False)

    def irecv(self, tensor: Tensor, source: int, *, group: Any, tag: int = 0) -> Any:
        key = group, tag, source, self.here.rank
        number = self.awaited[key]
        self.awaited[key] += 1
        is_new = [True]

        def wait() -> None:
            with self.arrived:
                assert self.arrived.wait_for(lambda: len(self.sent[key]) > number, timeout=20.0), "a deadlock"
                assert tensor.shape == self.sent[key][number].shape
                if is_new.pop(0):
                    tensor.copy_(self.sent[key][number])
                is_new.append(False)

        self.receives[self.here.rank].append(wait)
        return SimpleNamespace(wait=wait)

    def recv(self, tensor: Tensor, src: int, *, group: Any, tag: int = 0) -> None:
        self.irecv(tensor, src, group=group, tag=tag).wait()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_channels", lambda *_: None)
    monkeypatch.setattr(messages, "channel", lambda source, target: (source, target))
    monkeypatch.setattr(messages, "host_group", lambda: "hosts")


def run_in_threads(case: Case, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "dist", network)
    layers = layers_of(case.plan.num_layers)
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        network.here.rank = rank
        try:
            results[rank] = case.run(rank, layers)[1]
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(case.plan.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    case.check([p.grad for layer in layers for p in layer.parameters()], results[case.plan.ranks[-1]])
    for rank in range(case.plan.world_size):
        assert rank == case.plan.ranks[-1] or not results[rank]


@pytest.mark.usefixtures("network")
def test_drawn_orders_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(drawn(15, 10_000)):
        run_in_threads(Case.drawn(seed), Network(), monkeypatch)


@pytest.mark.usefixtures("network")
def test_a_pass_may_wait_for_the_whole_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, no receive has begun that ends only after a later pass of the same rank."""
    network = Network()
    ahead = messages._gradients_ahead(torch.device("cuda", 0))
    monkeypatch.setattr(messages, "_gradients_ahead", lambda _: ahead)
    observed = Pipeline._observed

    def waiting(self: Pipeline, action: Any, run: Any) -> Any:
        network.synchronize()
        result = observed(self, action, run)
        network.synchronize()
        return result

    monkeypatch.setattr(Pipeline, "_observed", waiting)
    for seed in range(drawn(15, 1000)):
        network.__init__()  # type: ignore[misc]
        case = Case.drawn(seed, ((0, 1, 0), (0, 1, 2, 1, 0), (1, 0, 1, 0))[seed % 3])
        run_in_threads(case, network, monkeypatch)


@pytest.mark.usefixtures("network")
def test_an_order_that_would_not_end_is_refused_before_it_runs() -> None:
    case = Case.drawn(0, (0, 1))
    broken = Order(case.order.ranks, case.order.micro_batches, (case.order.actions[0][::-1], case.order.actions[1]))
    with pytest.raises(ConfigurationError, match="out of turn"):
        Pipeline(Chain(layers_of(case.plan.num_layers)), case.plan, broken, 0, CPU)


# ---- real ranks ----------------------------------------------------------------------------------------------------


def run_on_rank(cases: list[Case]) -> list[tuple[list[Tensor | None], list[Any], Timeline]]:
    rank = torch.distributed.get_rank()
    found = []
    for case in cases:
        layers = layers_of(case.plan.num_layers)
        one, outputs = case.run(rank, layers)
        own = [
            None if p.grad is None else p.grad.clone()
            for n in sorted(case.plan.layers_of(rank))
            for p in layers[n].parameters()
        ]
        for layer in layers:
            layer.zero_grad()
        one.record()
        one.train(len(case.sizes), [Call((x,)) for x in batches(case.sizes)], loss_of)
        found.append((own, outputs, one.stop_recording()))
    return found


def planned(
    speeds: list[float], layers: int, sizes: tuple[int, ...], most_held: int, *, split: bool, shares: bool
) -> Case:
    """Return a V for ranks of some speeds."""
    costs = LayerCosts.of_speeds([(1.0, 2.0)] * layers, speeds)
    costs = LayerCosts(costs.forward_s, costs.backward_s, costs.forward_s, costs.forward_s)
    shared = tuple(range(layers)) if shares else ()
    problem = OrderProblem(costs, len(sizes), most_held=most_held, split=split, shared=shared)
    found = plan_order(problem, v_shapes(costs, 0))
    assert found is not None
    return Case(found.stages, found.order, sizes)


@pytest.mark.parametrize("world_size", [2, 3])
def test_orders_on_real_ranks(ranks: RankPools, world_size: int) -> None:
    """Drawn ones, and a V with whole and with split backward passes, which hold no more than they were planned to."""
    v = [
        planned([2.0, 1.0, 1.0][:world_size], 9, (2, 3, 1, 2, 2, 1), most, split=split, shares=split)
        for most, split in ((2, False), (4, True))
    ]
    assert v[1].plan.shared
    wanted = [seed for seed in range(10_000) if max(random_ranks(Random(seed))) == world_size - 1]
    cases = [*v, *(Case.drawn(seed) for seed in wanted[: drawn(6, 50)])]
    results = ranks.run(world_size, run_on_rank, cases)
    for number, case in enumerate(cases):
        own = [list(results[rank][number][0]) for rank in range(world_size)]
        gradients: list[Tensor | None] = []
        for n, layer in enumerate(layers_of(case.plan.num_layers)):
            of_ranks = [own[rank] for rank in range(world_size) if n in case.plan.layers_of(rank)]
            for _ in layer.parameters():
                found = [g for g in (left.pop(0) for left in of_ranks) if g is not None]
                gradients.append(sum(found[1:], found[0]))
        case.check(gradients, results[case.plan.ranks[-1]][number][1])
        check_recorded(case, results[0][number][2])


def check_recorded(case: Case, timeline: Timeline) -> None:
    """Each rank has computed its passes in its order, so it has held what the proof says."""
    assert len(timeline.passes) == sum(map(len, case.order.actions))
    weights = (1.0,) * case.plan.num_stages
    for rank, most in enumerate(most_held(case.order, weights)):
        own = [p for p in timeline.passes if case.plan.ranks[p.stage] == rank]
        own.sort(key=lambda p: (p.start_s, p.end_s))
        assert [(p.kind, p.stage, p.micro_batch) for p in own] == [*case.order.actions[rank]]
        held = [0.0]
        for p in own:
            held.append(held[-1] + {"forward": 1, "input": 0}.get(p.kind, -1))
        assert max(held) == most
