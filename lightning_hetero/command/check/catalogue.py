"""All checks, in the order in which they run; the functions that ranks run are named, so that none is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lightning_hetero.command.check.ended import Ended, judge_failure
from lightning_hetero.command.check.finding import Finding
from lightning_hetero.command.check.layout import Layout
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["CHECKS", "ENVIRONMENT", "Check", "named"]

_CHILDREN = "lightning_hetero.command.check.children"


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: Name on the command line.
        title: What it checks, in one line.
        call: Function that each rank runs, as ``module:function``.
        cards: Number of CUDA devices that it needs.
        processor: Whether it can run on the processor.
        nccl: Whether it needs NCCL on CUDA devices, even if its ranks share one.
        alone: Whether one process runs it, without a process group.
        judge: Function that judges how the ranks have ended; by default they judge themselves.
        last_stays: Whether the last rank is not expected to end.
        limit_s: Seconds after which it has failed.
    """

    name: str
    title: str
    call: str
    cards: int = 1
    processor: bool = True
    nccl: bool = False
    alone: bool = False
    judge: Callable[[Sequence[Ended]], Finding] | None = None
    last_stays: bool = False
    limit_s: float = 180.0

    def why_not(self, layout: Layout) -> str:
        """Return why it cannot be run in a layout; empty if it can."""
        if layout.kind == "cpu":
            return "" if self.processor else f"needs {_cards(self.cards)}"
        return "" if layout.cards >= self.cards else f"needs {_cards(self.cards)}, got one"


def _cards(count: int) -> str:
    return "a CUDA device" if count == 1 else "two CUDA devices"


ENVIRONMENT = Check(
    "environment",
    "every device runs a kernel; NVIDIA's driver, asked by UUID, and torch agree on its memory",
    f"{_CHILDREN}.environment:environment",
    alone=True,
)

CHECKS = (
    ENVIRONMENT,
    Check("exact", "hetero_ddp with unequal shares trains as ddp, in float64", f"{_CHILDREN}.exactness:exact"),
    Check(
        "sync-batch-norm",
        "synchronised batch normalisation with a rank without samples, in bf16, trains as ddp",
        f"{_CHILDREN}.exactness:synchronised_batch_norm",
        processor=False,
    ),
    Check("own-time", "a step of known time is measured right, and waiting is left out", f"{_CHILDREN}.speed:own_time"),
    Check(
        "balancer-cost",
        "steps take as long with a LoadBalancer as without",
        f"{_CHILDREN}.speed:balancer_cost",
        limit_s=300.0,
    ),
    Check(
        "equal-ranks",
        "equal ranks whose hosts are slower than their devices keep equal shares",
        f"{_CHILDREN}.speed:equal_ranks",
        cards=2,
    ),
    Check(
        "best-shares",
        "the shares that are found are as fast as the best of five splits",
        f"{_CHILDREN}.speed:best_shares",
        cards=2,
        limit_s=300.0,
    ),
    Check(
        "out-of-memory",
        "memory that runs out in forward and backward passes costs no step and no exactness",
        f"{_CHILDREN}.memory:out_of_memory",
    ),
    Check(
        "out-of-memory-hook",
        "memory that runs out in a communication hook ends all ranks, which name the one that failed",
        f"{_CHILDREN}.memory:out_of_memory_in_hook",
        judge=judge_failure,
        limit_s=120.0,
    ),
    Check(
        "largest-batch",
        "LargestBatchFinder finds what fits, and refuses synchronised batch normalisation",
        f"{_CHILDREN}.memory:largest_batch",
    ),
    Check(
        "shards",
        "hetero_fsdp with unequal shards and shares trains as hetero_ddp, in float64, and saves what it has trained",
        f"{_CHILDREN}.exactness:shards",
        nccl=True,
    ),
    Check(
        "pipeline-float32",
        "hetero_pipeline trains as one device, in both schedules",
        f"{_CHILDREN}.pipeline:float32",
        nccl=True,
    ),
    Check(
        "pipeline-bf16",
        "the same under bf16-mixed",
        f"{_CHILDREN}.pipeline:bf16",
        nccl=True,
    ),
    Check(
        "exception",
        "an exception on one rank ends all ranks, which name the one that failed",
        f"{_CHILDREN}.failure:exception",
        judge=judge_failure,
        limit_s=120.0,
    ),
    Check(
        "kill",
        "so does a rank that is killed",
        f"{_CHILDREN}.failure:kill",
        judge=judge_failure,
        limit_s=120.0,
    ),
    Check(
        "stop",
        "so does a rank that is stopped for longer than the time-out",
        f"{_CHILDREN}.failure:stop",
        judge=partial(judge_failure, time_out_s=20.0),  # that of the group
        limit_s=120.0,
        last_stays=True,
    ),
)


def named(names: Sequence[str]) -> tuple[Check, ...]:
    """Return the checks with these names, in their order; all of them if there are no names.

    Raises:
        ConfigurationError: A name is unknown.
    """
    known = {check.name for check in CHECKS}
    for name in names:
        if name not in known:
            raise ConfigurationError(
                f"`--only` must be names of checks, got {name!r}. `lightning-hetero check --list` lists them."
            )
    return tuple(check for check in CHECKS if not names or check.name in names)
