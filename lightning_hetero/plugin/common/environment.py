"""Nodes with unequal numbers of devices, which Lightning's own environment refuses."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from typing_extensions import override

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["UnevenTorchrunEnvironment"]


class UnevenTorchrunEnvironment(TorchElasticEnvironment):
    """What torchrun says of the ranks; each node may have a number of its own.

    torchrun tells every process its rank and the number of all ranks, so nothing has to be computed from ``num_nodes``
    and ``devices``. Lightning's own environment requires that all nodes have the same number.
    """

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
        if num_devices != here:
            raise ConfigurationError(
                f"`devices` must be the number of processes that torchrun has started on this node ({here}), got"
                f' {num_devices}. Use Trainer(devices=int(os.environ["LOCAL_WORLD_SIZE"])), or start as many with'
                f" `--nproc-per-node`."
            )
