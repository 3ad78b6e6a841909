"""Compare the step time of ragged shards with torch's FSDP2 and with DDP, on gloo.

Run it with

    python benchmarks/shards.py

It prints one table. Each figure is the median step time over the rounds; in a round all variants run one after the
other in the same processes, so that they meet the same load. ``unequal`` trains on two virtual devices, one of which
needs twice the time per sample and has twice the memory.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_hetero.distributed.shards.engine import ShardEngine
from lightning_hetero.distributed.shards.units import find_units

SIZES = {"small": (256, 4), "medium": (384, 8), "large": (512, 12)}
WEIGHTS = {2: [2.0, 1.0], 3: [3.0, 1.0, 1.0]}
WARM_UP, STEPS = 2, 5


class Model(nn.Module):
    """Transformer blocks between two small layers."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(blocks)
        )
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number per position."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.last(x)
        return result


Step = Callable[[Tensor], None]


def variants(make: Callable[[], Model], ranks: int) -> Iterator[tuple[str, Step, Callable[[], None]]]:
    """Yield a name, a function that runs a step, and one that ends the variant."""

    def plain(model: nn.Module, parameters: Any) -> Step:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step

    model: Any = make()
    yield "ddp", plain(DistributedDataParallel(model), model.parameters()), lambda: None
    model = make()
    mesh = dist.init_device_mesh("cpu", (ranks,))  # type: ignore[attr-defined]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    yield "FSDP2", plain(model, model.parameters()), lambda: None
    for name, weights in (("shards, even", [1.0] * ranks), ("shards, uneven", WEIGHTS[ranks])):
        model = make()
        engine = ShardEngine(model, find_units(model), weights, torch.device("cpu"))
        yield name, sharded(model, engine), engine.leave_group


def sharded(model: nn.Module, engine: ShardEngine) -> Step:
    """Return a function that runs a step with shards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with engine.step("train", backward_follows=True):
            loss = model(x).square().mean()
        with engine.backward():
            loss.backward()
        optimizer.step()

    return step


def compare(rank: int, ranks: int, port: int, size: str, rounds: int, results: Any) -> None:
    """Time all variants on one rank."""
    connect(rank, ranks, port)
    width, blocks = SIZES[size]

    def make() -> Model:
        torch.manual_seed(0)
        return Model(width, blocks)

    x = torch.randn(4, 16, 16)
    made = list(variants(make, ranks))
    times: dict[str, list[float]] = {name: [] for name, *_ in made}
    for _, step, _ in made:
        for _ in range(WARM_UP):
            step(x)
    for _ in range(rounds):
        for name, step, _ in made:
            for _ in range(STEPS):
                dist.barrier()
                start = time.perf_counter()
                step(x)
                dist.barrier()
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        parameters = sum(p.numel() for p in make().parameters())
        results.put((parameters, {name: statistics.median(of_name) for name, of_name in times.items()}))
    for *_, end in made:
        end()
    dist.destroy_process_group()


def unequal(rank: int, ranks: int, port: int, rounds: int, results: Any) -> None:
    """Time virtual devices: rank 0 is twice as fast, and rank 1 has twice the memory."""
    connect(rank, ranks, port)
    seconds_per_sample = (0.010, 0.020)[rank]
    found = {}
    for name, weights, samples in (("even", [1.0, 1.0], (24, 24)), ("by speed and memory", [1.0, 2.0], (32, 16))):
        torch.manual_seed(0)
        model = Model(*SIZES["small"])
        # a device of known speed: its work is a sleep, beside a forward and backward pass on one sample
        model.blocks[0].register_forward_pre_hook(lambda *_, n=samples[rank]: time.sleep(n * seconds_per_sample))
        engine = ShardEngine(model, find_units(model), weights, torch.device("cpu"))
        step = sharded(model, engine)
        x = torch.randn(1, 16, 16)
        times = []
        for number in range(WARM_UP + STEPS * rounds):
            dist.barrier()
            start = time.perf_counter()
            step(x)
            dist.barrier()
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
        found[name] = sum(samples) / statistics.median(times)
        engine.leave_group()
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def connect(rank: int, ranks: int, port: int) -> None:
    """Join the ranks."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)


def run(function: Any, ranks: int, *args: Any) -> Any:
    """Run a function on ranks, and return what rank 0 has found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(function, (ranks, port, *args, results), ranks)
    return results.get()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="*", default=[*SIZES], choices=[*SIZES])
    options = parser.parse_args()
    names = ["ddp", "FSDP2", "shards, even", "shards, uneven"]
    print(f"| ranks | parameters | {' | '.join(f'{name} (ms)' for name in names)} | uneven / FSDP2 |")
    print("|---|---|---|---|---|---|---|")
    for ranks in (2, 3) if options.sizes else ():
        for size in options.sizes:
            parameters, times = run(compare, ranks, size, options.rounds)
            figures = " | ".join(f"{times[name] * 1e3:.0f}" for name in names)
            ratio = times["shards, uneven"] / times["FSDP2"]
            print(f"| {ranks} | {parameters / 1e6:.1f} M | {figures} | {ratio:.2f} |", flush=True)
    speeds = run(unequal, 2, options.rounds)
    even, by_both = speeds["even"], speeds["by speed and memory"]
    print(f"\nspeeds 2:1, memory 1:2: {by_both:.0f} samples/s, {even:.0f} with even shards and equal batches,"
          f" {by_both / even:.2f} times as many")  # fmt: skip


if __name__ == "__main__":
    main()
