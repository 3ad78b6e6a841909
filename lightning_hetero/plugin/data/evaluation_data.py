"""The evaluation loaders of a strategy: every sample once, equally many steps on every rank, divided by speed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.batch.blocks import Cursor
from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchLimits, BatchPlan, BatchSlice
from lightning_hetero.distributed.data.global_batches import CutBatches, GlobalBatches, ListedBatches
from lightning_hetero.distributed.data.joined_loader import Joint, join_loader
from lightning_hetero.distributed.data.share_loader import share_loader
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.lightning_private import called_by_lightning_loop, telling_indices
from lightning_hetero.plugin.common.loop_progress import TrainingProgress, evaluation_loaders
from lightning_hetero.plugin.common.protocols import LoaderOwner
from lightning_hetero.plugin.data import loader_kinds as loaders
from lightning_hetero.plugin.data.slices import StepSlices
from lightning_hetero.plugin.step.batch_size import samples_in

__all__ = ["EvaluationData"]

# a loader carries its slices in this attribute, so they live exactly as long as the loader
_SLICES = "_hetero_slices"


class EvaluationData:
    """Divides the loaders of validation, test and prediction of a strategy.

    Only the choice of samples must be exact here. If the last batch has too few samples for all ranks, it takes some
    from the batch before it, so that every rank has at least one.

    Args:
        strategy: The strategy whose loaders are divided.
        training_plan: Function that returns the plan of the next training step, or None if there is no training.

    Attributes:
        samples_in_batch: Number of samples that this rank has in the current step; None if it is unknown.
        stays_equal: Whether the batches of later evaluations are divided equally, because a step gathers them.
    """

    def __init__(self, strategy: LoaderOwner, training_plan: Callable[[], BatchPlan | None]) -> None:
        self._training_plan = training_plan
        self._strategy = strategy
        self._steps: Counter[int] = Counter()
        self.samples_in_batch: int | None = None
        self.stays_equal = False

    def process(self, dataloader: object, *, predicting: bool) -> object:
        """Return the loader to use instead of ``dataloader``; every rank must call this at the same point.

        Args:
            dataloader: The loader that Lightning passes to ``process_dataloader``.
            predicting: Whether the loader is for prediction.
        """
        strategy = self._strategy
        if strategy.world_size == 1:
            return dataloader
        loader = loaders.examine(dataloader, strategy.world_size, TrainingProgress(strategy.trainer).epoch)
        if isinstance(loader, loaders.Divisible):
            return self._divided(loader, predicting)
        if isinstance(loader, loaders.Unbatched):
            dataloader = loaders.deal_batches(loader, strategy.global_rank, strategy.world_size)
        return dataloader if predicting else self._joined(dataloader)

    def _divided(self, loader: loaders.Divisible, predicting: bool) -> DataLoader[Any]:
        slices = StepSlices()
        sampler = ShareBatchSampler(
            self._global_batches(loader),
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            rank=self._strategy.global_rank,
            plan_of=self._plan_of,
            begin=Cursor,
            original=loaders.original_batch_sampler(loader.loader),
            stand_in=not predicting,
        )
        indices = telling_indices(sampler) if loader.tells_indices else None
        shared = share_loader(loader.loader, sampler, _nothing, partial(slices.note, 0), indices)
        if not predicting:
            vars(shared)[_SLICES] = slices
        return shared

    def _global_batches(self, loader: loaders.Divisible) -> GlobalBatches:
        world_size = self._strategy.world_size
        size = (loader.batch_size or 1) * world_size
        least = _fewest(world_size, self._strategy.batch_multiple)
        least = world_size if size < least else least
        if loader.lists is not None:
            return ListedBatches(loader.lists, size, join=world_size)
        return CutBatches(loader.order, size, drop_last=loader.drop_last, least=least)

    def _joined(self, dataloader: Any) -> Any:
        slices = StepSlices()
        note = partial(slices.note, 0)
        joined = join_loader(dataloader, Joint(_samples_or_one, Cursor, note, called_by_lightning_loop))
        vars(joined)[_SLICES] = slices
        return joined

    def _plan_of(self, cursor: Cursor, size: int) -> BatchPlan:  # noqa: ARG002  # samplers pass it
        """Return the plan of a batch; every rank has a sample, where there are enough, before multiples matter."""
        plan, multiple = self._plan(), self._strategy.batch_multiple
        limits = BatchLimits(batch_multiple=multiple if size >= _fewest(plan.world_size, multiple) else 1)
        return plan_for_block(plan, size, limits, min_samples=1)

    def _plan(self) -> BatchPlan:
        strategy = self._strategy
        if self.stays_equal:
            return BatchPlan((1,) * strategy.world_size)
        plan = self._training_plan()
        if plan is not None:
            return plan
        # only the proportions count; a plan is scaled to the loader's batches
        shares = arguments.shares_of_ranks(strategy.shares, strategy.profiles) or [1.0] * strategy.world_size
        return proportional_plan(shares, 1000 * strategy.world_size, min_samples=1)

    def begin(self, step: Callable[..., Any]) -> None:
        """Prepare for an evaluation.

        Args:
            step: The user's evaluation step.

        Raises:
            UnsupportedFeatureError: The step fetches its batches itself, so a stand-in could not be undone.
        """
        self._steps.clear()
        if self._strategy.world_size > 1 and "dataloader_iter" in inspect.signature(step).parameters:
            raise UnsupportedFeatureError(
                "`hetero_ddp` must know the batch of an evaluation step before the step begins, got a step that takes"
                ' `dataloader_iter`. Take `batch` instead or use strategy="ddp".'
            )

    def part_of_step(self, loader_index: int) -> BatchSlice | None:
        """Return the current step's part of its global batch; None if it is unknown. Call it once per step.

        Args:
            loader_index: Index of the loader, if several are evaluated one after the other; otherwise 0.

        Raises:
            UnsupportedFeatureError: Several loaders give a batch to this step, and one of the batches is a stand-in: it
                cannot be undone without the others.
        """
        self.samples_in_batch = None
        if self._strategy.world_size == 1:
            return None
        present, mode = evaluation_loaders(self._strategy.trainer)
        if mode == "sequential":
            present = [present[loader_index]]
        parts = []
        for loader in present:
            if (slices := getattr(loader, _SLICES, None)) is not None:
                cycled = mode == "max_size_cycle" and getattr(loader, "has_length", True)
                batches = len(loader) if cycled else self._steps[id(loader)] + 1
                parts += slices.of(self._steps[id(loader)] % batches)
                self._steps[id(loader)] += 1
        # every rank knows the parts of all, so that all of them raise
        of_ranks = zip(*(part.plan.samples for part in parts), strict=True)
        if any(len({samples > 0 for samples in of_rank}) > 1 for of_rank in of_ranks):
            raise UnsupportedFeatureError(
                f"`hetero_ddp` cannot evaluate {len(parts)} loaders at the same time if one of them has no sample"
                f" for a rank. Evaluate them one after the other, or use `drop_last=True`."
            )
        self.samples_in_batch = parts[0].samples if len(parts) == 1 else None
        return parts[0] if parts else None


def _fewest(world_size: int, multiple: int) -> int:
    """Return with how many samples all ranks have some, and all but one a multiple."""
    return (world_size - 1) * multiple + 1


def _samples_or_one(batch: Any) -> int:
    """Count the samples for the means that a step logs; if that is impossible, every batch counts as one sample."""
    try:
        return samples_in(batch)
    except UnsupportedFeatureError:
        return 1


def _nothing() -> None:
    """Do nothing: evaluation is not timed."""
