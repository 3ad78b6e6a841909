"""Compare hetero_pipeline with the same training on one device."""

from __future__ import annotations

import gc
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_hetero.balance.pipeline.stages import Schedule
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.children.trainings import FEATURES, Small, largest_difference, loader, numbers_of
from lightning_hetero.command.check.finding import Finding, at_most, failed

__all__ = ["bf16", "float32"]

_SCHEDULES: tuple[Schedule, ...] = ("1f1b", "gpipe")
_BLOCKS = 4  # of two layers each
_STEPS = 8
_MICRO_BATCHES = 4
_GIB = 2**30

Precision = Literal["32-true", "bf16-mixed"]


def float32(rank: Rank) -> Finding:
    """Train in single precision."""
    return _compared(rank, "32-true", 1e-4)


def bf16(rank: Rank) -> Finding:
    """Train with autocast, whose numbers have eight bits."""
    return _compared(rank, "bf16-mixed", 0.02)


def _compared(rank: Rank, precision: Precision, tolerance: float) -> Finding:
    differences, peaks = {}, {}
    for schedule in _SCHEDULES:
        held = _restart_peak(rank)
        found = _in_stages(rank, schedule, precision)
        peaks[schedule] = rank.gather(_peak_bytes(rank) - held)
        differences[schedule] = found
    held = _restart_peak(rank)
    expected = _on_one_device(rank, precision)
    peak = _peak_bytes(rank) - held
    largest = max(largest_difference(found, expected) for found in differences.values())
    note = f"largest difference of a parameter from one device after {_STEPS} steps"
    if rank.on_gpu:
        of_schedules = " and ".join(f"{[round(b / _GIB, 2) for b in peaks[s]]} ({s})" for s in _SCHEDULES)
        note += f"; peaks {of_schedules}, one device {peak / _GIB:.2f} GiB"
        if max(max(of_ranks) for of_ranks in peaks.values()) >= peak:
            return failed(f"a stage needs no less memory than the whole model: {note}", peaks=peaks, one_device=peak)
    return at_most(tolerance, largest, "", note, peaks=peaks, one_device=peak)


def _size(rank: Rank) -> tuple[int, int]:
    """Return the width of the layers and the batch size."""
    return (2048, 256) if rank.on_gpu else (32, 16)


def _module(rank: Rank) -> Small:
    width, _ = _size(rank)
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), nn.Tanh()]
    for _ in range(_BLOCKS * rank.ranks // 2):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return Small(layers=[*layers, nn.Linear(width, 1)], lr=0.5 / width)  # a constant one makes wide layers diverge


def _data(rank: Rank) -> Any:
    _, batch_size = _size(rank)
    return loader(batch_size, batch_size * _STEPS)


def _in_stages(rank: Rank, schedule: Schedule, precision: Precision) -> Tensor:
    module = _module(rank)
    layers = len(module.model)
    splits = [layers * stage // rank.ranks for stage in range(1, rank.ranks)]
    strategy = rank.pipeline(splits=splits, num_microbatches=_MICRO_BATCHES, schedule=schedule)
    rank.trainer(strategy, max_steps=_STEPS, precision=precision).fit(module, _data(rank))
    return numbers_of(module)


def _on_one_device(rank: Rank, precision: Precision) -> Tensor:
    """Train with torch alone."""
    module = _module(rank).to(rank.device)
    optimizer = module.configure_optimizers()
    for number, batch in enumerate(_data(rank)):
        on_device = [tensor.to(rank.device) for tensor in batch]
        with torch.autocast(rank.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.training_step(on_device, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return numbers_of(module)


def _restart_peak(rank: Rank) -> int:
    """Return the bytes that earlier trainings still hold."""
    if not rank.on_gpu:
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats(rank.device)
    return torch.cuda.memory_allocated(rank.device)


def _peak_bytes(rank: Rank) -> int:
    return torch.cuda.max_memory_allocated(rank.device) if rank.on_gpu else 0
