"""The assignment of ranks to replicas, of layers to the ranks of each, and of the batch to the replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.checked import as_float, as_ints, as_list, as_mapping, entry
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Replica", "ReplicaPlan"]


@dataclass(frozen=True)
class Replica:
    """One pipeline among several that train the same model.

    Attributes:
        ranks: The ranks of the run that belong to this replica. Its stages number them in this order, from 0.
        stages: The layers of the replica's ranks, in the replica's own numbering of ranks.
        share: Proportion of each batch that this replica trains on, relative to the shares of the other replicas.
    """

    ranks: tuple[int, ...]
    stages: StagePlan
    share: float

    def __post_init__(self) -> None:
        if len(self.ranks) != self.stages.world_size or len({*self.ranks}) != len(self.ranks):
            raise ConfigurationError(
                f"A replica must have as many ranks as its stages use, each once, got ranks {self.ranks} for stages on"
                f" {self.stages.world_size}."
            )
        if not (isfinite(self.share) and self.share > 0):
            raise ConfigurationError(f"The share of a replica must be a finite positive number, got {self.share}.")

    @property
    def last_rank(self) -> int:
        """The rank of the run that has the replica's last stage and computes its losses."""
        return self.ranks[self.stages.ranks[-1]]

    def costs(self, of_all: LayerCosts) -> LayerCosts:
        """Return the costs of this replica's ranks, in its own numbering, from those of all ranks of the run."""
        rows = (of_all.forward_s, of_all.backward_s, of_all.input_s, of_all.weight_s)
        return LayerCosts(*(tuple(row[rank] for rank in self.ranks) if row else () for row in rows))


@dataclass(frozen=True)
class ReplicaPlan:
    """The replicas of a run. Each rank belongs to one of them.

    Attributes:
        replicas: The replicas. Rank 0 has the last stage of the first one, so that it computes losses.
    """

    replicas: tuple[Replica, ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for replica in self.replicas for rank in replica.ranks)
        if not ranks or ranks != list(range(len(ranks))):
            raise ConfigurationError(
                "Each rank must belong to one replica, got replicas of the ranks"
                f" {[list(replica.ranks) for replica in self.replicas]}."
            )
        if len({replica.stages.num_layers for replica in self.replicas}) > 1:
            raise ConfigurationError(
                "All replicas must have the same layers, got"
                f" {[replica.stages.num_layers for replica in self.replicas]} layers."
            )
        if self.replicas[0].last_rank != 0:
            raise ConfigurationError(
                f"Rank 0 must have the last stage of the first replica, got rank {self.replicas[0].last_rank}."
            )

    @property
    def world_size(self) -> int:
        """Number of ranks of the run."""
        return sum(len(replica.ranks) for replica in self.replicas)

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return self.replicas[0].stages.num_layers

    @property
    def last_ranks(self) -> tuple[int, ...]:
        """The rank that computes the losses of each replica."""
        return tuple(replica.last_rank for replica in self.replicas)

    def replica_of(self, rank: int) -> int:
        """Return the number of the replica to which a rank belongs."""
        return next(number for number, replica in enumerate(self.replicas) if rank in replica.ranks)

    def owners_of(self, layer: int) -> tuple[int, ...]:
        """Return the ranks that hold a layer, in ascending order: at least one per replica."""
        return tuple(
            sorted(
                rank
                for replica in self.replicas
                for own, rank in enumerate(replica.ranks)
                if layer in replica.stages.layers_of(own)
            )
        )

    def nearest(self, owners: Sequence[int], rank: int) -> int:
        """Return which of some owners, in ascending order, gives a rank what it has not got: one of its replica."""
        own = self.replicas[self.replica_of(rank)].ranks
        return next((owner for owner in owners if owner in own), owners[0])

    def runner_of(self, layer: int) -> int:
        """Return the rank of the first replica that runs a layer."""
        first = self.replicas[0]
        return first.ranks[first.stages.runner_of(layer)]

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Return the indices of the layers of a rank."""
        replica = self.replicas[self.replica_of(rank)]
        return replica.stages.layers_of(replica.ranks.index(rank))

    @property
    def shared(self) -> tuple[int, ...]:
        """The indices of layers that two stages of one replica have."""
        return tuple(sorted({layer for replica in self.replicas for layer in replica.stages.shared}))

    def samples(self, total: int) -> tuple[int, ...]:
        """Return how many of a batch's ``total`` samples each replica trains on; of a small batch, perhaps none."""
        return _divided(tuple(replica.share for replica in self.replicas), total)

    def trained_samples(self, total: int) -> tuple[int, ...]:
        """Return the same, but the first replica always gets some, so that rank 0 knows what a step returns."""
        found = list(self.samples(total))
        if not found[0]:
            found[found.index(max(found))] -= 1
            found[0] = 1
        return tuple(found)

    def is_redivision_of(self, other: object) -> bool:
        """Return whether nothing but the shares differs from another plan."""
        if not isinstance(other, ReplicaPlan) or self == other:
            return False
        ours, theirs = ([(one.ranks, one.stages) for one in plan.replicas] for plan in (self, other))
        return ours == theirs

    def to_dict(self) -> dict[str, Any]:
        """Return lists of plain numbers, for JSON."""
        return {
            "replicas": [
                {"ranks": list(replica.ranks), "stages": replica.stages.to_dict(), "share": replica.share}
                for replica in self.replicas
            ]
        }

    @classmethod
    def from_dict(cls, values: Any) -> ReplicaPlan:
        """Return the object that :meth:`to_dict` has described.

        Raises:
            ConfigurationError: ``values`` has another form.
        """
        rows: Sequence[Any] = as_list(entry(as_mapping(values, "plan"), "replicas"), "replicas")
        states = [as_mapping(row, "replica") for row in rows]
        return cls(
            tuple(
                Replica(
                    as_ints(entry(state, "ranks"), "ranks"),
                    StagePlan.from_dict(entry(state, "stages")),
                    as_float(entry(state, "share"), "share"),
                )
                for state in states
            )
        )


@lru_cache(maxsize=256)
def _divided(shares: tuple[float, ...], total: int) -> tuple[int, ...]:
    return proportional_plan(shares, total).samples
