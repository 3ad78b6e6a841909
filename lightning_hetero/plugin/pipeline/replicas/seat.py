"""The place of a rank among the replicas of a run, and how they divide a batch."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.pipeline.stages import StagePlan
from lightning_hetero.distributed.pipeline.placement import Plan
from lightning_hetero.plugin.step.step_output import sizes_of_micro_batches

__all__ = ["Seat"]

_SIZES_KEPT = 64  # numbers of samples in use


class Seat:
    """The place of one rank; without replicas, there is one pipeline of all ranks.

    Args:
        plan: The stages, or the replicas and their stages.
        rank: This rank.

    Attributes:
        number: Number of this rank's replica. The first one also evaluates, and its last rank leads the others.
        members: The ranks of the run that belong to this replica.
        rank: This rank in the numbering of its replica.
        stages: The stages of this replica.
        leader: Rank of the last stage of the first replica.
        others: The ranks that compute the losses of the other replicas.
        pipelines: The ranks of the stages of each replica.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan = plan
        self._sizes: dict[tuple[int, int, int], tuple[list[int], range]] = {}
        self.leader, *self.others = plan.last_ranks
        if isinstance(plan, StagePlan):
            self.number, self.members, self.rank, self.stages = 0, tuple(range(plan.world_size)), rank, plan
            self.pipelines: list[list[int]] = [list(plan.ranks)]
            return
        self.number = plan.replica_of(rank)
        own = plan.replicas[self.number]
        self.members, self.rank, self.stages = own.ranks, own.ranks.index(rank), own.stages
        self.pipelines = [[one.ranks[of_stage] for of_stage in one.stages.ranks] for one in plan.replicas]

    def divide(self, plan: Plan) -> None:
        """Divide batches by a plan that differs in nothing but the shares of replicas from now on."""
        self._plan = plan
        self._sizes.clear()

    @property
    def has_replicas(self) -> bool:
        """Whether several pipelines train the model."""
        return bool(self.others)

    @property
    def first_rank(self) -> int:
        """Rank of the first stage of the first replica."""
        return self.pipelines[0][0]

    def divided(self, samples: int, micro_batches: int, least: int = 1) -> tuple[list[int], range]:
        """Return the sizes of the micro-batches of all replicas, and the numbers of those of this replica.

        The replicas get consecutive samples of the batch. The first one always gets some, so that the leader knows what
        a step returns; another one may get none.

        Args:
            samples: Number of samples in the batch.
            micro_batches: Maximum number of micro-batches of each replica.
            least: Minimum size of each micro-batch, if the replica has that many samples.
        """
        key = samples, micro_batches, least
        if key not in self._sizes:
            if len(self._sizes) == _SIZES_KEPT:
                self._sizes.clear()
            rows = [sizes_of_micro_batches(n, micro_batches, least) if n or not i else [] for i, n in self._of(samples)]
            before = sum(map(len, rows[: self.number]))
            own = range(before, before + len(rows[self.number]))
            self._sizes[key] = [size for row in rows for size in row], own
        return self._sizes[key]

    def _of(self, samples: int) -> Sequence[tuple[int, int]]:
        if isinstance(self._plan, StagePlan) or not samples:
            return [(0, samples)]
        return list(enumerate(self._plan.trained_samples(samples)))
