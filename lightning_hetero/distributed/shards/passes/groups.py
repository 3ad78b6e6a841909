"""The process groups of the engine: its own, because what the user's code exchanges must not come between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_hetero.distributed.host_group import host_group

__all__ = ["Groups"]


@dataclass(frozen=True)
class Groups:
    """Process groups of all ranks.

    Attributes:
        forward: Gathers parameters in forward passes.
        backward: Gathers and reduces in backward passes. It is another group on hosts, so that what ranks in different
            passes send does not meet. On devices it is the same: each group takes memory of the device.
        hosts: Lets hosts agree, so that none of them waits for its device.
    """

    forward: Any
    backward: Any
    hosts: Any

    @classmethod
    def make(cls, device: torch.device) -> Groups:
        """Make the groups of ranks whose devices are of this kind; every rank must call this at the same point."""
        forward: Any = dist.new_group()
        if device.type == "cpu":
            return cls(forward, dist.new_group(), dist.new_group())
        return cls(forward, forward, host_group())

    def close(self) -> None:
        """End those that belong to the engine alone."""
        dist.destroy_process_group(self.forward)
        if self.backward is not self.forward:
            dist.destroy_process_group(self.backward)
            dist.destroy_process_group(self.hosts)
