"""Predict a data-parallel training on a cluster, and which of its devices to use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.tuning.advice import enough_global_batch_size, rounding_loss
from lightning_hetero.balance.types import BatchPlan
from lightning_hetero.command.plan.cluster import Cluster, DeviceKind
from lightning_hetero.command.plan.device_search import DeviceSearch
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["ClusterPlan", "DeviceSet", "KindPlan", "plan_cluster"]

# the smallest gain, as a fraction of a step, for which only some devices of a kind are used
_TOLERANCE = 0.005


@dataclass(frozen=True)
class KindPlan:
    """The work of each device of a kind in a step.

    Attributes:
        kind: Kind of device.
        min_samples: Samples of the device with the fewest.
        max_samples: Samples of the device with the most.
        step_s: Seconds per step without communication, which is the own time of the slowest device of all kinds.
    """

    kind: DeviceKind
    min_samples: int
    max_samples: int
    step_s: float

    @property
    def min_own_s(self) -> float:
        """Own time of the device with the fewest samples."""
        return self.kind.step_time.seconds(self.min_samples)

    @property
    def max_own_s(self) -> float:
        """Own time of the device with the most samples."""
        return self.kind.step_time.seconds(self.max_samples)

    @property
    def min_waiting_s(self) -> float:
        """Seconds for which the device with the most samples waits for slower ones."""
        return self.step_s - self.max_own_s

    @property
    def max_waiting_s(self) -> float:
        """Seconds for which the device with the fewest samples waits for slower ones."""
        return self.step_s - self.min_own_s


@dataclass(frozen=True)
class DeviceSet:
    """A set of devices, and the prediction for the same global batch on it.

    Attributes:
        counts: Number of devices of each kind, shape ``(kinds,)``.
        step_s: Seconds per step, including communication.
        samples_per_s: Samples per second of all devices together.
        cost_per_million_samples: Cost in the currency of the prices; None without prices.
    """

    counts: tuple[int, ...]
    step_s: float
    samples_per_s: float
    cost_per_million_samples: float | None


@dataclass(frozen=True)
class ClusterPlan:
    """The prediction for a cluster.

    Attributes:
        kinds: One entry per kind, in the order of the cluster.
        whole: Prediction for all devices.
        exposed_communication_s: Seconds per step in which even the slowest device waits for the all-reduce.
        ddp_step_s: Seconds per step with equal shares; None if they do not fit.
        ddp_does_not_fit: Reason why equal shares do not fit; None if they do.
        efficiency: Samples per second, divided by the sum of what each device would process alone, at its share.
        fastest: A set of devices that is faster than all of them by more than ``min_gain``; None if there is none.
        cheapest: The set found whose samples cost least; None without prices, or if it is the set of all devices.
        rounding: Fraction of a step that is lost because samples come in whole multiples.
        enough_global_batch_size: Global batch size at which rounding loses at most ``min_gain``; None if it does so
            already.
    """

    kinds: tuple[KindPlan, ...]
    whole: DeviceSet
    exposed_communication_s: float
    ddp_step_s: float | None
    ddp_does_not_fit: str | None
    efficiency: float
    fastest: DeviceSet | None
    cheapest: DeviceSet | None
    rounding: float
    enough_global_batch_size: int | None

    @property
    def speed_up(self) -> float | None:
        """Samples per second divided by those with equal shares; None if equal shares do not fit."""
        return None if self.ddp_step_s is None else self.ddp_step_s / self.whole.step_s


def plan_cluster(cluster: Cluster, min_gain: float = 0.05) -> ClusterPlan:
    """Predict a step of ``hetero_ddp`` on all devices, and look for better sets of devices.

    Args:
        cluster: Devices and training to predict.
        min_gain: Smallest gain that is worth mentioning, as a fraction of the samples per second.

    Raises:
        InfeasiblePlanError: The limits of the devices exclude every plan.

    Example:
        >>> from lightning_hetero.balance.types import StepTime
        >>> fast, slow = DeviceKind("fast", 1, StepTime(0, 0.001)), DeviceKind("slow", 1, StepTime(0, 0.002))
        >>> plan = plan_cluster(Cluster((fast, slow), global_batch_size=96))
        >>> [kind.max_samples for kind in plan.kinds], plan.speed_up
        ([64, 32], 1.5)
    """
    counts = tuple(kind.count for kind in cluster.kinds)
    times, limits = cluster.step_times(counts), cluster.limits(counts)
    try:
        plan = solve_batch(times, cluster.global_batch_size, limits, min_samples=1)
    except InfeasiblePlanError:  # its message lists every rank
        raise InfeasiblePlanError(_why_infeasible(cluster)) from None
    own_s = predicted_step_s(times, plan)
    whole = _device_set(cluster, counts, own_s)
    exposed_s = whole.step_s - own_s
    kinds = _kind_plans(cluster, plan, own_s)
    alone = sum(n / time.seconds(n) for time, n in zip(times, plan.samples, strict=True))
    ddp_step_s, ddp_does_not_fit = _equal_shares(cluster)
    search = DeviceSearch(cluster)
    fastest = _solve(cluster, search.fastest(_TOLERANCE))
    cheapest = _solve(cluster, search.cheapest()) if cluster.is_priced else None
    rounding = rounding_loss(times, plan, limits, exposed_s)
    return ClusterPlan(
        kinds=kinds,
        whole=whole,
        exposed_communication_s=exposed_s,
        ddp_step_s=ddp_step_s,
        ddp_does_not_fit=ddp_does_not_fit,
        efficiency=whole.samples_per_s / alone,
        fastest=fastest if fastest is not None and whole.step_s / fastest.step_s - 1 > min_gain else None,
        cheapest=cheapest if cheapest is not None and _is_cheaper(cheapest, whole) else None,
        rounding=rounding,
        enough_global_batch_size=(
            enough_global_batch_size(times, plan, limits, exposed_s, min_gain) if rounding > min_gain else None
        ),
    )


def _why_infeasible(cluster: Cluster) -> str:
    multiple, batch, size = cluster.batch_multiple, cluster.global_batch_size, cluster.world_size
    if size * multiple > batch:
        return (
            f"`global_batch_size` must give each of the {size} devices at least `batch_multiple` samples ({multiple}),"
            f" got {batch}. Raise it to {size * multiple} or more, or use fewer devices."
        )
    most = zip(cluster.kinds, cluster.most_samples, strict=True)
    held = sum(kind.count * (samples // multiple) * multiple for kind, samples in most)
    return (
        f"`max_batch_size` and the memory of the devices must together hold the global batch of {batch} samples, got"
        f" {size} devices that hold {held} in multiples of {multiple}. Lower the global batch, raise the limits, or add"
        f" devices. With `micro_batch_size` ranks process several micro-batches, so memory does not limit their share."
    )


def _solve(cluster: Cluster, counts: tuple[int, ...]) -> DeviceSet | None:
    times = cluster.step_times(counts)
    try:
        plan = solve_batch(times, cluster.global_batch_size, cluster.limits(counts), min_samples=1)
    except InfeasiblePlanError:  # the search ignores the remainder of `batch_multiple`
        return None
    return _device_set(cluster, counts, predicted_step_s(times, plan))


def _device_set(cluster: Cluster, counts: tuple[int, ...], own_s: float) -> DeviceSet:
    step_s = cluster.all_reduce.step_s(own_s, sum(counts))
    samples_per_s = cluster.global_batch_size / step_s
    cost = cluster.price_per_hour(counts) / 3600 / samples_per_s * 1e6 if cluster.is_priced else None
    return DeviceSet(counts, step_s, samples_per_s, cost)


def _is_cheaper(one: DeviceSet, other: DeviceSet) -> bool:
    return (one.cost_per_million_samples or 0.0) < (other.cost_per_million_samples or 0.0) * (1 - 1e-9)


def _kind_plans(cluster: Cluster, plan: BatchPlan, own_s: float) -> tuple[KindPlan, ...]:
    bounds = pairwise(accumulate((kind.count for kind in cluster.kinds), initial=0))
    samples = [plan.samples[start:end] for start, end in bounds]
    return tuple(
        KindPlan(kind, min(sizes), max(sizes), own_s) for kind, sizes in zip(cluster.kinds, samples, strict=True)
    )


def _equal_shares(cluster: Cluster) -> tuple[float | None, str | None]:
    """Return the seconds per step of plain DDP and None, or None and the reason why it cannot train.

    If the global batch is not divisible, equal shares differ by one sample, and the first devices have more.
    """
    fewest, more = divmod(cluster.global_batch_size, cluster.world_size)
    own_s, before = 0.0, 0
    for kind in cluster.kinds:
        samples = fewest + (before < more)
        before += kind.count
        most = kind.most_samples(cluster.memory)
        if most is not None and samples > most:
            return None, f"{kind.name} can hold {most} samples, but an equal share is {samples}"
        own_s = max(own_s, kind.step_time.seconds(samples))
    return cluster.all_reduce.step_s(own_s, cluster.world_size), None
