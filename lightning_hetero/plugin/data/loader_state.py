"""What a checkpoint tells of divided training loaders, so that an epoch is resumed where it was left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_hetero.distributed.collectives import BroadcastOrder
from lightning_hetero.distributed.data.share_sampler import ShareBatchSampler
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["ResumedLoaders", "loaders_state"]


def loaders_state(samplers: Iterable[ShareBatchSampler]) -> list[dict[str, Any]]:
    """Return plain values, one entry a loader: its global batch, and from what random numbers its order was drawn.

    Lightning counts the batches of an epoch, so a position means nothing under another global batch; and torch's own
    orders follow from seed and epoch, others do not.
    """
    orders = [(sampler.batches.size, sampler.batches.order) for sampler in samplers]
    return [
        {"global_batch_size": size, "order": order.random_state if isinstance(order, BroadcastOrder) else None}
        for size, order in orders
    ]


class ResumedLoaders:
    """The loaders of an earlier run.

    Args:
        state: what :func:`loaders_state` has returned; anything else is taken for nothing.
    """

    def __init__(self, state: Any = None) -> None:
        entries = state if isinstance(state, list | tuple) else []
        self._entries = [entry if isinstance(entry, dict) else {} for entry in entries]
        self._orders_used = 0

    def next_order(self) -> Any:
        """Return from what the order of the next loader was drawn, in the order of loaders; None where not known."""
        entry = self._entries[self._orders_used] if self._orders_used < len(self._entries) else {}
        self._orders_used += 1
        return entry.get("order")

    def check(self, samplers: Sequence[ShareBatchSampler], position: int) -> None:
        """Check that a position in the epoch means the same samples.

        Args:
            samplers: those of the present loaders.
            position: how many batches of the epoch the earlier run has trained on.

        Raises:
            ConfigurationError: the global batch is another one.
        """
        if len(samplers) != len(self._entries) or not position:
            return
        before = [entry.get("global_batch_size") for entry in self._entries]
        now = [sampler.batches.size for sampler in samplers]
        if before == now or not all(isinstance(size, int) for size in before):
            return
        if len(now) > 1:
            raise ConfigurationError(
                f"The global batch of each loader must be that of the checkpoint where an epoch is resumed after"
                f" {position} of its batches, {before}, got {now}: samples would be left out or repeated. Set the"
                f" `batch_size` of each loader to match, or resume from the end of an epoch."
            )
        raise ConfigurationError(
            f"`global_batch_size` must be that of the checkpoint where an epoch is resumed after {position} of its"
            f" batches, {before[0]}, got {now[0]}: samples would be left out or repeated. Pass"
            f" HeteroDDPStrategy(global_batch_size={before[0]}), or resume from the end of an epoch."
        )
