"""Check how several training loaders are divided together in steps with ragged batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_hetero.balance.batch.blocks import divide_together, uneven_steps
from lightning_hetero.balance.types import BatchLimits, BatchPlan
from lightning_hetero.distributed.data.global_batches import GlobalBatches
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["check_ends"]


def check_ends(
    plan: BatchPlan, loaders: Sequence[GlobalBatches], mode: str, limits: BatchLimits, max_batch_size: object
) -> None:
    """Check the steps with a ragged batch, since few samples can only be divided coarsely.

    Args:
        plan: Plan of the next step.
        loaders: The global batches of each loader.
        mode: How Lightning combines the loaders.
        limits: The limits of each rank, in samples.
        max_batch_size: The user's argument, for messages.

    Raises:
        InfeasiblePlanError: A step breaks the limits.
    """
    whole = _samples_of_ranks(plan, [loader.size for loader in loaders], limits)
    for sizes in uneven_steps(loaders, mode):
        try:
            samples, fits = _samples_of_ranks(plan, sizes, limits), True
        except InfeasiblePlanError:
            samples, fits = _samples_of_ranks(plan, sizes, BatchLimits(None, limits.batch_multiple)), False
        rank = max(range(len(samples)), key=lambda r: samples[r])
        situation = (
            f"in steps whose batches have {list(sizes)} samples, rank {rank} gets {samples[rank]} of them, because"
            f" every rank needs the same fraction of each loader's batch for the gradient to be exact"
        )
        if not fits:
            raise InfeasiblePlanError(
                f"`max_batch_size` must allow for the last batches of several loaders, got {max_batch_size}, but"
                f" {situation}. Use `drop_last=True`."
            )
        if samples[rank] > max(whole):
            rank_zero_warn(f"`hetero_ddp`: {situation}. `drop_last=True` avoids that.")


def _samples_of_ranks(plan: BatchPlan, sizes: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return each rank's number of samples, over all loaders, shape ``(world_size,)``."""
    return [sum(parts) for parts in zip(*(p.samples for p in divide_together(plan, sizes, limits)), strict=True)]
