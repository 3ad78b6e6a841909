r"""Predict by how much DDP's all-reduce delays a step, from the size of the gradients and the bandwidth of the link.

The model has three parts, each with its source.

- **Ring.** All :math:`W` ranks add up :math:`G` bytes in :math:`2 (W - 1)` rounds, in each of which every rank sends
  :math:`G / W` bytes to its neighbour:
  :math:`\frac{2 (W - 1)}{W} \frac{G}{\text{bandwidth}} + 2 (W - 1)\,\text{latency}` seconds (P. Patarasuk and X. Yuan,
  "Bandwidth optimal all-reduce algorithms for clusters of workstations", *J. Parallel Distrib. Comput.* 69, 2009).
- **Buckets.** DDP collects gradients in the order in which the backward pass computes them, the last parameter first,
  and closes a bucket as soon as it holds 1 MiB (the first bucket) or 25 MiB (every other one).  A parameter is never
  divided (S. Li et al., "PyTorch Distributed", *VLDB* 2020; ``torch.nn.parallel.DistributedDataParallel``,
  ``bucket_cap_mb``).
- **Overlap.** A bucket is sent when the slowest rank has computed it and the previous bucket has arrived.  The forward
  pass is a third of a rank's own time, because the backward pass costs twice as much (J. Kaplan et al., "Scaling Laws
  for Neural Language Models", 2020, section 2.1), and gradients are ready in proportion to their bytes.

With own time :math:`t` of the slowest rank, :math:`f_k` the fraction of all bytes in buckets 1 to k, and :math:`R_k`
the time of the ring for bucket k and all later ones, a step ends at
:math:`\max(t, \max_k (t (1 + 2 f_k) / 3 + R_k))`.  The last bucket is ready at the end of the backward pass, so at
least its own transfer is always exposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lightning_hetero.balance.pipeline.replicas.problem import Link
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["AllReduce", "bucket_bytes", "bucket_bytes_of_parameters", "ring_s"]

_FIRST_BUCKET_BYTES = 1024**2
_BUCKET_BYTES = 25 * 1024**2
_FORWARD_PART = 1 / 3


def ring_s(size_bytes: float, world_size: int, bits_per_s: float, latency_s: float = 0.0) -> float:
    """Return the seconds that a ring all-reduce takes; 0 on a single rank.

    Example:
        >>> ring_s(125e6, world_size=2, bits_per_s=1e9)
        1.0
    """
    return Link(latency_s, 8 / bits_per_s).ring_s(size_bytes, world_size)


def bucket_bytes(gradient_bytes: float) -> tuple[float, ...]:
    """Return the sizes of DDP's buckets, the last parameters first, if no parameter is large.

    Example:
        >>> [round(size / 1024**2) for size in bucket_bytes(60 * 1024**2)]
        [1, 25, 25, 9]
    """
    sizes, limit = [], float(_FIRST_BUCKET_BYTES)
    while gradient_bytes > limit:
        sizes.append(limit)
        gradient_bytes -= limit
        limit = float(_BUCKET_BYTES)
    return (*sizes, float(gradient_bytes))


def bucket_bytes_of_parameters(parameter_bytes: Sequence[float]) -> tuple[float, ...]:
    """Return the sizes of DDP's buckets, the last parameters first.

    Args:
        parameter_bytes: Bytes of the gradient of each parameter, in the order of ``module.parameters()``.

    Example:
        >>> bucket_bytes_of_parameters([2_432_000, 76_000, 76_000, 4])
        (2584004.0,)
    """
    sizes, size, limit = [], 0.0, _FIRST_BUCKET_BYTES
    for one in reversed(parameter_bytes):
        size += one
        if size >= limit:
            sizes.append(size)
            size, limit = 0.0, _BUCKET_BYTES
    return (*sizes, size) if size or not sizes else tuple(sizes)


@dataclass(frozen=True)
class AllReduce:
    """The all-reduce of a step's gradients.

    Attributes:
        buckets: Bytes of each bucket, in the order in which they are sent.
        bits_per_s: Bandwidth between the slowest pair of neighbours in the ring; None if transfers take no time.
        latency_s: Latency of one message between neighbours.

    Raises:
        ConfigurationError: A number is outside its range.
    """

    buckets: tuple[float, ...] = (0.0,)
    bits_per_s: float | None = None
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.buckets or min(self.buckets) < 0:
            raise ConfigurationError(f"`buckets` must be non-empty and have no negative size, got {self.buckets}.")
        if self.bits_per_s is not None and self.bits_per_s <= 0:
            raise ConfigurationError(f"`bits_per_s` must be positive, got {self.bits_per_s}.")
        if self.latency_s < 0:
            raise ConfigurationError(f"`latency_s` must not be negative, got {self.latency_s}.")

    @cached_property
    def _ready_fractions(self) -> npt.NDArray[np.float64]:
        """Fraction of the slowest rank's own time after which each bucket is ready."""
        total = sum(self.buckets)
        done = np.cumsum(self.buckets) / total if total else np.ones(len(self.buckets))
        # sums are rounded, but no bucket is ready later than the end
        return np.minimum(_FORWARD_PART + (1 - _FORWARD_PART) * done, 1.0)

    @cached_property
    def _remaining_bytes(self) -> npt.NDArray[np.float64]:
        """Bytes of each bucket and of all that are sent after it."""
        return np.cumsum(self.buckets[::-1])[::-1].astype(np.float64)

    def total_s(self, world_size: int) -> float:
        """Return the seconds per step for which the link is busy."""
        if world_size == 1:
            return 0.0
        bandwidth = float("inf") if self.bits_per_s is None else self.bits_per_s
        messages = len(self.buckets) - 1
        return ring_s(sum(self.buckets), world_size, bandwidth, self.latency_s) + messages * ring_s(
            0.0, world_size, bandwidth, self.latency_s
        )

    def step_s(self, own_s: float, world_size: int) -> float:
        """Return the seconds per step if the slowest rank needs ``own_s`` for its own work."""
        if world_size == 1 or (self.bits_per_s is None and self.latency_s == 0):
            return own_s
        rounds = 2 * (world_size - 1)
        remaining_s = self._remaining_bytes * (
            0.0 if self.bits_per_s is None else rounds / world_size * 8 / self.bits_per_s
        )
        remaining_s = remaining_s + rounds * self.latency_s * np.arange(len(self.buckets), 0, -1)
        return max(own_s, float(np.max(own_s * self._ready_fractions + remaining_s)))

    def exposed_s(self, own_s: float, world_size: int) -> float:
        """Return the seconds per step in which the slowest rank waits only for the all-reduce."""
        return self.step_s(own_s, world_size) - own_s
