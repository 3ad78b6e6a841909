"""The values that the planning of a pipeline exchanges: costs of layers, and stages of layers on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal

from lightning_hetero.balance.checked import as_ints, as_list, as_mapping, entry
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["Kind", "LayerCosts", "Schedule", "StagePlan", "StageTimes", "WantedSchedule", "known_schedule"]

Schedule = Literal["gpipe", "1f1b"]
WantedSchedule = Literal["auto", "v", "gpipe", "1f1b"]
Kind = Literal["forward", "backward", "input", "weight"]


def known_schedule(wanted: WantedSchedule) -> Schedule:
    """Return the pipeline schedule that runs until an order of passes is planned, and where none is."""
    return "gpipe" if wanted == "gpipe" else "1f1b"


@dataclass(frozen=True)
class StagePlan:
    """The assignment of layers to ranks.

    The first layer of a stage may be shared: the stage before has it too, and runs it for some of the micro-batches. So
    stages can be divided more finely than between whole layers.

    Attributes:
        ranks: Rank of each stage, the first stage first.
        ends: Index of the layer after the last layer of each stage.
        lent: For each stage but the last, the micro-batches for which it also runs the first layer of the stage after
            it, in ascending order; empty if no layer is shared.
    """

    ranks: tuple[int, ...]
    ends: tuple[int, ...]
    lent: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        each_rank = len(self.ranks) == len(self.ends) > 0 and {*self.ranks} == {*range(max(self.ranks) + 1)}
        apart = all(a != b for a, b in pairwise(self.ranks))
        if not each_rank or not apart or any(a >= b for a, b in pairwise((0, *self.ends))):
            raise ConfigurationError(
                f"A pipeline must have a stage of at least one layer on each rank, and consecutive stages on different"
                f" ranks, got ranks {self.ranks} and stages that end before layers {self.ends}."
            )
        if not any(self.lent):
            object.__setattr__(self, "lent", ())  # plans that are the same are equal
        elif not self._is_lent_well():
            raise ConfigurationError(
                f"Each stage of a pipeline must run at least one layer for each micro-batch, got stages that end before"
                f" layers {self.ends} and run the next layer for micro-batches {self.lent}."
            )

    def _is_lent_well(self) -> bool:
        if len(self.lent) != self.num_stages - 1 or any(a >= b for row in self.lent for a, b in pairwise((-1, *row))):
            return False
        starts = zip((0, *self.ends), ((), *self.lent), (*self.lent, ()), self.ends, strict=False)
        return all(
            end - start > 1 or (end - start == 1 and {*before} <= {*after}) for start, before, after, end in starts
        )

    @property
    def num_stages(self) -> int:
        """Number of stages; a rank may have several."""
        return len(self.ends)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return max(self.ranks) + 1

    @property
    def num_layers(self) -> int:
        """Number of layers in all stages together."""
        return self.ends[-1]

    @property
    def shared(self) -> tuple[int, ...]:
        """The indices of the layers that two stages have."""
        return tuple(end for end, micro_batches in zip(self.ends, self.lent, strict=False) if micro_batches)

    def layers(self, stage: int, micro_batch: int | None = None) -> range:
        """Return the indices of the layers of a stage, or of those that it runs for a micro-batch in training."""
        start, end = self.ends[stage - 1] if stage else 0, self.ends[stage]
        if micro_batch is not None and self.lent:
            start += stage > 0 and micro_batch in self.lent[stage - 1]
            end += stage < len(self.lent) and micro_batch in self.lent[stage]
        return range(start, end)

    def held(self, stage: int) -> range:
        """Return the indices of the layers of a stage and of the one that it shares with the stage after it."""
        layers = self.layers(stage)
        return range(layers.start, layers.stop + bool(self.lent and stage < len(self.lent) and self.lent[stage]))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank."""
        return tuple(stage for stage, owner in enumerate(self.ranks) if owner == rank)

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """Return the indices of the layers of a rank, with those that it shares."""
        return tuple(i for stage in self.stages_of(rank) for i in self.held(stage))

    def owners_of(self, layer: int) -> tuple[int, ...]:
        """Return the ranks that hold a layer, in ascending order."""
        return tuple(sorted({rank for stage, rank in enumerate(self.ranks) if layer in self.held(stage)}))

    def nearest(self, owners: Sequence[int], rank: int) -> int:  # noqa: ARG002
        """Return which of some owners, in ascending order, gives a rank what it has not got: the first one."""
        return owners[0]

    def runner_of(self, layer: int) -> int:
        """Return the rank that runs a layer, for most of the micro-batches if two share it."""
        return next(rank for stage, rank in enumerate(self.ranks) if layer in self.layers(stage))

    @property
    def last_ranks(self) -> tuple[int, ...]:
        """The ranks that compute losses."""
        return self.ranks[-1:]

    @property
    def layers_of_ranks(self) -> tuple[int, ...]:
        """Number of layers of each rank, rank 0 first."""
        return tuple(len(self.layers_of(rank)) for rank in range(self.world_size))

    def to_dict(self) -> dict[str, Any]:
        """Return lists of plain numbers, for JSON."""
        lent = {"lent": [list(row) for row in self.lent]} if self.lent else {}
        return {"ranks": list(self.ranks), "ends": list(self.ends), **lent}

    @classmethod
    def from_dict(cls, values: Any) -> StagePlan:
        """Return the object that :meth:`to_dict` has described.

        Raises:
            ConfigurationError: ``values`` has another form.
        """
        state = as_mapping(values, "stages")
        ends = as_ints(entry(state, "ends"), "ends")
        lent = tuple(as_ints(row, "lent") for row in as_list(state.get("lent", []), "lent"))
        return cls(as_ints(entry(state, "ranks"), "ranks", len(ends)), ends, lent)


