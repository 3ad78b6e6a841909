"""Check how users want layers and samples to be divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_hetero.exceptions import ConfigurationError
from lightning_hetero.plugin.common import arguments

__all__ = ["check_division", "check_replicas", "wants_replicas"]


def check_division(splits: Any, speeds: Any, schedule: Any, replicas: Any) -> None:
    """Check ``splits``, ``speeds``, ``schedule`` and ``replicas``, and that they fit together."""
    arguments.check_choice("schedule", schedule, ("auto", "1f1b", "gpipe", "v"))
    arguments.check_splits(splits)
    check_replicas(replicas)
    if speeds is not None:
        arguments.check_numbers("speeds", speeds)
    if schedule == "v" and (splits != "auto" or speeds is not None):
        raise ConfigurationError(
            '`schedule="v"` needs stages that are found by timing, got `splits` or `speeds`. Leave them out, or use'
            ' schedule="1f1b".'
        )
    if splits != "auto" and speeds is not None:
        raise ConfigurationError("`speeds` must be None if `splits` says how the layers are divided. Give one.")
    if not wants_replicas(replicas):
        return
    if splits != "auto":
        raise ConfigurationError(
            f"`splits` divides the layers of one pipeline, and `replicas` asks for several, each with stages of its"
            f" own, got splits={splits!r} and replicas={replicas!r}. Leave out `splits`, or give `speeds` instead."
        )
    if replicas == "auto" and speeds is not None:
        raise ConfigurationError(
            '`replicas="auto"` needs layers that are timed, got `speeds`. Leave them out, or say how many replicas.'
        )
    if schedule == "v":
        raise ConfigurationError(
            f'`schedule` must be "auto", "1f1b" or "gpipe" with several `replicas`, whose passes are not planned, got'
            f" {schedule!r}."
        )


def check_replicas(replicas: Any, world_size: int | None = None) -> None:
    """Check the ``replicas`` argument, and against the number of ranks if ``world_size`` is known."""
    if isinstance(replicas, str):
        arguments.check_choice("replicas", replicas, ("auto",))
        return
    if arguments.is_integer(replicas):
        arguments.check_at_least("replicas", replicas, 1)
        if world_size is not None and replicas > world_size:
            raise ConfigurationError(
                f"`replicas` must be at most the number of ranks ({world_size}), got {replicas}. Each replica needs a"
                f" rank."
            )
        return
    if not _is_list(replicas) or not replicas or not all(map(_is_group, replicas)):
        raise ConfigurationError(
            f'`replicas` must be "auto", a number, or the ranks of each replica, got {replicas!r}. For example,'
            f" [[0, 3], [1, 2]] makes two pipelines of two ranks each."
        )
    ranks = [rank for group in replicas for rank in group]
    if len({*ranks}) != len(ranks) or (world_size is not None and sorted(ranks) != list(range(world_size))):
        expected = "" if world_size is None else f" from 0 to {world_size - 1}"
        raise ConfigurationError(
            f"`replicas` must have each rank{expected} once, got {replicas!r}. Add or remove ranks, or set `devices`"
            f" and `num_nodes` to match."
        )
    if any(0 in group[1:] for group in replicas):
        raise ConfigurationError(
            f"`replicas` must have rank 0 as the first of its replica, because the first rank of each has its last"
            f" stage, and rank 0 computes losses and logs, got {replicas!r}."
        )


def wants_replicas(replicas: Any) -> bool:
    """Return whether there may be several replicas."""
    return replicas == "auto" or (len(replicas) if _is_list(replicas) else replicas) > 1


def _is_group(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(arguments.is_integer(rank) and rank >= 0 for rank in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
