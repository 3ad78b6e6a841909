"""Check what users pass to the strategy and the callback.

Each check raises one :class:`~lightning_hetero.exceptions.ConfigurationError` that names the argument, the rule, the
value and the way out.  The checks that need the number of ranks run when the Trainer is constructed, before any process
is launched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = [
    "check_at_least",
    "check_caps",
    "check_choice",
    "check_global_batch_size",
    "check_optional_positive_integer",
    "check_shares",
    "shares_of_ranks",
]


def check_shares(shares: Any, world_size: int | None = None) -> None:
    """Check the ``shares`` argument; its length too where ``world_size`` is known."""
    if isinstance(shares, str):
        if shares != "auto":
            raise ConfigurationError(
                f'`shares` must be "auto", one positive number a rank, or a mapping from device name to number,'
                f' got {shares!r}. Use "auto" to have them found, or for example [1, 2].'
            )
        return
    if isinstance(shares, Mapping):
        if not shares:
            raise ConfigurationError("`shares` must name at least one device, got an empty mapping.")
        for name, share in shares.items():
            if not isinstance(name, str):
                raise ConfigurationError(f"`shares` must map device names to numbers, got the name {name!r}.")
            _check_share(f"shares[{name!r}]", share)
        return
    if not _is_list(shares):
        raise ConfigurationError(
            f'`shares` must be "auto", one positive number a rank, or a mapping from device name to number,'
            f" got {shares!r}. For example [1, 2] gives rank 1 twice the samples of rank 0."
        )
    for rank, share in enumerate(shares):
        _check_share(f"shares[{rank}]", share)
    if world_size is not None and len(shares) != world_size:
        raise ConfigurationError(
            f"`shares` must have one number a rank ({world_size}), got {len(shares)}: {list(shares)}."
            f" Add or remove numbers, or set `devices` and `num_nodes` to match."
        )


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) < math.inf:
        raise ConfigurationError(
            f"`{name}` must be a finite positive number, got {share!r}."
            f" A rank that shall not work is left out of `devices`."
        )


def check_global_batch_size(global_batch_size: Any, batch_multiple: int, world_size: int | None = None) -> None:
    """Check that the global batch gives every rank a sample."""
    check_optional_positive_integer("global_batch_size", global_batch_size)
    if global_batch_size is None or world_size is None:
        return
    if global_batch_size < world_size:
        raise ConfigurationError(
            f"`global_batch_size` must be at least the number of ranks ({world_size}), got {global_batch_size}."
            f" Raise it or use fewer devices."
        )
    if global_batch_size < world_size * batch_multiple:
        raise ConfigurationError(
            f"`global_batch_size` must be at least `batch_multiple` times the number of ranks"
            f" ({batch_multiple} x {world_size} = {batch_multiple * world_size}), got {global_batch_size}."
            f" Raise it, lower `batch_multiple` or use fewer devices."
        )


def check_caps(
    max_batch_size: Any, batch_multiple: int, world_size: int | None = None, global_batch_size: int | None = None
) -> None:
    """Check the ``max_batch_size`` argument; its length and sum too where they can be known."""
    if max_batch_size is None:
        return
    caps = list(max_batch_size) if _is_list(max_batch_size) else [max_batch_size]
    for cap in caps:
        if not _is_integer(cap) or cap < 1:
            raise ConfigurationError(
                f"`max_batch_size` must be a positive integer, or one a rank, got {max_batch_size!r}."
            )
        if cap < batch_multiple:
            raise ConfigurationError(
                f"`max_batch_size` must be at least `batch_multiple` ({batch_multiple}), got {cap}."
                f" Raise it or lower `batch_multiple`."
            )
    if world_size is None:
        return
    if not _is_list(max_batch_size):
        caps = caps * world_size
    if len(caps) != world_size:
        raise ConfigurationError(
            f"`max_batch_size` must have one number a rank ({world_size}), got {len(caps)}: {max_batch_size}."
            f" Add or remove numbers, or give one number for all."
        )
    if global_batch_size is not None and sum(caps) < global_batch_size:
        raise InfeasiblePlanError(
            f"`max_batch_size` must together hold the global batch of {global_batch_size} samples, got {caps},"
            f" which hold {sum(caps)}: {global_batch_size - sum(caps)} too few."
            f" Raise the limits or lower `global_batch_size` to {sum(caps)}."
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_optional_positive_integer(name: str, value: Any) -> None:
    """Check that ``value`` is None or a positive integer."""
    if value is not None:
        check_at_least(name, value, 1)


def check_at_least(name: str, value: Any, least: int, *, whole: bool = True) -> None:
    """Check that ``value`` is a finite number, and a ``whole`` one, that is not below ``least``."""
    kind: type[Any] = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < least:
        what = "an integer" if whole else "a finite number"
        raise ConfigurationError(f"`{name}` must be {what} of at least {least}, got {value!r}.")


def shares_of_ranks(
    shares: str | Sequence[float] | Mapping[str, float], profiles: Sequence[DeviceProfile]
) -> list[float]:
    """Return one number a rank, given what each rank runs on.

    Raises:
        ConfigurationError: a rank's device is not in the mapping.
    """
    if isinstance(shares, str):
        return [1.0] * len(profiles)
    if not isinstance(shares, Mapping):
        return [float(share) for share in shares]
    for rank, profile in enumerate(profiles):
        if profile.name not in shares:
            raise ConfigurationError(
                f"`shares` must name the device of every rank, got {sorted(shares)}, but rank {rank}"
                f" ({profile.host}, {profile.device}) runs on {profile.name!r}."
                f" Add it; the devices of this run are {sorted({p.name for p in profiles})}."
            )
    return [float(shares[profile.name]) for profile in profiles]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
