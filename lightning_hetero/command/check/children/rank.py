"""One rank of a check: its device, its Trainers, and work of known duration on its device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy
from lightning_hetero.distributed.torch_private import sleep_on_device

__all__ = ["BlockClock", "Pause", "Rank"]

_SEED = 7
_CYCLES_TO_CALIBRATE = 50_000_000


@dataclass(frozen=True)
class Rank:
    """One rank of a check.

    Attributes:
        rank: Number of the rank.
        ranks: Number of ranks.
        kind: "cpu" or "cuda".
        devices: Numbers of the CUDA devices, one per rank, or a single one for all.
        names: Names of these devices.
        backend: Backend of the process group.
        folder: Folder in which the rank writes.
    """

    rank: int
    ranks: int
    kind: str = "cpu"
    devices: Sequence[int] = ()
    names: Sequence[str] = ()
    backend: str = "gloo"
    folder: str = ""

    @property
    def is_last(self) -> bool:
        """Whether it is the rank to which things happen."""
        return self.rank == self.ranks - 1

    @property
    def on_gpu(self) -> bool:
        """Whether the ranks are on GPUs."""
        return self.kind == "cuda"

    @property
    def is_shared(self) -> bool:
        """Whether all ranks are on one card."""
        return len(self.devices) == 1

    @cached_property
    def device(self) -> torch.device:
        """The device of the rank, which is also the process's current one."""
        if not self.on_gpu:
            return torch.device("cpu")
        device = torch.device("cuda", self.devices[0 if self.is_shared else self.rank])
        torch.cuda.set_device(device)
        return device

    def trainer(self, strategy: Strategy, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
        """Return a quiet Trainer for these ranks; it does not start any."""
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        seed_everything(_SEED, verbose=False)
        devices: Any = list(self.devices) if self.on_gpu else self.ranks
        return Trainer(
            accelerator="gpu" if self.on_gpu else "cpu",
            devices=devices,
            num_nodes=self.ranks if self.is_shared else 1,
            strategy=strategy,
            callbacks=list(callbacks),
            plugins=[LightningEnvironment()],
            **{
                "max_epochs": -1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "limit_val_batches": 0,
                **settings,
            },
        )

    def ddp(self, **options: Any) -> DDPStrategy:
        """Return Lightning's own strategy."""
        return DDPStrategy(process_group_backend=self.backend, **options)

    def hetero(self, **options: Any) -> HeteroDDPStrategy:
        """Return the strategy that divides the batch."""
        return HeteroDDPStrategy(process_group_backend=self.backend, **options)

    def pipeline(self, **options: Any) -> HeteroPipelineStrategy:
        """Return the strategy that divides the layers."""
        return HeteroPipelineStrategy(process_group_backend=self.backend, verbose=False, **options)

    def note_fault(self) -> None:
        """Note that this rank fails on purpose from now on."""
        Path(self.folder, f"fault-{self.rank}").write_text(str(time.time()), encoding="utf-8")


class Pause:
    """Work of known duration: kernels that count clock cycles on a GPU, sleep on a processor.

    Args:
        device: Device that works.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._cycles_per_s = 0.0
        if self._on_gpu:
            for _ in range(2):  # the first one wakes the device, whose clock is slow while it is idle
                start, end = self._mark(), None
                sleep_on_device(_CYCLES_TO_CALIBRATE)
                end = self._mark()
                end.synchronize()
                self._cycles_per_s = _CYCLES_TO_CALIBRATE / (start.elapsed_time(end) / 1e3)

    def __call__(self, seconds: float) -> None:
        """Keep the device busy for about this many seconds."""
        begin = self._mark()
        if self._on_gpu:
            sleep_on_device(int(self._cycles_per_s * seconds))
        else:
            time.sleep(seconds)
        self._spans.append((begin, self._mark()))

    def seconds(self) -> list[float]:
        """Return how long each pause has really taken, as the device has measured it."""
        if not self._on_gpu:
            return [end - begin for begin, end in self._spans]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._spans]

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class BlockClock(Callback):
    """Measures blocks of steps; at the end of each, the host waits for the device, so that a block is whole.

    Args:
        steps: Number of steps per block.
        skipped: Number of steps before the first block.
    """

    def __init__(self, steps: int, skipped: int) -> None:
        self.steps, self.skipped = steps, skipped
        self._done = 0
        self._ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time at the end of a block."""
        self._done += 1
        if self._done >= self.skipped and (self._done - self.skipped) % self.steps == 0:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._ends.append(time.perf_counter())

    def seconds_per_step(self) -> list[float]:
        """Return the mean step of each block."""
        return [(end - begin) / self.steps for begin, end in zip(self._ends, self._ends[1:], strict=False)]
