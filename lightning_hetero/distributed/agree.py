"""Let all ranks take one decision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

__all__ = ["agree", "gather"]

Message = TypeVar("Message")
Decision = TypeVar("Decision")


def gather(message: Message) -> list[Message]:
    """Return the messages of all ranks, in the order of ranks, on every rank.

    Args:
        message: a small picklable value. Every rank has to call this at the same point.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [message]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, message)
    return cast("list[Message]", gathered)


def agree(message: Message, decide: Callable[[list[Message]], Decision]) -> Decision:
    """Gather a message of every rank, decide on rank zero, and return that decision on all ranks.

    One rank decides because floating-point results may differ in the last bit between processors, and ranks that
    differ in a plan would lose samples.

    Args:
        message: a small picklable value. Every rank has to call this at the same point.
        decide: called on rank zero with the messages in the order of ranks; returns a picklable value.

    Raises:
        Exception: whatever ``decide`` raised, on every rank, so that none is left waiting.
    """
    messages = gather(message)
    if not (dist.is_available() and dist.is_initialized()):
        return decide(messages)
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = decide(messages)
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast("Decision", outcome[0])
