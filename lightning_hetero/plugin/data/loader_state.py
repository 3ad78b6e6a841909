"""The state of divided training loaders in a checkpoint, with which an epoch is resumed where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_hetero.distributed.collectives import BroadcastOrder
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["ResumedLoaders", "loaders_state"]


def loaders_state(samplers: Iterable[ShareBatchSampler]) -> list[dict[str, Any]]:
    """Return one entry of plain values per loader: its global batch size, and the random state that gave its order.

    Lightning counts the batches of an epoch, so a position means nothing with another global batch size. The orders of
    torch's own samplers follow from seed and epoch; others do not.
    """
    orders = [(sampler.batches.size, sampler.batches.order) for sampler in samplers]
    return [
        {"global_batch_size": size, "order": order.random_state if isinstance(order, BroadcastOrder) else None}
        for size, order in orders
    ]


class ResumedLoaders:
    """The loaders of an earlier run.

    Args:
        state: Return value of :func:`loaders_state` in the earlier run; anything else counts as no state.
    """

    def __init__(self, state: Any = None) -> None:
        entries = state if isinstance(state, list | tuple) else []
        self._entries = [entry if isinstance(entry, dict) else {} for entry in entries]
        self._orders_used = 0

    def next_order(self) -> Any:
        """Return the random state that gave the order of the next loader, in the order of loaders; None if unknown."""
        entry = self._entries[self._orders_used] if self._orders_used < len(self._entries) else {}
        self._orders_used += 1
        return entry.get("order")

    def check(self, samplers: Sequence[ShareBatchSampler], position: int) -> None:
        """Check that a position in the epoch means the same samples as in the earlier run.

        Args:
            samplers: Samplers of the current loaders.
            position: Number of batches of the epoch that the earlier run has trained on.

        Raises:
            ConfigurationError: The global batch size is not that of the earlier run.
        """
        if len(samplers) != len(self._entries) or not position:
            return
        before = [entry.get("global_batch_size") for entry in self._entries]
        now = [sampler.batches.size for sampler in samplers]
        if before == now or not all(isinstance(size, int) for size in before):
            return
        if len(now) > 1:
            raise ConfigurationError(
                f"The global batch sizes of the loaders must be those of the checkpoint, {before}, to resume an epoch"
                f" after {position} of its batches, got {now}: samples would be left out or repeated. Set the"
                f" `batch_size` of each loader to match, or resume from the end of an epoch."
            )
        raise ConfigurationError(
            f"`global_batch_size` must be that of the checkpoint, {before[0]}, to resume an epoch after {position} of"
            f" its batches, got {now[0]}: samples would be left out or repeated. Pass"
            f" HeteroDDPStrategy(global_batch_size={before[0]}), or resume from the end of an epoch."
        )
