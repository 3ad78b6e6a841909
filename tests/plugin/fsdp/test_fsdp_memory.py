"""The memory of real processes: what each rank holds, its peak, and a model that one of them could not hold."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankError, RankPools
from lightning.pytorch import LightningModule
from profiles import thorough
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy
from lightning_hetero.distributed.shards.units import find_units
from lightning_hetero.plugin.fsdp.weights import model_memory

WIDTH, BLOCKS = 1000, 36  # 144 MB of parameters, 577 MB with gradients and AdamW's states
WEIGHTS = (3, 1)
M_MMAP_THRESHOLD = -3  # source: glibc, malloc.h


def layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)])


def memory_of_process(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Big(LightningModule):
    """Measures this process while it trains."""

    def __init__(self, budget: int | None, on_meta: bool) -> None:
        super().__init__()
        self.budget = budget
        self.on_meta = on_meta
        self.found: dict[str, float] = {}

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            with torch.device("meta" if self.on_meta else "cpu"):
                self.layers = layers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def on_train_start(self) -> None:
        parameters: list[Any] = list(self.parameters())
        own = sum(getattr(p, "local", p).numel() * p.element_size() for p in parameters)
        self.found["share"] = own / sum(p.numel() * p.element_size() for p in parameters)
        self.found["before"] = memory_of_process("VmRSS") - own
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins again
        if self.budget is not None:
            limit = memory_of_process("VmData") + self.budget - own
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def on_train_end(self) -> None:
        self.found["held"] = memory_of_process("VmRSS") - self.found["before"]
        self.found["peak"] = memory_of_process("VmHWM") - self.found["before"]
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def trained(sharded: bool, budgets: list[int | None], **options: Any) -> dict[str, float]:
    import torch.distributed as dist

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed is given back
    libc.malloc_trim(0)
    module = Big(budgets[dist.get_rank()], on_meta=sharded)
    strategy = HeteroFSDPStrategy(shard_weights=[*WEIGHTS]) if sharded else HeteroDDPStrategy(shares=[1, 1])
    data = DataLoader(TensorDataset(torch.randn(24, WIDTH)), batch_size=4)
    try:
        make_trainer(strategy, 2, max_steps=3, **options).fit(module, data)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return module.found


def test_a_model_of_twice_the_memory_of_the_small_rank_trains_as_predicted(ranks: RankPools) -> None:
    with torch.device("meta"):
        module = layers()
    memory = model_memory(module, find_units(module))
    budget = int(memory.sharded_bytes / 2)
    for weight, found in zip(WEIGHTS, ranks.run(2, trained, True, [None, budget]), strict=True):
        shards = memory.sharded_bytes * weight / sum(WEIGHTS)
        assert found["share"] == pytest.approx(weight / sum(WEIGHTS), rel=0.01)
        assert found["held"] == pytest.approx(shards, abs=15e6)  # besides, the process itself grows
        assert found["peak"] == pytest.approx(shards + memory.gathered_bytes, rel=0.1)


@thorough
def test_without_shards_it_does_not_fit(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="memory"):
        ranks.run(2, trained, False, [None, 288_000_000])


def trained_mixed(budgets: list[int | None]) -> dict[str, float]:
    return trained(True, budgets, precision="bf16-mixed")


@thorough
def test_what_autocast_makes_of_parameters_is_freed_with_them(ranks: RankPools) -> None:
    with torch.device("meta"):
        module = layers()
    memory = model_memory(module, find_units(module))
    casts = sum(p.numel() * 2 for p in module.parameters())  # all of them would be kept
    for weight, found in zip(WEIGHTS, ranks.run(2, trained_mixed, [None, None]), strict=True):
        shards = memory.sharded_bytes * weight / sum(WEIGHTS)
        assert found["peak"] < shards + memory.gathered_bytes + casts / 2
