"""The memory of real processes: what each rank holds, its peak, and a model that one of them could not hold."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RankError, RankPool, RankPools
from lightning.pytorch import LightningModule
from profiles import thorough
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import make_trainer

from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy
from lightning_hetero.distributed.shards.units import find_units
from lightning_hetero.hardware.memory import MemoryUse
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
        make_trainer(strategy, 2, max_steps=2, **options).fit(module, data)
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


# ---- weights by themselves -------------------------------------------------------------------------------------------

ACTIVE, PER_BLOCK = 12, 6
SHARES, GLOBAL_BATCH = (3, 1), 240
BUDGETS = (230_000_000, 215_000_000)


class ProcessMeter:
    """A device whose memory is that of this process, up to a total that the system enforces."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.before = memory_of_process("VmRSS")

    def restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> MemoryUse:
        used, peak = (memory_of_process(key) - self.before for key in ("VmRSS", "VmHWM"))
        return MemoryUse(used, peak, self.total)


class Metered(HeteroFSDPStrategy):
    """Its ranks have devices of little memory."""

    meter: ProcessMeter

    def setup_environment(self) -> None:
        super().setup_environment()
        self.memory = self.meter


class Active(LightningModule):
    """Takes as much memory for activations as for shards."""

    def __init__(self, example: bool) -> None:
        super().__init__()
        self.example = example
        self.found: dict[str, float] = {}

    def configure_model(self) -> None:
        if not hasattr(self, "layers"):
            with torch.device("meta"):
                self.layers = nn.Sequential(
                    *[
                        nn.Sequential(nn.Linear(WIDTH, WIDTH), *[nn.Hardswish() for _ in range(PER_BLOCK)])
                        for _ in range(ACTIVE)
                    ]
                )
            if self.example:
                self.example_input_array = torch.zeros(2, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def on_train_start(self) -> None:
        meter: Any = self.trainer.strategy.memory  # type: ignore[attr-defined]
        parts: list[Any] = list(self.parameters())
        parts += [v for s in self.trainer.optimizers[0].state.values() for v in s.values() if v.dim()]
        own = sum(part.local.numel() * part.element_size() for part in parts)
        meter.before = memory_of_process("VmRSS") - own
        self.found["of files"] = memory_of_process("RssFile")
        limit = memory_of_process("VmData") - own + meter.total
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        meter.restart()

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        rank, weights = self.global_rank, strategy._weights
        self.found["weight"] = weights[rank] / sum(weights)
        # pages of libraries that the system has taken meanwhile, since nobody used them
        taken = max(self.found["of files"] - memory_of_process("RssFile"), 0)
        self.found["peak"] = strategy.meter.read().peak_bytes
        self.found["most"] = self.found["peak"] + taken
        samples = GLOBAL_BATCH * SHARES[rank] / sum(SHARES)
        activations = strategy._activations.bytes_per_sample * samples
        memory = strategy._model_memory
        self.found["predicted"] = memory.sharded_bytes * self.found["weight"] + memory.gathered_bytes + activations
        self.found["per sample"] = strategy._activations.bytes_per_sample
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fitted_by_memory(folder: str) -> list[dict[str, float]]:
    """Train, train again with what was measured, and resume with it."""
    import torch.distributed as dist

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.malloc_trim(0)
    strategy = Metered(shares=[*SHARES], global_batch_size=GLOBAL_BATCH)
    strategy.meter = ProcessMeter(BUDGETS[dist.get_rank()])
    data = TensorDataset(torch.randn(3 * GLOBAL_BATCH, WIDTH))
    found, path = [], f"{folder}/last.ckpt"
    try:
        trainer = make_trainer(strategy, 2, max_epochs=1, limit_train_batches=2)
        for number in range(2):
            module = Active(example=number == 0)
            trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=path if number else None)
            found.append(module.found)
            if not number:
                trainer.save_checkpoint(path)
                trainer.fit_loop.max_epochs = 2
                del module
                libc.malloc_trim(0)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


@thorough  # beside other tests, libraries' pages come and go while the memory of the process is measured
def test_weights_leave_room_for_measured_activations(tmp_path: Path) -> None:
    pool = RankPool(2)  # processes in which no other test has left memory
    try:
        results = pool.run(fitted_by_memory, str(tmp_path), timeout_s=200.0)
    finally:
        pool.close()
    per_sample = ACTIVE * (1 + PER_BLOCK) * WIDTH * 4
    for of_run in zip(*results, strict=True):
        for found in of_run:
            # measured in the first step, with some memory of the process's own
            assert found["per sample"] == pytest.approx(per_sample, rel=0.15)
            assert found["peak"] <= 1.1 * found["predicted"]
            assert found["most"] >= 0.9 * found["predicted"]
        # rank 0 has more memory, but holds less of the model: it has three times as many samples
        assert of_run[0]["weight"] < 0.48
        assert of_run[1]["weight"] > 0.52
    # the first training knew its example, and the second, which resumed it, what the first had measured
    assert results[0][0]["weight"] != results[0][1]["weight"]


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
