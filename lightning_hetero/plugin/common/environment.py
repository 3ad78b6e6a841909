"""Support nodes with unequal numbers of devices, which Lightning's own environment refuses."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from typing_extensions import override

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["UnevenTorchrunEnvironment", "differs_from_torchrun"]


def differs_from_torchrun(num_devices: int, num_nodes: int) -> bool:
    """Return whether ``num_nodes`` nodes with ``num_devices`` ranks each are not what torchrun has started.

    Either the nodes have different numbers of ranks, or the Trainer was given wrong ones.
    """
    started = int(os.environ.get("WORLD_SIZE", num_devices * num_nodes))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
    return num_devices > 0 and (num_devices * num_nodes != started or num_devices != here)


class UnevenTorchrunEnvironment(TorchElasticEnvironment):
    """The environment that torchrun sets up, in which each node may have its own number of ranks.

    torchrun tells every process its rank and the world size, so neither has to be computed from ``num_nodes`` and
    ``devices``. Lightning's own environment requires the same number of ranks on all nodes.
    """

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
        if num_devices != here:
            raise ConfigurationError(
                f"`devices` must be the number of processes that torchrun has started on this node ({here}), got"
                f' {num_devices}. Use Trainer(devices=int(os.environ["LOCAL_WORLD_SIZE"])), or start {num_devices}'
                f" processes with `--nproc-per-node`."
            )
