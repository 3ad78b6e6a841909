"""How the ranks of a check have ended, and what that says about a failure that was provoked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.command.check.finding import Finding, at_most, failed

__all__ = ["Ended", "judge_failure"]

# Ranks report a dead peer within seconds, but the end of a process with torch and CUDA takes some more.
_BOUND_S = 30.0
_WHAT = r"fail|answer|gone|kill|stopp|dead|died|memory|heartbeat|lost"


@dataclass(frozen=True)
class Ended:
    """The end of a rank's process.

    Attributes:
        rank: Number of the rank.
        status: Exit status; None if it had not ended.
        ended_s: When it ended, in seconds since the epoch; None if it had not.
        text: Its output.
        finding: What it has found; None if nothing.
        fault_s: When it began to fail on purpose, in seconds since the epoch; None if it did not.
    """

    rank: int
    status: int | None
    ended_s: float | None
    text: str
    finding: Finding | None = None
    fault_s: float | None = None


def judge_failure(ended: Sequence[Ended], *, time_out_s: float = 0.0) -> Finding:
    """Return whether the last rank's failure has ended its peers in time, with its name in their output.

    The figure is the time until the last process has ended that could. A rank that is stopped cannot.

    Args:
        ended: How each rank has ended, in the order of ranks.
        time_out_s: Seconds after which the peers notice the failure at the latest.
    """
    *peers, culprit = ended
    if culprit.fault_s is None:
        return failed(f"rank {culprit.rank} did not come to the step in which it fails")
    unaware = [peer.rank for peer in peers if peer.status == 0]
    if unaware:
        return failed(f"rank {unaware[0]} ended as if nothing had happened")
    silent = [peer.rank for peer in peers if not names(peer.text, culprit.rank)]
    if silent:
        return failed(f"the output of rank {silent[0]} does not name rank {culprit.rank}, which failed")
    seconds = max(one.ended_s - culprit.fault_s for one in ended if one.ended_s is not None)
    note = f"until all had ended; the others named rank {culprit.rank}"
    return at_most(_BOUND_S + time_out_s, seconds, "s", note)


def names(text: str, rank: int) -> bool:
    """Return whether a line of ``text`` says of a rank that it failed."""
    who = rf"\brank {rank}\b"
    lines = (line for line in text.splitlines() if re.search(who, line, re.IGNORECASE))
    return any(re.search(_WHAT, line, re.IGNORECASE) for line in lines)
