"""Record when units of a sharded model are gathered, used and reduced, in real steps of two ranks on gloo.

Run it with

    python benchmarks/shards_recorded.py

It prints one step of rank 0 as lines of time, and for how much of its transfers the rank computes meanwhile. Then it
compares steps with what ``lightning-hetero plan`` predicts: on virtual devices, which sleep while they compute, and on
processors. The own time is that of a step without its waits, as ``LoadBalancer`` measures it, and includes the copies
that the engine makes. Transfers are measured alone, after these copies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from predictions import predicted
from shards import WEIGHTS, Model, connect, run, sharded
from torch import Tensor, nn

from lightning_hetero.balance.shards.step import Event
from lightning_hetero.distributed.shards.engine import ShardEngine
from lightning_hetero.distributed.shards.units import find_units

SAMPLES, POSITIONS = 8, 64
SHAPES = {"a": (256, 6), "b": (384, 8), "c": (512, 8)}
COLUMNS, RECORDED = 96, "b"


class Waits:
    """Adds up how long a rank waits for others."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait in this context."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def timed(step: Callable[[], None], waits: Waits, steps: int) -> tuple[float, float]:
    """Return the seconds of a step, and those in which this rank does not wait; the medians of several steps."""
    whole, own = [], []
    for number in range(3 + steps):
        dist.barrier()
        waits.seconds = 0.0
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        dist.barrier()
        if number >= 3:
            whole.append(time.perf_counter() - start)
            own.append(took - waits.seconds)
    return statistics.median(whole), statistics.median(own)