@dataclass(frozen=True)
class LayerCosts:
    """The time that each rank needs for each layer and one micro-batch.

    Attributes:
        forward_s: Seconds of each forward pass, shape ``(world_size, num_layers)``.
        backward_s: Seconds of each backward pass, shape ``(world_size, num_layers)``.
        input_s: Seconds of the first part of each backward pass if it is split; empty if none can be.
        weight_s: Seconds of the second part, which computes gradients of parameters, for which no other rank waits; 0
            for layers whose backward pass is whole, and empty if none can be split.
    """

    forward_s: tuple[tuple[float, ...], ...]
    backward_s: tuple[tuple[float, ...], ...]
    input_s: tuple[tuple[float, ...], ...] = ()
    weight_s: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of_speeds(cls, layers: Sequence[tuple[float, float]], speeds: Sequence[float]) -> LayerCosts:
        """Return the costs of ranks that each have one speed for all layers.

        Args:
            layers: Forward and backward seconds of each layer on a device of speed 1.
            speeds: Speed of each rank.
        """
        return cls(
            tuple(tuple(forward / speed for forward, _ in layers) for speed in speeds),
            tuple(tuple(backward / speed for _, backward in layers) for speed in speeds),
        )

    def times(self, factors: Sequence[float]) -> LayerCosts:
        """Return the costs of ranks that take ``factors`` times as long, shape ``(world_size,)``."""
        return LayerCosts(
            *(
                tuple(tuple(f * s for s in row) for f, row in zip(factors, rows, strict=True))
                for rows in (self.forward_s, self.backward_s, self.input_s, self.weight_s)
                if rows
            )
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.forward_s)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.forward_s[0])

    @cached_property
    def total_s(self) -> tuple[tuple[float, ...], ...]:
        """Forward and backward seconds together, shape ``(world_size, num_layers)``."""
        return tuple(
            tuple(a + b for a, b in zip(forward, backward, strict=True))
            for forward, backward in zip(self.forward_s, self.backward_s, strict=True)
        )

    @cached_property
    def until_s(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of the layers before each one, and of all, shape ``(world_size, num_layers + 1)``."""
        return tuple((0.0, *accumulate(row)) for row in self.total_s)

    @cached_property
    def forward_until_s(self) -> tuple[tuple[float, ...], ...]:
        """Forward seconds of the layers before each one, and of all, shape ``(world_size, num_layers + 1)``."""
        return tuple((0.0, *accumulate(row)) for row in self.forward_s)

    def of_stages(self, plan: StagePlan) -> StageTimes:
        """Return the time of each stage of a plan for one micro-batch."""
        stages = [(rank, plan.layers(stage)) for stage, rank in enumerate(plan.ranks)]
        return StageTimes(
            tuple(sum(self.forward_s[rank][i] for i in layers) for rank, layers in stages),
            tuple(sum(self.backward_s[rank][i] for i in layers) for rank, layers in stages),
        )


@dataclass(frozen=True)
class StageTimes:
    """The time that each stage needs for one micro-batch, the first stage first.

    Attributes:
        forward_s: Seconds of the forward pass in each stage.
        backward_s: Seconds of the backward pass in each stage.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]

    @property
    def slowest_s(self) -> float:
        """Forward and backward seconds of the slowest stage."""
        return max(a + b for a, b in zip(self.forward_s, self.backward_s, strict=True))
