"""Find the weights of shards from the memory of the ranks, or say by how much a model does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["ModelMemory", "RankMemory", "weights_by_memory"]


@dataclass(frozen=True)
class RankMemory:
    """What a rank has and needs besides its shard.

    Attributes:
        free_bytes: Memory that the training may use on the rank's device.
        activation_bytes: Memory that the activations of the rank's samples take.
    """

    free_bytes: float
    activation_bytes: float = 0.0


@dataclass(frozen=True)
class ModelMemory:
    """What a model takes.

    Attributes:
        sharded_bytes: Memory of all shards together: parameters, gradients and states of the optimiser.
        gathered_bytes: Memory of the largest two units and the root on every rank, while they are whole.
    """

    sharded_bytes: float
    gathered_bytes: float


def weights_by_memory(ranks: Sequence[RankMemory], model: ModelMemory) -> tuple[float, ...]:
    """Return one weight per rank: the memory that the rank has left for its shard.

    Args:
        ranks: One entry per rank.
        model: What the model takes.

    Raises:
        InfeasiblePlanError: The ranks together have less left than the shards take, or a rank cannot even hold its
            activations and the gathered units. The message says how much is missing, and what would fit.
    """
    left = [rank.free_bytes - rank.activation_bytes - model.gathered_bytes for rank in ranks]
    for number, (rank, rest) in enumerate(zip(ranks, left, strict=True)):
        if rest < 0:
            raise InfeasiblePlanError(
                f"`shard_weights` cannot be found: rank {number} has {_gb(rank.free_bytes)} of memory, but its"
                f" activations ({_gb(rank.activation_bytes)}) and the units that are whole at a time"
                f" ({_gb(model.gathered_bytes)}) take {_gb(-rest)} more.{_batch_that_fits(ranks, model)} Lower its"
                f" share or the batch size, make the units smaller with `units`, or leave the device out."
            )
    if sum(left) < model.sharded_bytes:
        fits = sum(left) / model.sharded_bytes
        raise InfeasiblePlanError(
            f"`shard_weights` cannot be found: parameters, gradients and states of the optimiser take"
            f" {_gb(model.sharded_bytes)}, but the ranks have only {', '.join(map(_gb, left))} left, so"
            f" {_gb(model.sharded_bytes - sum(left))} are missing. A model of {fits:.0%} of the size would fit."
            f"{_batch_that_fits(ranks, model)} Add a device, lower the batch size, or use an optimiser with a smaller"
            f" state."
        )
    return tuple(left)


def _batch_that_fits(ranks: Sequence[RankMemory], model: ModelMemory) -> str:
    """Return a sentence about the largest batch that would fit; empty if none would, or if nothing is known of it."""
    room = [rank.free_bytes - model.gathered_bytes for rank in ranks]
    activations = [rank.activation_bytes for rank in ranks]
    if not sum(activations):
        return ""
    by_rank = [have / need for have, need in zip(room, activations, strict=True) if need]
    part = min(*by_rank, (sum(room) - model.sharded_bytes) / sum(activations), 1.0)
    return f" A batch of {part:.0%} of the size would fit." if part > 0 else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
