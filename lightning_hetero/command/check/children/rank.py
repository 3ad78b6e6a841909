"""One rank of a check: its device, its strategies and its Trainers; torch and Lightning are imported when needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies import DDPStrategy, Strategy

    from lightning_hetero import HeteroDDPStrategy, HeteroFSDPStrategy, HeteroPipelineStrategy

__all__ = ["Rank"]

_SEED = 7


@dataclass(frozen=True)
class Rank:
    """One rank of a check.

    Attributes:
        rank: Number of the rank.
        ranks: Number of ranks.
        kind: "cpu" or "cuda".
        devices: Numbers of the devices, one per rank, or a single one for all.
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
        import torch

        if not self.on_gpu:
            return torch.device("cpu")
        device = torch.device("cuda", self.devices[0 if self.is_shared else self.rank])
        torch.cuda.set_device(device)
        return device

    def trainer(self, strategy: Strategy, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
        """Return a quiet Trainer for these ranks; it does not start any."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.pytorch import Trainer, seed_everything

        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        seed_everything(_SEED, verbose=False)
        devices: Any = list(self.devices) if self.on_gpu else 1 if self.is_shared else self.ranks
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
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend=self.backend, **options)

    def hetero(self, **options: Any) -> HeteroDDPStrategy:
        """Return the strategy that divides the batch."""
        from lightning_hetero import HeteroDDPStrategy

        return HeteroDDPStrategy(process_group_backend=self.backend, **options)

    def fsdp(self, **options: Any) -> HeteroFSDPStrategy:
        """Return the strategy that divides the batch and the parameters."""
        from lightning_hetero import HeteroFSDPStrategy

        return HeteroFSDPStrategy(process_group_backend=self.backend, **options)

    def pipeline(self, **options: Any) -> HeteroPipelineStrategy:
        """Return the strategy that divides the layers."""
        from lightning_hetero import HeteroPipelineStrategy

        return HeteroPipelineStrategy(process_group_backend=self.backend, verbose=False, **options)

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all ranks, in the order of ranks, on every rank; after a training."""
        import torch.distributed as dist

        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def note_fault(self) -> None:
        """Note that this rank fails on purpose from now on."""
        Path(self.folder, f"fault-{self.rank}").write_text(str(time.time()), encoding="utf-8")
