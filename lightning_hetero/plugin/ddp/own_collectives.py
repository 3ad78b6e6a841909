"""Decide what happens if a step calls collectives itself, which count ranks and not samples."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.distributed.collective_watch import Collective
from lightning_hetero.distributed.collectives import all_gather
from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.data.evaluation_data import EvaluationData
from lightning_hetero.plugin.data.training_data import TrainingData

__all__ = ["OwnCollectives"]


class OwnCollectives:
    """What to do about the collectives that a module, a callback or a library calls itself in the hooks of a batch.

    Such a collective gathers mini-batches, or averages over ranks. Under plain DDP all mini-batches are equal, so that
    is right; with unequal ones torch ends the process, or the result is another one.

    Args:
        train_data: The training loaders, whose shares then stay equal.
        eval_data: The loaders of validation and test, whose shares then stay equal.
    """

    def __init__(self, train_data: TrainingData, eval_data: EvaluationData) -> None:
        self._train_data = train_data
        self._eval_data = eval_data
        self._warned: set[str] = set()
        self._reason = ""

    def begin(self) -> None:
        """Begin a run: what an earlier one has called says nothing about this one."""
        self._reason = ""
        self._eval_data.stays_equal = False

    def in_training(self, plan: BatchPlan, collective: Collective) -> None:
        """Note a collective in a batch of the training.

        Raises:
            UnsupportedFeatureError: The mini-batches are unequal, so the result would be wrong.
        """
        batch_shaped = any(n in tensor.shape for tensor in collective.tensors for n in plan.samples if n > 1)
        if plan.is_equal:
            if collective.is_floating or batch_shaped:
                self._reason = self._reason or _reason(collective)
                if collective.is_of_all_ranks:
                    self._train_data.keep_equal(self._reason)
            return
        if not collective.is_floating and not _shapes_differ(collective):
            return  # counts, seeds, texts
        raise UnsupportedFeatureError(
            f"A training step with unequal mini-batches must not call collectives itself, because they count ranks and"
            f" not samples, got {_what(collective)} with mini-batches of {list(plan.samples)} samples. Use equal"
            f" shares, for example HeteroDDPStrategy(shares={[1] * plan.world_size}), with `drop_last=True` if this is"
            f' an epoch\'s last batch, or strategy="ddp".'
        )

    def after_first_batch(self) -> None:
        """Tell all ranks what only some have called, in a group of their own; all ranks call this together."""
        reasons = [reason for reason in all_gather(self._reason) if reason]
        if reasons:
            self._train_data.keep_equal(reasons[0])

    def in_evaluation(self, samples: Sequence[int], collective: Collective) -> None:
        """Note a collective in a batch of an evaluation, or at the end of an epoch.

        Args:
            samples: Number of samples of each rank, in the batch or in the epoch.
            collective: The collective.

        Raises:
            UnsupportedFeatureError: The ranks' tensors have different shapes, so torch would end the process.
        """
        if len(set(samples)) < 2:
            self._eval_data.stays_equal = True
            return
        if _shapes_differ(collective):
            raise UnsupportedFeatureError(
                f"Collectives need tensors of one shape, got {_what(collective)} where the ranks have {list(samples)}"
                f" samples. Pad the tensors, use `torch.distributed.all_gather_object`, or use equal shares, for"
                f" example HeteroDDPStrategy(shares={[1] * len(samples)}), and `drop_last=True`."
            )
        if collective.is_floating and collective.line not in self._warned:
            self._warned.add(collective.line)
            rank_zero_warn(
                f"`hetero_ddp`: {_what(collective)} counts ranks and not samples, where the ranks have {list(samples)}"
                f" samples. A mean over ranks is then not the mean over samples. Log the value in the step with"
                f" `self.log(..., sync_dist=True)`, or use a metric of torchmetrics."
            )


def _what(collective: Collective) -> str:
    return f"`{collective.name or 'a collective'}` in {collective.line}"


def _reason(collective: Collective) -> str:
    return (
        f"collectives that a training step calls itself ({_what(collective)}), because they count ranks and not"
        f" samples: the shares stay equal, as under strategy='ddp'"
    )


def _shapes_differ(collective: Collective) -> bool:
    """Return whether the ranks' tensors cannot be combined; all ranks of the group call this together."""
    if not collective.needs_one_shape or collective.shapes_agree:
        return False
    of_ranks = all_gather([tuple(tensor.shape) for tensor in collective.tensors], collective.group)
    return any(shapes != of_ranks[0] for shapes in of_ranks)
