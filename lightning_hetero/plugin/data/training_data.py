"""The training loaders of a strategy: how global batches are divided, and which part of them a step gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_hetero.balance.batch.batch_solver import can_divide, keeps_limits, proportional_plan
from lightning_hetero.balance.batch.blocks import (
    Cursor,
    block_in_step,
    blocks_before,
    common_unit,
    divide_together,
    merge_slices,
)
from lightning_hetero.balance.batch.sharding import plan_for_block
from lightning_hetero.balance.types import BatchLimits, BatchPlan, BatchSlice, PlanSchedule
from lightning_hetero.distributed.collectives import BroadcastOrder, all_gather_counts
from lightning_hetero.distributed.data.global_batches import CutBatches, GlobalBatches, ListedBatches
from lightning_hetero.distributed.data.joined_loader import JoinedLoader, Joint, join_loader
from lightning_hetero.distributed.data.share_loader import share_loader
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError
from lightning_hetero.plugin.common import arguments
from lightning_hetero.plugin.common.inexact import GATHERED, normalises_batches, warn_of_inexact
from lightning_hetero.plugin.common.lightning_private import called_by_lightning_loop
from lightning_hetero.plugin.common.loop_progress import (
    TrainingProgress,
    resume_exactly,
    training_loaders,
)
from lightning_hetero.plugin.common.protocols import LoaderOwner
from lightning_hetero.plugin.data import loader_kinds as loaders
from lightning_hetero.plugin.data.loader_state import ResumedLoaders, loaders_state
from lightning_hetero.plugin.data.several_loaders import check_ends
from lightning_hetero.plugin.data.slices import StepSlices
from lightning_hetero.plugin.step.batch_size import samples_in

__all__ = ["TrainingData"]


class TrainingData:
    """Divides the training loaders of a strategy.

    Lightning processes loaders one by one, and tells which belong together only after the last. They are therefore
    first examined together when the first batch is drawn or the plan schedule is read.

    Args:
        strategy: The strategy whose loaders are divided.

    Attributes:
        part: This rank's part of the current global batch; None if no loader has noted one.
        samples_in_batch: Number of samples that this rank has in the current step; None if it is unknown.
    """

    def __init__(self, strategy: LoaderOwner) -> None:
        self._strategy = strategy
        self._schedule: PlanSchedule | None = None
        self._samplers: tuple[ShareBatchSampler, ...] | None = ()  # None: loaders were processed, but not examined
        self._mode = ""
        self._slices = StepSlices()
        self._stays_equal = False
        self._completed_from = 0
        self._resumed = ResumedLoaders()
        self.part: BatchSlice | None = None
        self.samples_in_batch: int | None = None

    # ---- loaders ---------------------------------------------------------------------------------------------------

    def process(self, dataloader: object) -> object:
        """Return the loader to use instead of ``dataloader``; every rank must call this at the same point."""
        self._samplers = self.part = None
        self._stays_equal = False
        self._slices.clear()
        strategy = self._strategy
        within_epoch = self._progress.resumed_position > 0
        order = self._resumed.next_order() if within_epoch else None
        epoch, confirmed = self._progress.epoch, strategy.global_batch_size is not None
        loader = loaders.examine(dataloader, strategy.world_size, epoch, order, lazily=True, confirmed=confirmed)
        if isinstance(loader, loaders.Divisible):
            return self._divided(loader)
        if strategy.world_size == 1:
            return dataloader
        if isinstance(loader, loaders.Unbatched):
            self._say_undivided(dataloader, "its dataset makes the batches (`batch_size=None`)")
            return self._joined(loaders.deal_batches(loader, strategy.global_rank, strategy.world_size))
        self._say_undivided(dataloader, loader.reason)
        return self._joined(dataloader)

    def state(self) -> list[dict[str, Any]]:
        """Return the state of the loaders for a checkpoint, as plain values."""
        return loaders_state(sampler for sampler in self._samplers or ())

    def load(self, state: Any) -> None:
        """Resume from a state that :meth:`state` has returned, or from none if the checkpoint holds none."""
        self._resumed = ResumedLoaders(state)

    def _divided(self, loader: loaders.Divisible) -> DataLoader[Any]:
        strategy = self._strategy
        if loader.lists is None and not isinstance(loader.order, BroadcastOrder):  # the order follows from the epoch
            resume_exactly()
        batches = self._global_batches(loader)
        sampler = ShareBatchSampler(
            batches,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            rank=strategy.global_rank,
            plan_of=partial(self._plan_of, batches),
            begin=partial(self._begin, batches),
            original=loaders.original_batch_sampler(loader.loader),
            completion=self._completion,
        )
        note = partial(self._slices.note, id(sampler))
        resume = strategy.timer.resume
        return share_loader(loader.loader, sampler, resume, note, called_by_loop=called_by_lightning_loop)

    def _global_batches(self, loader: loaders.Divisible) -> GlobalBatches:
        strategy = self._strategy
        if loader.lists is None:
            one = loader.batch_size or 1
            size = strategy.global_batch_size or one * strategy.world_size
            # Libraries avoid a last batch of one sample by dropping it if the data leave 1 when divided by the batch
            # size. No other data leave a last global batch of one if its size is a multiple of theirs.
            return CutBatches(loader.order, size, drop_last=loader.drop_last, least=1 if size % one == 0 else 2)
        name = loader.batch_sampler
        if strategy.global_batch_size is None:
            raise UnsupportedFeatureError(
                f"`global_batch_size` must be given with your own batch sampler, got None with {name!r}: under `ddp`"
                f" each rank makes its own batches, which `hetero_ddp` cannot divide. Instead, it takes each batch of"
                f" {name!r} as a global batch and divides it among the ranks. If that is what you want, pass"
                f" HeteroDDPStrategy(global_batch_size=<size of its batches>); otherwise pass `batch_size` and a"
                f" sampler of single samples, or divide the data yourself with Trainer(use_distributed_sampler=False)."
            )
        return ListedBatches(loader.lists, strategy.global_batch_size)

    def _joined(self, dataloader: Any) -> Any:
        strategy = self._strategy
        slices = partial(self._slices.note, id(dataloader))
        count = _one if strategy.num_loss_terms is not None else samples_in
        joined: list[JoinedLoader] = []
        begin = partial(self._begin_joined, joined)
        joined.append(join_loader(dataloader, Joint(count, begin, slices, called_by_lightning_loop)))
        return joined[0]

    def _say_undivided(self, dataloader: object, reason: str) -> None:
        name = type(dataloader).__name__
        if self._strategy.shares != "auto":
            raise UnsupportedFeatureError(
                f"`shares` cannot be honoured for the training loader {name!r}: {reason}. Give each rank its part"
                f' yourself and use shares="auto", or use a DataLoader with `batch_size` over a dataset with a length.'
            )
        rank_zero_warn(
            f"`hetero_ddp` leaves the training loader {name!r} as it is, because {reason}: every rank trains on the"
            f" batches of its own loader, whatever their sizes, and nothing is balanced."
        )

    def check(self, training_step: Callable[..., Any]) -> None:
        """Check that the weight of a step's loss follows from the batches that the step is given.

        Args:
            training_step: The user's training step.

        Raises:
            UnsupportedFeatureError: The weight does not follow from them.
        """
        self._resolve()
        if self._strategy.world_size > 1 and "dataloader_iter" in inspect.signature(training_step).parameters:
            raise UnsupportedFeatureError(
                "`hetero_ddp` must know the batch of a step before the step begins, got a `training_step` that takes"
                ' `dataloader_iter`. Take `batch` instead or use strategy="ddp".'
            )

    # ---- the plan schedule -----------------------------------------------------------------------------------------

    @property
    def plan_schedule(self) -> PlanSchedule | None:
        """The plan schedule of the training; None if the training loaders are not divided, or only equally."""
        return self._schedule if self._resolve() and not self._stays_equal else None

    @plan_schedule.setter
    def plan_schedule(self, schedule: PlanSchedule) -> None:
        self._schedule = schedule

    @property
    def may_be_unequal(self) -> bool:
        """Whether the ranks have mini-batches of different sizes, now or after tuning."""
        schedule = self.plan_schedule
        if schedule is None or self._strategy.world_size == 1:
            return False
        return self._strategy.shares == "auto" or not schedule.at(self._progress.step + 1).is_equal

    def keep_equal(self, reason: str = GATHERED) -> None:
        """Keep the plan from now on, because the current step gathers its samples; all ranks call this together.

        Args:
            reason: What the step does, and why that needs equal shares, as part of a sentence.
        """
        strategy = self._strategy
        if not self._stays_equal and strategy.world_size > 1 and strategy.trainer.training:
            self._stays_equal = True
            self._completed_from = max(all_gather_counts(self.fetched_through)) + 1
            if strategy.shares == "auto":
                warn_of_inexact([reason])

    def _completion(self, step: int, size: int) -> int:
        """Return how many samples a ragged batch lacks for equal parts, as DDP repeats some; 0 if they may differ."""
        return -size % self._strategy.world_size if self._gathers(step) else 0

    def _gathers(self, step: int) -> bool:
        return self._stays_equal and step >= self._completed_from and self.counts_samples

    @property
    def limits(self) -> BatchLimits:
        """The limits that every plan must respect, in the units of the plan schedule."""
        limits, samplers = self._limits_in_samples, self._resolve()
        units = self._units(samplers)
        if limits.max_samples is not None:
            samples = sum(sampler.batches.size for sampler in samplers)
            limits = replace(limits, max_samples=tuple(cap * units // max(samples, 1) for cap in limits.max_samples))
        module = self._strategy.lightning_module
        if samplers and module is not None and normalises_batches(module):
            # in training, batch normalisation refuses a single sample
            least = replace(limits, min_samples=2)
            return least if can_divide(units, least, self._strategy.world_size) else limits
        return limits

    @property
    def _limits_in_samples(self) -> BatchLimits:
        strategy = self._strategy
        caps = arguments.caps_of_ranks("max_batch_size", strategy.max_batch_size, strategy.profiles)
        return BatchLimits(None if caps is None else tuple(caps), strategy.batch_multiple)

    @property
    def means_over_samples(self) -> bool:
        """Whether losses are taken for means over samples, not over terms that the user counts."""
        return self._strategy.num_loss_terms is None

    @property
    def counts_samples(self) -> bool:
        """Whether a plan's numbers are samples of one loader, not fractions of several loaders."""
        return len(self._resolve()) == 1

    @property
    def fetched_through(self) -> int:
        """The latest training step for which this rank has drawn its samples; -1 before the first."""
        return max((sampler.fetched_through for sampler in self._resolve()), default=-1)

    def plan_in_proportion(self, shares: Sequence[float]) -> BatchPlan:
        """Return the plan that divides the current global batch in proportion to ``shares``."""
        return self._plan(shares, self._units(self._resolve()))

    def plan_at_next_step(self) -> BatchPlan | None:
        """Return the plan of the next training step; None if there is none."""
        return None if self._schedule is None else self._schedule.at(self._progress.step + 1)

    def _units(self, samplers: Sequence[ShareBatchSampler]) -> int:
        """Return the global batch size of the plans, in their units."""
        return common_unit([sampler.batches.size for sampler in samplers])

    def _resolve(self) -> tuple[ShareBatchSampler, ...]:
        """Return the samplers of the divided loaders; make or adapt the plan schedule if they are new."""
        if self._samplers is not None:
            return self._samplers
        present, self._mode = training_loaders(self._strategy.trainer)
        divided = [loader.batch_sampler for loader in present if _is_divided(loader)]
        joined = [loader for loader in present if isinstance(loader, JoinedLoader)]
        if divided and joined:
            raise UnsupportedFeatureError(
                f"`hetero_ddp` divides either all training loaders or none, got {len(divided)} that it can divide and"
                f" {len(joined)} that it cannot (streams, `batch_size=None`, or your own samplers with"
                f' `use_distributed_sampler=False`): one weight for the loss would not be exact. Use strategy="ddp".'
            )
        if len(joined) > 1 and not all(loader.has_length for loader in joined):
            raise UnsupportedFeatureError(
                f"`hetero_ddp` needs the length of every training loader if there are several that it cannot divide,"
                f" got {sum(not loader.has_length for loader in joined)} of {len(joined)} without a length. Give their"
                f" datasets a `__len__`, or combine them into one."
            )
        if len(divided) > 1 and self._strategy.global_batch_size is not None:
            raise ConfigurationError(
                f"`global_batch_size` must be None with several training loaders, got"
                f" {self._strategy.global_batch_size} with {len(divided)}. Set the `batch_size` of each loader."
            )
        if not present:  # not all loaders are processed yet
            return ()
        self._samplers = tuple(divided)
        self._resumed.check(self._samplers, self._progress.resumed_position)
        if self._samplers:
            self._prepare_schedule(self._units(self._samplers))
            if len(self._samplers) > 1:
                assert self._schedule is not None
                check_ends(
                    self._schedule.at(self._progress.step + 1),
                    [sampler.batches for sampler in self._samplers],
                    self._mode,
                    self._limits_in_samples,
                    self._strategy.max_batch_size,
                )
        return self._samplers

    def _prepare_schedule(self, global_batch_size: int) -> None:
        """Begin a plan schedule, or adapt the existing one to other batch sizes or limits."""
        schedule, step = self._schedule, self._progress.step + 1
        if schedule is None or schedule.at(step).world_size != self._strategy.world_size:
            strategy = self._strategy  # its devices are unknown before its ranks are started
            shares = arguments.shares_of_ranks(strategy.shares, strategy.profiles) or [1.0] * strategy.world_size
            self._schedule = PlanSchedule.constant(self._plan(shares, global_batch_size))
        elif schedule.at(step).global_batch_size != global_batch_size or not keeps_limits(
            schedule.at(step), self.limits
        ):
            # the loader has another batch size, or the run is resumed under other limits
            self._schedule = schedule.with_change(step, self._plan(schedule.at(step).shares, global_batch_size))

    def _plan(self, shares: Sequence[float], global_batch_size: int) -> BatchPlan:
        limits = self.limits
        return proportional_plan(shares, global_batch_size, limits, limits.min_samples)

    # ---- drawing ---------------------------------------------------------------------------------------------------

    @property
    def _progress(self) -> TrainingProgress:
        return TrainingProgress(self._strategy.trainer)

    def _begin(self, batches: GlobalBatches) -> Cursor:
        self._resolve()
        progress = self._progress
        block = blocks_before(progress.position, len(batches), self._mode)
        return Cursor(progress.step + 1, progress.position, block)

    def _begin_joined(self, joined: Sequence[JoinedLoader]) -> Cursor:
        self._resolve()
        loader = joined[0]
        progress = self._progress
        position = progress.position if loader.has_length else progress.resumed_position
        block = blocks_before(position, len(loader) if loader.has_length else None, self._mode)
        return Cursor(progress.step + 1, position, block)

    def _plan_of(self, batches: GlobalBatches, cursor: Cursor, size: int) -> BatchPlan:
        samplers = self._resolve()
        assert self._schedule is not None
        plan = self._schedule.at(cursor.step)
        if len(samplers) < 2:
            if size == plan.global_batch_size:
                return plan
            # a stand-in would be gathered with the samples; under plain DDP, too, a rank may have one sample
            return plan_for_block(plan, size, self._limits_in_samples, 1 if self._gathers(cursor.step) else 2)
        sizes = self._sizes_in_step(samplers, cursor.position)
        plans = divide_together(plan, list(sizes.values()), self._limits_in_samples)
        return dict(zip(sizes, plans, strict=True))[id(batches)]

    def _sizes_in_step(self, samplers: Sequence[ShareBatchSampler], position: int) -> dict[int, int]:
        blocks = [(s.batches, block_in_step(position, len(s.batches), self._mode)) for s in samplers]
        return {id(batches): batches.size_at(block) for batches, block in blocks if block is not None}

    # ---- the step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Find the part of the global batch that belongs to the current step."""
        step = self._progress.step
        parts = self._slices.of(step)
        if not parts and self._strategy.world_size > 1:
            raise UnsupportedFeatureError(
                f"`hetero_ddp` needs the batch of training step {step} from the training loader, got one from"
                f" elsewhere: the numbers of samples on the other ranks are unknown."
                f' Use strategy="ddp" to fetch batches yourself.'
            )
        self.part = merge_slices(parts) if parts else None
        # a joined loader does not count samples if the loss has terms of its own, and each batch then counts as one
        counts = self.counts_samples or self._strategy.num_loss_terms is None
        self.samples_in_batch = parts[0].samples if len(parts) == 1 and counts else None


def _one(_: Any) -> int:
    """Count a batch as one sample: the weight of its loss follows from its terms."""
    return 1


def _is_divided(loader: Any) -> bool:
    return isinstance(getattr(loader, "batch_sampler", None), ShareBatchSampler)
