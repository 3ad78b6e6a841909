"""Gather the state of the model and of optimisers from the stages for a checkpoint, and give each stage its part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from lightning_hetero.distributed.group.failure import failure_of_peers
from lightning_hetero.distributed.pipeline.placement import TensorPlacement, gather_on_rank_zero
from lightning_hetero.plugin.common.parts_of_model import refuse_saving
from lightning_hetero.plugin.pipeline.hooks.meeting_strategy import MeetingStrategy

__all__ = ["SavingStrategy", "gathered_state", "own_state"]


class SavingStrategy(MeetingStrategy):
    """A strategy that puts checkpoints together from the stages."""

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    @failure_of_peers()
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.keep_together()
        if self.world_size > 1 and (self._failed or super().is_alone):
            refuse_saving(self.strategy_name, None if self._failed else sys.exc_info()[1], self.on_exception)
        # the process that has spawned the ranks holds the whole model
        if self.runtime is None:
            return super().lightning_module_state_dict()
        state: dict[str, Any] = self.runtime.placement.state_dict()
        return state

    @override
    @failure_of_peers()
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.runtime.placement.load(checkpoint["state_dict"], strict=strict)

    @override
    @failure_of_peers()
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        self.keep_together()
        return optimizer.state_dict() if self.runtime is None else gathered_state(optimizer, self.runtime.placement)

    @override
    @failure_of_peers()
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        own = [
            own_state(optimizer, saved, self.runtime.placement)
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": own})


def gathered_state(optimizer: Optimizer, placement: TensorPlacement) -> dict[str, Any]:
    """Return the state of an optimiser for the parameters of all ranks; empty on all ranks but zero."""
    state = optimizer.state_dict()
    parts = gather_on_rank_zero(_those(optimizer, state, placement.counts))
    if parts is None:
        return {}
    merged = {i: value for part in reversed(parts) for i, value in part.items()}
    return {**state, "state": {i: merged[i] for i in sorted(merged)}}


def own_state(optimizer: Optimizer, saved: dict[str, Any], placement: TensorPlacement) -> dict[str, Any]:
    """Return the part of a saved state that this rank loads.

    torch puts the state of a parameter on the parameter's device. The state of another rank's parameter has no device
    here.
    """
    return {**saved, "state": _those(optimizer, saved, placement.owns)}


def _those(optimizer: Optimizer, state: dict[str, Any], wanted: Callable[[Any], bool]) -> dict[int, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: value for i, value in state["state"].items() if wanted(parameters[i])}
