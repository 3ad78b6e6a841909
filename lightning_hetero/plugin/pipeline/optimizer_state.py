"""Gather the state of optimisers from the stages for a checkpoint, and give each stage its part of a saved state."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lightning_hetero.distributed.pipeline.placement import TensorPlacement, gather_on_rank_zero

__all__ = ["gathered_state", "own_state"]


def gathered_state(optimizer: Optimizer, placement: TensorPlacement) -> dict[str, Any]:
    """Return the state of an optimiser for the parameters of all ranks; empty on all ranks but zero."""
    state = optimizer.state_dict()
    parts = gather_on_rank_zero(_owned(optimizer, state, placement))
    if parts is None:
        return {}
    merged = {i: value for part in reversed(parts) for i, value in part.items()}
    return {**state, "state": {i: merged[i] for i in sorted(merged)}}


def own_state(optimizer: Optimizer, saved: dict[str, Any], placement: TensorPlacement) -> dict[str, Any]:
    """Return the part of a saved state that this rank loads.

    torch puts the state of a parameter on the parameter's device. The state of another rank's parameter has no device
    here.
    """
    return {**saved, "state": _owned(optimizer, saved, placement)}


def _owned(optimizer: Optimizer, state: dict[str, Any], placement: TensorPlacement) -> dict[int, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: value for i, value in state["state"].items() if placement.owns(parameters[i])}
