"""torchrun for ``faults/job.py``, forked with its ranks from the server of ``harness``, which has imported Lightning.

Agent, rendezvous, restarts and command line are torchrun's own.  Only the start of processes differs: a new interpreter
imports torch and Lightning again on every rank in every attempt, which takes longer than the job itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed.run
from harness import share_server
from scripts import print_to


def train(argument: str, output: str) -> None:
    """Run the job on this rank, which the server has forked: what the agent has of files and folders, it has not."""
    import faults.job  # the agent needs no Lightning

    print_to(Path(output), Path(output))
    os.chdir(Path(output).parent)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    faults.job.train(argument)


def run(arguments: Sequence[str]) -> None:
    """Run torchrun with a function in place of the script; the last argument is that of the job."""
    share_server()
    config_from_args = torch.distributed.run.config_from_args
    output = str(Path("/proc/self/fd/1").readlink())

    def forked(args: Any) -> tuple[Any, Any, list[str]]:
        config, _, of_script = config_from_args(args)
        config.start_method = "forkserver"
        return config, train, [of_script[-1], output]

    torch.distributed.run.config_from_args = forked
    torch.distributed.run.main(list(arguments))
