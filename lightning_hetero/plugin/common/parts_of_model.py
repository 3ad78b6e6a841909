"""What a strategy refuses and leaves out because each rank has only a part of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_hetero.exceptions import RankFailedError
from lightning_hetero.plugin.common.overridden import overridden

__all__ = ["not_moved_to_cpu", "refuse_saving", "why_not_with"]

_log = logging.getLogger(__name__)


def why_not_with(callback: Callback, world_size: int) -> str | None:
    """Return why a callback cannot be used where each rank has only a part of the model; None if it can."""
    name = type(callback).__name__
    if world_size > 1 and (
        isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
    ):
        return (
            f"{name} saves after a rank has failed, when the parts of other ranks may be gone; save during training"
            f" instead, with ModelCheckpoint(every_n_train_steps=...)"
        )
    if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
        return f"{name} copies the whole model, of which each rank has only a part"
    return None


def refuse_saving(
    strategy: str, failure: BaseException | None, on_exception: Callable[[BaseException], None]
) -> NoReturn:
    """Refuse to save after a run has failed.

    Args:
        strategy: Name of the strategy.
        failure: Error that is being handled if a callback saves before Lightning has told the strategy; None otherwise.
        on_exception: Function that tells the strategy of the error.

    Raises:
        RankFailedError: The strategy already knows that the run has failed.
        BaseException: ``failure`` itself. The callback must not continue as if it had saved, and the user should
            finally see why the run failed.
    """
    reason = (
        f"`{strategy}` cannot save after a run has failed: the parts of other ranks may be gone. Save during"
        f" training instead, with ModelCheckpoint(every_n_train_steps=...)."
    )
    if failure is None:
        raise RankFailedError(reason)
    on_exception(failure)
    _log.error(reason)
    raise failure


@contextmanager
def not_moved_to_cpu(module: nn.Module) -> Iterator[None]:
    """Leave a module where it is in this context, even if it is told to move to the CPU.

    The peers of a failed rank may never send their parts of the model, so it cannot be moved as a whole.
    """
    with overridden(module, "cpu", lambda: module):
        yield
