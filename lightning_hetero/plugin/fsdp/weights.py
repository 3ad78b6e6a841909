"""Find how much of the model each rank holds, from the memory of the devices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_hetero.balance.shards.memory import ModelMemory, RankMemory, weights_by_memory
from lightning_hetero.distributed.collectives import all_gather_numbers
from lightning_hetero.distributed.shards.units import plan_units
from lightning_hetero.hardware.memory import MemoryMeter

__all__ = ["model_memory", "weights_of_memory"]

# the parameter, its gradient, and the two states of Adam and its variants
_NUMBERS_PER_TRAINED = 4
_USABLE = 0.92  # of the memory of a device, as LoadBalancer assumes


def model_memory(root: nn.Module, units: Sequence[nn.Module]) -> ModelMemory:
    """Return the memory that a model takes in shards, with an optimiser that keeps two numbers per parameter."""
    sizes = []
    sharded = 0
    for unit in plan_units(root, units):
        parameters = [planned.places[0].get() for planned in unit.parameters]
        sizes.append(sum(p.numel() * p.element_size() for p in parameters))
        sharded += sum(
            p.numel() * p.element_size() * (_NUMBERS_PER_TRAINED if p.requires_grad else 1) for p in parameters
        )
    of_root, *others = sizes
    # two units are whole at a time; while one is reduced, its gradients are whole too, twice
    largest = sorted(others or [of_root])[-2:]
    return ModelMemory(sharded, of_root + sum(largest) + 2 * largest[-1])


def weights_of_memory(
    model: ModelMemory, memory: MemoryMeter | None, activation_bytes: float, ranks: int
) -> tuple[float, ...]:
    """Return one weight per rank: the memory that is left for its shard, and equal weights if it is unknown.

    Every rank must call this at the same point.

    Args:
        model: What the model takes.
        memory: Meter of this rank's device; None for a processor, whose memory ranks share.
        activation_bytes: Memory of the activations of this rank's samples.
        ranks: Number of ranks.

    Raises:
        InfeasiblePlanError: The model does not fit.
    """
    use = memory.read() if memory is not None else None
    free = all_gather_numbers(0.0 if use is None else _USABLE * use.available_bytes)
    activations = all_gather_numbers(activation_bytes)
    if not all(free):
        return (1.0,) * ranks
    of_ranks = [RankMemory(have, need) for have, need in zip(free, activations, strict=True)]
    return weights_by_memory(of_ranks, model)
