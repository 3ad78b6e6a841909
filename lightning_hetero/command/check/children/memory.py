"""Let memory run out: for real on GPUs, whose allocator is given a limit, and by an error on processors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_hetero import LargestBatchFinder
from lightning_hetero.command.check.children.rank import Rank
from lightning_hetero.command.check.children.trainings import FEATURES, Small, largest_difference, loader, numbers_of
from lightning_hetero.command.check.finding import Finding, at_most, failed
from lightning_hetero.exceptions import UnsupportedFeatureError

__all__ = ["largest_batch", "out_of_memory", "out_of_memory_in_hook"]

_BATCH_SIZE = 16  # per rank
_AFTER = 2
_STEPS = 6
_BYTES_PER_SAMPLE = 2**25


class Shortage(Callback):
    """Leaves room for a few samples on the last rank, from a step on.

    Args:
        rank: The rank of this process.
        phase: "forward" or "backward": when samples take memory.
        fits: Number of samples for which there is room; 0 for no shortage.
        after: Number of steps before the shortage, at least one, in which the optimiser gets its state.
    """

    def __init__(self, rank: Rank, phase: str, fits: int, after: int = _AFTER) -> None:
        self.rank, self.phase, self.fits, self.after = rank, phase, fits, after
        self.active = False

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Set the limit after the last step without it."""
        if self.fits and self.rank.is_last and trainer.global_step == self.after:
            self.active = True
            if self.rank.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                room = torch.cuda.memory_reserved() + _BYTES_PER_SAMPLE * (self.fits + 0.5)
                torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])

    def allocate(self, phase: str, samples: int) -> None:
        """Take memory for samples in a pass, for a moment."""
        if not self.active or phase != self.phase:
            return
        if self.rank.on_gpu:
            torch.empty(samples * _BYTES_PER_SAMPLE, dtype=torch.uint8, device=self.rank.device)
        elif samples > self.fits:
            raise torch.OutOfMemoryError(f"{samples} samples in the {phase} pass")

    def end(self) -> None:
        """Lift the limit."""
        self.active = False
        if self.rank.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


class _Allocates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shortage: Shortage) -> Tensor:
        shortage.allocate("forward", len(x))
        ctx.shortage = shortage
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.shortage.allocate("backward", len(gradients[0]))
        return gradients[0], None


class _Layer(nn.Module):
    def __init__(self, shortage: Shortage) -> None:
        super().__init__()
        self.shortage = shortage

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Allocates.apply(x, self.shortage)  # type: ignore[no-untyped-call]
        return y


def _module(shortage: Shortage) -> Small:
    layers = [nn.Linear(FEATURES, 8), nn.Tanh(), _Layer(shortage), nn.Linear(8, 1)]
    return Small(torch.float64, layers=layers)


def _data(rank: Rank, steps: int) -> Any:
    return loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * steps, torch.float64)


# ---- forward and backward passes -------------------------------------------------------------------------------------

_TOLERANCE = 1e-10


def out_of_memory(rank: Rank) -> Finding:
    """Train with room for 6 of 16 samples on the last rank, and compare with a training that has room for all."""
    expected, _ = _trained(rank, "forward", 0)
    differences, times = {}, {}
    for phase in ("forward", "backward"):
        found, times[phase] = _trained(rank, phase, 6)
        differences[phase] = largest_difference(found, expected)
        if rank.is_last and not times[phase]:
            return failed(f"memory did not run out in the {phase} pass")
    note = "largest difference of a parameter from a training with enough memory"
    return at_most(_TOLERANCE, max(differences.values()), "", note, differences=differences, times=times)


def _trained(rank: Rank, phase: str, fits: int) -> tuple[Tensor, int]:
    shortage = Shortage(rank, phase, fits)
    module, strategy = _module(shortage), rank.hetero(shares=[1.0] * rank.ranks)
    try:
        rank.trainer(strategy, [shortage], max_steps=_STEPS).fit(module, _data(rank, _STEPS + 1))
    finally:
        shortage.end()
    return numbers_of(module), strategy.micro_batch_limits.times_out_of_memory


# ---- communication hooks ---------------------------------------------------------------------------------------------


def _hook(shortage, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with types, not with texts
    """Average the gradients, after taking more memory than there is."""
    if shortage.active:
        shortage.rank.note_fault()
    shortage.allocate("hook", 2 * _BATCH_SIZE)
    future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


class _Hooked(Callback):
    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        trainer.strategy.model.register_comm_hook(self.shortage, _hook)


def out_of_memory_in_hook(rank: Rank) -> Finding:
    """Run out of memory in a communication hook of the last rank, which ends the training."""
    shortage = Shortage(rank, "hook", 1)
    trainer = rank.trainer(rank.hetero(shares=[1.0] * rank.ranks), [_Hooked(shortage), shortage], max_steps=_STEPS)
    trainer.fit(_module(shortage), _data(rank, _STEPS + 1))
    return failed("the training went on")


# ---- the largest batch -----------------------------------------------------------------------------------------------

_FITS = 20  # of 32 samples that both ranks have


def largest_batch(rank: Rank) -> Finding:
    """Search with room for 20 samples on the last rank, and in a training whose steps communicate."""
    finder = LargestBatchFinder(verbose=False)
    shortage = Shortage(rank, "forward", _FITS, after=1)  # the search follows the first step
    try:
        _fit_with(rank, finder, _module(shortage), [shortage])
    finally:
        shortage.end()
    expected = [_BATCH_SIZE * rank.ranks] * (rank.ranks - 1) + [_FITS]
    farthest = max(abs(n - m) for n, m in zip(finder.found, expected, strict=True))
    note = f"largest difference of a micro-batch: found {list(finder.found)}, {expected} fit"
    # the allocator may cut its blocks so that a sample less fits
    finding = at_most(1.0 if rank.on_gpu else 0.0, float(farthest), "samples", note)
    if finding.outcome == "PASS" and rank.on_gpu and not _refuses(rank):
        return failed("LargestBatchFinder did not refuse synchronised batch normalisation")
    return finding


def _refuses(rank: Rank) -> bool:
    module = Small(layers=[nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)])
    try:
        _fit_with(rank, LargestBatchFinder(verbose=False), module, [], torch.float32, sync_batchnorm=True)
    except UnsupportedFeatureError:
        return True
    return False


def _fit_with(
    rank: Rank,
    finder: LargestBatchFinder,
    module: LightningModule,
    callbacks: list[Callback],
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> None:
    trainer = rank.trainer(rank.hetero(), [*callbacks, finder], max_steps=_STEPS, **settings)
    trainer.fit(module, loader(_BATCH_SIZE, _BATCH_SIZE * rank.ranks * (_STEPS + 1), dtype))
