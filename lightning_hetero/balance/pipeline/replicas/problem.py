"""What a search for replicas has to know: layers, ranks, memory, links, and how a batch is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import numpy as np

from lightning_hetero.balance.pipeline.stage_solver import StageMemory
from lightning_hetero.balance.pipeline.stages import LayerCosts, Schedule
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Link", "ReplicaProblem", "Wanted"]

Wanted = int | tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True)
class Link:
    """What a message takes between two ranks.

    Attributes:
        latency_s: Seconds of a message, whatever its size.
        seconds_per_byte: Further seconds per byte.
    """

    latency_s: float = 0.0
    seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        if not all(isfinite(value) and value >= 0 for value in (self.latency_s, self.seconds_per_byte)):
            raise ConfigurationError(f"The times of a link must be finite and not negative, got {self}.")

    def transfer_s(self, size_bytes: float) -> float:
        """Return the seconds of one message."""
        return self.latency_s + self.seconds_per_byte * size_bytes

    def ring_s(self, size_bytes: float, num_ranks: int) -> float:
        """Return the seconds of a ring all-reduce: every rank sends ``2 (n - 1)`` messages of an n-th of the bytes.

        Example:
            >>> from lightning_hetero.balance.pipeline.replicas.problem import Link
            >>> Link(seconds_per_byte=8e-9).ring_s(125e6, num_ranks=2)
            1.0
        """
        return 2 * (num_ranks - 1) * self.transfer_s(size_bytes / num_ranks)


@dataclass(frozen=True)
class ReplicaProblem:
    """The model, the ranks, and the training for which replicas are wanted.

    A pass of a layer with n samples takes its overhead and ``n / micro_batch_size`` times its cost.

    Attributes:
        costs: Time of every layer on every rank for a micro-batch of ``micro_batch_size`` samples, without overhead.
        samples: Number of samples of all replicas in a step; at least one per replica.
        micro_batches: Number of micro-batches per step of each replica; fewer where it has fewer samples.
        micro_batch_size: Number of samples for which ``costs``, ``output_bytes`` and the activations in ``memory`` are
            given.
        schedule: Pipeline schedule of each replica.
        overheads: Time of every pass whatever its number of samples; None if there is none.
        parameter_bytes: Size of each layer's gradients, which the replicas average; empty if that takes no time.
        output_bytes: Size of each layer's output for a micro-batch, as it crosses to the next stage; empty if messages
            take their latency only.
        memory: Memory needs of the layers and budgets of all ranks; its micro-batches and schedule are replaced by
            those of the replicas. None if memory is no limit.
        within: Link between ranks of a node.
        between: Link between nodes; None if it is no different. A ring of ranks in several nodes runs at its speed.
        nodes: Node of each rank; empty if all are in one.
        replicas: The number of replicas that is wanted; or the ranks of each, first the one that has the last stage;
            None for the best number.
    """

    costs: LayerCosts
    samples: int
    micro_batches: int = 1
    micro_batch_size: float = 1.0
    schedule: Schedule = "1f1b"
    overheads: LayerCosts | None = None
    parameter_bytes: tuple[float, ...] = ()
    output_bytes: tuple[float, ...] = ()
    memory: StageMemory | None = None
    within: Link = field(default_factory=Link)
    between: Link | None = None
    nodes: tuple[int, ...] = ()
    replicas: Wanted = None

    def __post_init__(self) -> None:
        world_size, num_layers = self.costs.world_size, self.costs.num_layers
        _check_number("samples", self.samples)
        _check_number("micro_batches", self.micro_batches)
        if not (isfinite(self.micro_batch_size) and self.micro_batch_size > 0):
            raise ConfigurationError(f"`micro_batch_size` must be positive, got {self.micro_batch_size}.")
        if self.schedule not in ("1f1b", "gpipe"):
            raise ConfigurationError(f'`schedule` must be "1f1b" or "gpipe", got {self.schedule!r}.')
        if self.overheads is not None and (self.overheads.world_size, self.overheads.num_layers) != (
            world_size,
            num_layers,
        ):
            raise ConfigurationError("`overheads` must be of the same ranks and layers as `costs`.")
        for name, of_layers in (("parameter_bytes", self.parameter_bytes), ("output_bytes", self.output_bytes)):
            if len(of_layers) not in (0, num_layers) or not all(isfinite(n) and n >= 0 for n in of_layers):
                raise ConfigurationError(
                    f"`{name}` must be one number per layer ({num_layers}), none of them negative, got {of_layers}."
                )
        of_ranks: list[tuple[str, Sequence[float]]] = [("nodes", self.nodes)] if self.nodes else []
        if self.memory is not None:
            of_ranks.append(("memory.budgets_bytes", self.memory.budgets_bytes))
            for name in ("weights_bytes", "activations_bytes"):
                if len(getattr(self.memory, name)) != num_layers:
                    raise ConfigurationError(f"`memory.{name}` must be one number per layer ({num_layers}).")
        for name, values in of_ranks:
            if len(values) != world_size:
                raise ConfigurationError(f"`{name}` must be one number per rank ({world_size}), got {len(values)}.")
        self._check_wanted()

    def _check_wanted(self) -> None:
        wanted, world_size = self.replicas, self.costs.world_size
        if wanted is None:
            return
        if isinstance(wanted, int):
            if isinstance(wanted, bool) or not 1 <= wanted <= world_size:
                raise ConfigurationError(
                    f"`replicas` must be at least 1 and at most the number of ranks, {world_size}, got {wanted}."
                )
        elif sorted(rank for group in wanted for rank in group) != list(range(world_size)) or not all(wanted):
            raise ConfigurationError(
                f"`replicas` must have each of {world_size} ranks once, and a rank in each replica, got"
                f" {[list(group) for group in wanted]}."
            )
        elif any(0 in group[1:] for group in wanted):
            raise ConfigurationError(
                f"`replicas` must have rank 0, which has a last stage, as the first of its replica, got"
                f" {[list(group) for group in wanted]}."
            )
        count = wanted if isinstance(wanted, int) else len(wanted)
        if count > self.samples:
            raise ConfigurationError(
                f"`samples` must be at least one per replica ({count}), got {self.samples}. Use fewer replicas or a"
                f" larger batch."
            )
        longest = max(map(len, wanted)) if not isinstance(wanted, int) else -(-world_size // wanted)
        if longest > self.costs.num_layers:
            raise ConfigurationError(
                f"`replicas` must have at most as many ranks as there are layers ({self.costs.num_layers}), got one"
                f" with {longest}. Use more replicas, or divide the model into more layers."
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.costs.world_size

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.costs.num_layers

    @property
    def last_ranks(self) -> frozenset[int]:
        """The ranks that must have the last stage of their replica; of other replicas, any rank may."""
        wanted = self.replicas
        return frozenset({0} if wanted is None or isinstance(wanted, int) else (group[0] for group in wanted))

    @property
    def bound_s(self) -> float:
        """Seconds per step that no plan can beat. No rank ever waits, and each computes what it is best at.

        Where every rank has one speed for all layers, that is the work of all samples divided by the sum of the speeds.
        """
        costs = np.array(self.costs.total_s)
        parts, best = self.samples / self.micro_batch_size, 0.0
        for work in (*costs, costs.mean(axis=0)):  # any amount of work per layer gives a bound
            used = work > 0
            if used.any() and (costs[:, used] > 0).all():
                best = max(best, parts * work.sum() / (work[used] / costs[:, used]).max(axis=1).sum())
        return float(best)

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return self.nodes[rank] if self.nodes else 0

    def link(self, ranks: Sequence[int]) -> Link:
        """Return the slowest link between some ranks."""
        crosses = len({self.node_of(rank) for rank in ranks}) > 1
        return self.between if crosses and self.between is not None else self.within

    def memory_of(self, ranks: Sequence[int], samples: int) -> StageMemory | None:
        """Return the needs and budgets of a replica, in its own numbering, with some samples per step."""
        if self.memory is None:
            return None
        count = min(self.micro_batches, samples)
        factor = -(-samples // count) / self.micro_batch_size  # of the largest micro-batch
        return replace(
            self.memory,
            activations_bytes=tuple(factor * size for size in self.memory.activations_bytes),
            received_bytes=tuple(factor * size for size in self.memory.received_bytes),
            budgets_bytes=tuple(self.memory.budgets_bytes[rank] for rank in ranks),
            micro_batches=count,
            schedule=self.schedule,
        )


def _check_number(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"`{name}` must be a positive whole number, got {value!r}.")
