"""torchrun for ``faults/job.py``, whose ranks are forked from a server that has imported torch and Lightning.

Agent, rendezvous, restarts and command line are torchrun's own.  Only the start of ranks differs: a script imports
Lightning again on every rank in every attempt, which takes longer than the job itself.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch.distributed.run
from harness import PRELOADED


def train(argument: str) -> None:
    """Run the job on this rank."""
    import faults.job  # the agent needs no Lightning

    faults.job.train(argument)


def main() -> None:
    """Run torchrun with a function in place of the script; the last argument is that of the job."""
    from faults import torchrun  # as ranks find it, where this file is no script

    multiprocessing.set_forkserver_preload(PRELOADED)
    config_from_args = torch.distributed.run.config_from_args

    def forked(args: Any) -> tuple[Any, Any, list[str]]:
        config, _, arguments = config_from_args(args)
        config.start_method = "forkserver"
        return config, torchrun.train, arguments[-1:]

    torch.distributed.run.config_from_args = forked
    torch.distributed.run.main()


if __name__ == "__main__":
    main()