@dataclass
class Recorder:
    """Notes what happens in the steps of one rank.

    Attributes:
        events: What has happened since :meth:`begin`.
    """

    engine: ShardEngine

    def __post_init__(self) -> None:
        """Wrap the exchange and the modules of units."""
        self.events: list[Event] = []
        self.began = 0.0
        self._unit = 0
        engine: Any = self.engine
        for name in ("start_gather", "start_reduce"):
            setattr(engine, name, self._naming(getattr(engine, name)))
        for kind in ("gather", "reduce"):
            setattr(engine._exchange, kind, self._timing(kind, getattr(engine._exchange, kind)))
        for unit in engine.units[1:]:
            self._watch(unit)

    def begin(self) -> None:
        """Forget what has happened."""
        self.events = []
        self.began = time.perf_counter()

    def _naming(self, original: Callable[..., None]) -> Callable[..., None]:
        def start(unit: int, **options: Any) -> None:
            self._unit = unit
            original(unit, **options)

        return start

    def _timing(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            unit, begin = self._unit, time.perf_counter() - self.began
            pending = original(*args)
            ends: list[float] = []

            def ended(_: Any, works: int) -> None:  # in a thread of gloo
                ends.append(time.perf_counter() - self.began)
                if len(ends) == works:
                    self.events.append(Event(kind, unit, begin, max(ends)))

            works = list(pending._works)
            for work in works:
                work.get_future().then(partial(ended, works=len(works)))
            return pending

        return timed

    def _watch(self, unit: Any) -> None:
        begins: dict[str, float] = {}

        def begin(kind: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                begins[kind] = time.perf_counter() - self.began

            return note

        def end(kind: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                self.events.append(Event(kind, unit.number, begins[kind], time.perf_counter() - self.began))

            return note

        # after the hooks of the engine, which wait for the parameters
        unit.module.register_forward_pre_hook(begin("forward"))
        unit.module.register_forward_hook(end("forward"), prepend=True)
        unit.module.register_full_backward_pre_hook(begin("backward"))
        unit.module.register_full_backward_hook(end("backward"))


def shown(events: Sequence[Event], step_s: float) -> str:
    """Return lines of time of the link and the device, one digit per unit."""
    lines = {"gather": [" "] * COLUMNS, "reduce": [" "] * COLUMNS, "forward": [" "] * COLUMNS}
    for event in events:
        line = lines["forward" if event.kind == "backward" else event.kind]
        first, last = (min(int(at / step_s * COLUMNS), COLUMNS - 1) for at in (event.begin_s, event.end_s))
        for column in range(first, last + 1):
            line[column] = format(event.unit, "x") if event.kind != "backward" else chr(ord("A") + event.unit - 1)
    names = {"gather": "gathers", "reduce": "reduces", "forward": "computes"}
    return "\n".join(f"{names[kind]:<9}|{''.join(line)}|" for kind, line in lines.items())


def covered(events: Sequence[Event]) -> tuple[float, float]:
    """Return the seconds for which something is transferred, and for how many of them the rank computes."""
    link = _union([(e.begin_s, e.end_s) for e in events if e.kind in ("gather", "reduce")])
    device = _union([(e.begin_s, e.end_s) for e in events if e.kind in ("forward", "backward")])
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in link for c, d in device)
    return sum(b - a for a, b in link), both


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def record(rank: int, ranks: int, port: int, shape: tuple[int, int], steps: int, results: Any) -> None:
    """Run steps; rank 0 tells the events of the median step, and the times that a prediction needs."""
    connect(rank, ranks, port)
    torch.manual_seed(0)
    width, blocks = shape
    model, waits = Model(width, blocks), Waits()
    engine = ShardEngine(model, find_units(model), WEIGHTS[ranks], torch.device("cpu"), waiting=waits.waiting)
    transfers = transfer_times(engine, steps)
    step = sharded(model, engine)
    x = torch.randn(SAMPLES, POSITIONS, 16)
    step_s, own_s = timed(lambda: step(x), waits, steps)
    recorder = Recorder(engine)
    recorded: list[tuple[float, list[Event]]] = []
    for number in range(2 + steps):
        dist.barrier()
        recorder.begin()
        step(x)
        took = time.perf_counter() - recorder.began
        dist.barrier()
        if number >= 2:
            recorded.append((took, recorder.events))
    engine.leave_group()
    slowest = torch.tensor([own_s, *transfers])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        recorded.sort(key=lambda entry: entry[0])
        parameters = sum(p.numel() for p in Model(width, blocks).parameters())
        results.put((parameters, step_s, slowest.tolist(), *recorded[len(recorded) // 2]))
    dist.destroy_process_group()


def transfer_times(engine: ShardEngine, steps: int) -> tuple[float, float]:
    """Return the seconds of gathering and of reducing a unit while nothing is computed."""
    (flat,) = engine.units[1].flats
    gathers, reduces = [], []
    for _ in range(2 + steps):
        dist.barrier()
        flat.start_gathering()
        start = time.perf_counter()
        flat.wait()
        gathers.append(time.perf_counter() - start)
        flat.release()
        dist.barrier()
        pending = flat.start_reducing()
        start = time.perf_counter()
        pending.wait()
        reduces.append(time.perf_counter() - start)
    return statistics.median(gathers[2:]), statistics.median(reduces[2:])


# ---- virtual devices -------------------------------------------------------------------------------------------------

VIRTUAL = {"hidden": 0.012, "partly hidden": 0.004, "bound by the link": 0.0005}  # seconds of a forward pass of a unit
VIRTUAL_UNITS, VIRTUAL_WIDTH = 8, 1000


class Work(torch.autograd.Function):
    """A device that needs a known time, and twice as long in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """Sleep."""
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Sleep twice as long."""
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class VirtualUnit(nn.Module):
    """A layer of many parameters that computes for a known time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layer = nn.Linear(VIRTUAL_WIDTH, VIRTUAL_WIDTH)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Return something that depends on all parameters."""
        result: Tensor = Work.apply(self.layer(x), self.seconds)  # type: ignore[no-untyped-call]
        return result


def virtual(rank: int, ranks: int, port: int, seconds: float, steps: int, results: Any) -> None:
    """Run steps on virtual devices, without an optimiser; rank 0 tells their time, and those of transfers."""
    connect(rank, ranks, port)
    model = nn.Sequential(*[VirtualUnit(seconds) for _ in range(VIRTUAL_UNITS)])
    x, waits = torch.randn(1, VIRTUAL_WIDTH), Waits()
    engine = ShardEngine(model, find_units(model), WEIGHTS[ranks], torch.device("cpu"), waiting=waits.waiting)
    transfers = transfer_times(engine, steps)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with engine.step("train", backward_follows=True):
            loss = model(x).square().mean()
        with engine.backward():
            loss.backward()

    step_s, own_s = timed(step, waits, steps)
    engine.leave_group()
    slowest = torch.tensor([own_s, *transfers])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        parameters = VIRTUAL_UNITS * (VIRTUAL_WIDTH + 1) * VIRTUAL_WIDTH
        results.put((parameters, step_s, slowest.tolist()))
    dist.destroy_process_group()


# ---- tables ----------------------------------------------------------------------------------------------------------


def predicted_s(parameters: int, units: int, own_s: float, gather_s: float, reduce_s: float) -> float:
    """Return what the command predicts for two devices with weights of about 2:1."""
    # what a gather carries to the rank with the smaller shard; the command has one time for gathers and reductions
    bits, transfer_s = 8 * 4 * parameters / units * 2 / 3, (2 * gather_s + reduce_s) / 3
    document = {
        "strategy": "hetero_fsdp",
        "global_batch_size": 2,
        "parameters": parameters,
        "units": units,
        "link_gigabits_per_s": bits / transfer_s / 1e9,
        "devices": [
            {"name": name, "samples_per_s": 1 / own_s, "memory_gigabytes": memory}
            for name, memory in (("large", 2000), ("small", 1000))
        ],
    }
    return float(predicted(json.dumps(document))["step_time"])


def row(name: str, parameters: int, units: int, step_s: float, times: Sequence[float]) -> str:
    """Return a line of the table."""
    own_s, gather_s, reduce_s = times
    step_of_plan = predicted_s(parameters, units, own_s, gather_s, reduce_s)
    return (
        f"| {name} | {parameters / 1e6:.1f} M | {own_s * 1e3:.0f} | {gather_s * 1e3:.1f} | {reduce_s * 1e3:.1f} |"
        f" {step_of_plan * 1e3:.0f} | {step_s * 1e3:.0f} | {100 * (step_of_plan / step_s - 1):+.0f}% |"
    )


def main() -> None:
    """Print a recorded step and the predictions."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for name, seconds in VIRTUAL.items():
        parameters, step_s, times = run(virtual, 2, seconds, options.steps)
        rows.append(row(f"virtual, {name}", parameters, VIRTUAL_UNITS, step_s, times))
    for name, shape in SHAPES.items():
        parameters, step_s, times, recorded_s, events = run(record, 2, shape, options.steps)
        rows.append(row("processor", parameters, shape[1], step_s, times))
        if name == RECORDED:
            link_s, both_s = covered(events)
            print(f"A step of rank 0, {recorded_s * 1e3:.0f} ms, {parameters / 1e6:.1f} M parameters.")
            print("One digit per unit, letters in the backward pass:\n")
            print(shown(events, recorded_s))
            print(f"\n{link_s * 1e3:.0f} ms of transfers, in {both_s * 1e3:.0f} ms of which the rank computes\n")
    print("| device | parameters | own ms | gather ms | reduce ms | predicted step ms | measured | off |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
