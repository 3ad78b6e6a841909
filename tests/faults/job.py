"""A training that something happens to; run by torchrun, or by hand in an environment like SLURM's.

Its one argument is a JSON object: see :class:`Job`.  Every rank appends the samples of each training step to a ledger,
and writes what it has found when the training is over.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import SEED, Numbered, SmallModule, flat, loss_of, small_network

from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer
from lightning_hetero.distributed.pipeline.passes.copies import Copies
from lightning_hetero.testing import SlowDown


@dataclass(frozen=True)
class Fault:
    """What happens to one rank, once.

    Attributes:
        rank: Rank to which it happens.
        what: "kill", "stop" or "raise"; "none" for nothing.
        when: "step", "loss" for inside a training step, "average" for while gradients are added up over replicas,
            "replan", "checkpoint", "validation", or "sample" for inside the dataset.
        step: Earliest training step at which it happens.
        seconds: Duration of a stop; 0 for ever.
        others_wait: Whether the other ranks wait meanwhile where no exception reaches them.
    """

    rank: int
    what: str
    when: str
    step: int = 0
    seconds: float = 0.0
    others_wait: bool = False


@dataclass(frozen=True)
class Job:
    """Settings of a job, as its command line gives them.

    Attributes:
        folder: Directory in which everything is written.
        devices: Number of ranks on this node.
        nodes: Number of nodes.
        batch: Global batch size.
        size: Samples per epoch.
        epochs: Number of epochs.
        factors: Slow-down of each rank.
        timeout_s: Time-out of the process group.
        workers: Workers per loader.
        faults: Faults in order, one per attempt.
        seconds_per_sample: Cost per sample of a device of factor 1.
        weather: Seed of drawn slow-downs and recoveries; negative for none.
        pipeline: Whether the ranks divide the layers instead of the batch.
        replicas: Ranks of each pipeline, if there are several.
        save_on_exception: Whether a rank that fails saves a checkpoint.
    """

    folder: str
    devices: int
    nodes: int = 1
    batch: int = 24
    size: int = 250
    epochs: int = 3
    factors: list[float] = field(default_factory=list)
    timeout_s: float = 600.0
    workers: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds_per_sample: float = 0.003
    weather: int = -1
    pipeline: bool = False
    replicas: list[list[int]] = field(default_factory=list)
    save_on_exception: bool = False

    @property
    def next_fault(self) -> Fault | None:
        """The first that has not happened."""
        left = [fault for number, fault in enumerate(self.faults) if not self.mark_of(number).exists()]
        return Fault(**left[0]) if left else None

    def mark_of(self, number: int) -> Path:
        """Where it is noted that a fault has happened."""
        return Path(self.folder, f"fault-{number}.happened")


def wait_in_c() -> None:
    """Wait for ever in a call that lets other threads run and that nothing interrupts, like one of a device."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def happen(job: Job, fault: Fault) -> None:
    """Make the fault happen to this process."""
    next(mark for n in range(len(job.faults)) if not (mark := job.mark_of(n)).exists()).touch()
    sys.stderr.write(f"rank {fault.rank}: {fault.what} in {fault.when} {fault.step}\n")
    if fault.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.what == "stop":
        if fault.seconds:
            subprocess.Popen(["sh", "-c", f"sleep {fault.seconds}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault.what == "raise":
        raise OSError("raised by a test")


class Happening(Callback):
    """Makes the next fault happen when it is due."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def maybe(self, trainer: Trainer, when: str, step: int) -> None:
        fault = self.job.next_fault  # the one before it may have been another rank's
        if fault is None or fault.when != when or step < fault.step:
            return
        if fault.rank == trainer.global_rank:
            if fault.others_wait:
                time.sleep(1.0)  # until they do
            happen(self.job, fault)
        elif fault.others_wait:
            wait_in_c()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, HeteroDDPStrategy):
            change = strategy.change_plan

            def change_plan(first_step: int, plan: Any) -> None:
                change(first_step, plan)
                self.maybe(trainer, "replan", first_step)

            strategy.change_plan = change_plan  # type: ignore[method-assign]
        if self.job.replicas:
            added_up = Copies.add_up

            def add_up(*args: Any) -> Any:
                found = added_up(*args)  # which the peers wait for
                self.maybe(trainer, "average", trainer.fit_loop.total_batch_idx)
                return found

            Copies.add_up = add_up  # type: ignore[method-assign,assignment]
        if trainer.is_global_zero:
            torch.save = self.half_of(torch.save, trainer)

    def half_of(self, save: Callable[..., None], trainer: Trainer) -> Callable[..., None]:
        """Return a function that writes half of a checkpoint before the fault happens."""

        def half(what: Any, file: Any, **options: Any) -> None:
            save(what, file, **options)
            if isinstance(file, io.BytesIO):  # a tensor that is sent
                return
            file.flush()
            length = file.tell()
            file.truncate(length // 2)
            self.maybe(trainer, "checkpoint", trainer.global_step)
            file.seek(0)
            save(what, file)

        return half

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            self.maybe(trainer, "checkpoint", trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.maybe(trainer, "step", trainer.fit_loop.total_batch_idx)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.maybe(trainer, "validation", trainer.global_step)


class Weather(Callback):
    """Makes ranks slower and faster at drawn steps, the same on all ranks; notes what each process holds."""

    def __init__(self, job: Job, slow_down: SlowDown) -> None:
        self.job = job
        self.slow_down = slow_down

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.total_batch_idx
        if step % 50 == 0:
            rng = random.Random(f"{self.job.weather} {step}")
            rank = rng.randrange(trainer.world_size)
            self.slow_down.factors[rank] = rng.choice([1.0, 1.0, 1.5, 2.0, 3.0, 4.0])
            self.note(trainer.global_rank, step)

    def note(self, rank: int, step: int) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        line = {
            "step": step,
            "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
        with Path(self.job.folder, f"resources-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class FaultyData(Numbered):
    """Fails on one rank at its n-th sample."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.size)
        fault = job.next_fault
        self.job = job
        self.fault = fault if fault is not None and fault.when == "sample" else None
        self.drawn = 0

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        self.drawn += 1
        if self.fault is not None and self.fault.rank == int(os.environ["RANK"]) and self.drawn > self.fault.step:
            happen(self.job, self.fault)
        return super().__getitem__(index)


class Ledger(SmallModule):
    """Records each training step before it is taken."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.writer = LedgerWriter(folder)

    def on_train_start(self) -> None:
        self.writer.begin(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        strategy = self.trainer.strategy
        assert isinstance(strategy, HeteroDDPStrategy)
        assert strategy.training_slice is not None
        self.writer.write(self.trainer, self.ledger[-1] if strategy.training_slice.samples else [])
        return loss


class StagedLedger(LightningModule):
    """The same network for stages; every rank sees every batch, and rank 0 writes them down."""

    def __init__(self, folder: Path, happening: Happening) -> None:
        super().__init__()
        self.model = small_network()
        self.writer = LedgerWriter(folder)
        self.happening = happening

    @property
    def network(self) -> nn.Module:
        return self.model

    def on_train_start(self) -> None:
        self.writer.begin(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == 0:
            self.writer.write(self.trainer, batch[0].tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.happening.maybe(self.trainer, "loss", self.trainer.fit_loop.total_batch_idx)
        return loss_of(self.model, batch[1], batch[2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss_of(self.model, batch[1], batch[2]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class LedgerWriter:
    """Writes a line for each training step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.attempt = 0.0

    def begin(self, trainer: Trainer) -> None:
        # ordered, and the same on all ranks: torchrun counts the restarts of each node for itself
        self.attempt = trainer.strategy.broadcast(time.time())

    def write(self, trainer: Trainer, samples: list[int]) -> None:
        line = {"attempt": self.attempt, "step": trainer.fit_loop.total_batch_idx, "samples": samples}
        with (self.folder / f"ledger-{trainer.global_rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def train(argument: str) -> None:
    """Train, from the last checkpoint if there is one."""
    warnings.filterwarnings("ignore")
    job = Job(**json.loads(argument))
    folder = Path(job.folder)
    seed_everything(SEED, verbose=False)
    torch.set_num_threads(1)
    balancer = LoadBalancer(watch_steps=5)
    happening = Happening(job)
    callbacks: list[Callback] = [happening] if job.pipeline else [balancer, happening]
    if job.factors:
        slow_down = SlowDown(job.factors, seconds_per_sample=job.seconds_per_sample)
        callbacks.append(slow_down)
        if job.weather >= 0:
            callbacks.insert(0, Weather(job, slow_down))
    callbacks.append(
        ModelCheckpoint(folder, save_last=True, every_n_train_steps=4, save_on_exception=job.save_on_exception)
    )
    timeout = timedelta(seconds=job.timeout_s)
    trainer = Trainer(
        accelerator="cpu",
        devices=job.devices,
        num_nodes=job.nodes,
        strategy=HeteroPipelineStrategy(timeout=timeout, replicas=job.replicas or 1)
        if job.pipeline
        else HeteroDDPStrategy(global_batch_size=job.batch, timeout=timeout),
        max_epochs=job.epochs,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="logs", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = StagedLedger(folder, happening) if job.pipeline else Ledger(folder)
    size = job.batch if job.pipeline else job.batch // trainer.world_size
    workers = {"num_workers": job.workers, "persistent_workers": bool(job.workers)}
    training = DataLoader(FaultyData(job), batch_size=size, shuffle=True, **workers)  # type: ignore[arg-type]
    trainer.fit(model, training, DataLoader(Numbered(40), batch_size=4), ckpt_path="last")
    found = {
        "parameters": flat(model.network),
        "steps": trainer.global_step,
        "world_size": trainer.world_size,
        "local_rank": trainer.local_rank,
        "node": trainer.node_rank,
        "changes": [(step, plan.samples) for step, plan in balancer.changes],
    }
    (folder / f"found-{trainer.global_rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    train(sys.argv[1])
