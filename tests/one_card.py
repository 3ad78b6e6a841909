"""Put the ranks of the harness on one CUDA device, where they communicate through NCCL.

NCCL refuses two ranks on one device of one host.  ``NCCL_HOSTID`` gives each rank a host of its own, so that they talk
through sockets: slow, but the same calls, streams and orders as on cards of their own.
"""

from __future__ import annotations

import functools
import os
from typing import Any

VARIABLE = "LIGHTNING_HETERO_TESTS_ON_CARD"


def is_wanted() -> bool:
    """Return whether the environment asks for the card."""
    return os.environ.get(VARIABLE, "") not in {"", "0"}


def take_card(rank: int, world_size: int) -> None:
    """Make this process a rank on the card; every Trainer of all ranks on processors is one on the card from now on."""
    from lightning_hetero.command.check.layout import Layout  # with it Lightning, which not every server has imported

    card = Layout("cuda", devices=(0,), names=("",), ranks=world_size)
    os.environ.update(card.environment(rank, int(os.environ["MASTER_PORT"]), {}))
    import torch
    import torch.distributed as dist
    from lightning.pytorch import Trainer

    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=rank, world_size=world_size)
    original = Trainer.__init__

    @functools.wraps(original)
    def on_card(self: Any, *args: Any, **settings: Any) -> None:
        if settings.get("accelerator") == "cpu" and "strategy" in settings and settings.get("devices") == world_size:
            settings.update(accelerator="gpu", devices=1, num_nodes=world_size)
        original(self, *args, **settings)

    Trainer.__init__ = on_card  # type: ignore[method-assign]
