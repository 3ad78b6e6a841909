"""Make Lightning's ThroughputMonitor count the samples of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from lightning_hetero.balance.types import BatchSlice
from lightning_hetero.plugin.common.overridden import overridden

__all__ = ["counting_for_all_ranks"]


class _KnowsPart(Protocol):
    @property
    def part(self) -> BatchSlice | None: ...


@contextmanager
def counting_for_all_ranks(trainer: Trainer, scope: _KnowsPart) -> Iterator[None]:
    """Let monitors count a rank's equal share of each global batch in this context.

    A ThroughputMonitor counts on rank 0, and multiplies by the number of ranks.

    Args:
        trainer: The Trainer whose callbacks are changed.
        scope: What knows this rank's part of the current batch.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # public, but not annotated
    with ExitStack() as stack:
        for monitor in callbacks:
            if isinstance(monitor, ThroughputMonitor):
                for name in ("batch_size_fn", "length_fn"):
                    if (count := getattr(monitor, name)) is not None:
                        stack.enter_context(overridden(monitor, name, _OfEqualShare(count, scope)))
        yield


class _OfEqualShare:
    """Counts what a batch would hold if the global batch was divided equally."""

    def __init__(self, count: Callable[[Any], float], scope: _KnowsPart) -> None:
        self._count = count
        self._scope = scope

    def __call__(self, batch: Any) -> float:
        counted, part = self._count(batch), self._scope.part
        if part is None or part.plan.is_equal or not part.samples:
            return counted
        share = counted * part.global_samples / (part.plan.world_size * part.samples)
        return round(share) if abs(share - round(share)) < 1e-9 else share
