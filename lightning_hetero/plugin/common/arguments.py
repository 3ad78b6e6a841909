"""Check what users pass to the strategies and callbacks.

Each check raises one :class:`~lightning_hetero.exceptions.ConfigurationError` that names the argument, the rule, the
value and the way out.  Checks that need the number of ranks run when the Trainer is constructed, before any process is
launched.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from lightning_hetero.balance.batch.batch_solver import proportional_plan
from lightning_hetero.balance.types import BatchLimits, DeviceProfile
from lightning_hetero.exceptions import ConfigurationError, InfeasiblePlanError

__all__ = [
    "caps_of_ranks",
    "check_at_least",
    "check_bool",
    "check_caps",
    "check_choice",
    "check_fraction",
    "check_global_batch_size",
    "check_keywords",
    "check_launching",
    "check_num_loss_terms",
    "check_numbers",
    "check_optional_positive_integer",
    "check_positive",
    "check_record",
    "check_shard_weights",
    "check_shares",
    "check_splits",
    "check_sum_of_caps",
    "is_integer",
    "shard_weights_of_ranks",
    "shares_of_ranks",
]


def check_shares(shares: Any, world_size: int | None = None) -> None:
    """Check the ``shares`` argument, and its length if ``world_size`` is known."""
    if isinstance(shares, str):
        if shares != "auto":
            raise ConfigurationError(
                f'`shares` must be "auto", one positive number per rank, or a mapping from device name to number,'
                f' got {shares!r}. Use "auto" to have the shares found, or a list such as [1, 2].'
            )
        return
    if isinstance(shares, Mapping):
        _check_names("shares", shares)
        for name, share in shares.items():
            _check_share(f"shares[{name!r}]", share)
        return
    if not _is_list(shares):
        raise ConfigurationError(
            f'`shares` must be "auto", one positive number per rank, or a mapping from device name to number,'
            f" got {shares!r}. For example [1, 2] gives rank 1 twice the samples of rank 0."
        )
    for rank, share in enumerate(shares):
        _check_share(f"shares[{rank}]", share)
    if world_size is not None and len(shares) != world_size:
        raise ConfigurationError(
            f"`shares` must have one number per rank ({world_size}), got {len(shares)}: {list(shares)}."
            f" Add or remove numbers, or set `devices` and `num_nodes` to match."
        )


def check_shard_weights(weights: Any, world_size: int | None = None) -> None:
    """Check the ``shard_weights`` argument, and its length if ``world_size`` is known."""
    if isinstance(weights, str) and weights == "auto":
        return
    if isinstance(weights, Mapping):
        _check_names("shard_weights", weights)
    elif not _is_list(weights):
        raise ConfigurationError(
            f'`shard_weights` must be "auto", one number per rank, or a mapping from device name to number, got'
            f" {weights!r}. For example [2, 1] gives rank 0 two thirds of the parameters."
        )
    entries = list(weights.items() if isinstance(weights, Mapping) else enumerate(weights))
    for name, weight in entries:
        if not _is_number(weight) or weight < 0:
            raise ConfigurationError(
                f"`shard_weights[{name!r}]` must be a finite number of at least 0, got {weight!r}. A rank with 0 holds"
                f" no part of the model, but takes part in the training."
            )
    if not any(weight for _, weight in entries) and not isinstance(weights, Mapping):
        raise ConfigurationError(f"`shard_weights` must not all be 0, got {list(weights)}. Give one rank some weight.")
    if world_size is not None and not isinstance(weights, Mapping) and len(weights) != world_size:
        raise ConfigurationError(
            f"`shard_weights` must have one number per rank ({world_size}), got {len(weights)}: {list(weights)}."
            f" Add or remove numbers, or set `devices` and `num_nodes` to match."
        )


def _check_names(name: str, numbers: Mapping[Any, Any]) -> None:
    if not numbers:
        raise ConfigurationError(f"`{name}` must name at least one device, got an empty mapping.")
    for device in numbers:
        if not isinstance(device, str):
            raise ConfigurationError(f"`{name}` must map device names to numbers, got the name {device!r}.")


def _check_share(name: str, share: Any) -> None:
    check_positive(name, share, " To exclude a rank, remove it from `devices`.")


def check_global_batch_size(global_batch_size: Any, batch_multiple: int, world_size: int | None = None) -> None:
    """Check that the global batch has at least one sample for every rank."""
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


Caps = int | Sequence[int] | Mapping[str, int] | None


def check_caps(
    name: str, caps: Any, batch_multiple: int = 1, world_size: int | None = None, *, by_name: bool = True
) -> None:
    """Check a limit: one number for all ranks, one per rank, or (if ``by_name``) one per device name."""
    if caps is None:
        return
    forms = (
        "a positive integer, one per rank, or one per device name" if by_name else "a positive integer, or one per rank"
    )
    if isinstance(caps, Mapping) and not by_name:
        raise ConfigurationError(f"`{name}` must be {forms}, got {caps!r}.")
    if isinstance(caps, Mapping):
        _check_names(name, caps)
    values = list(caps.values()) if isinstance(caps, Mapping) else list(caps) if _is_list(caps) else [caps]
    for cap in values:
        if not is_integer(cap) or cap < 1:
            raise ConfigurationError(f"`{name}` must be {forms}, got {caps!r}.")
        if cap < batch_multiple:
            raise ConfigurationError(
                f"`{name}` must be at least `batch_multiple` ({batch_multiple}), got {cap}."
                f" Raise it or lower `batch_multiple`."
            )
    if world_size is not None and _is_list(caps) and len(caps) != world_size:
        raise ConfigurationError(
            f"`{name}` must have one number per rank ({world_size}), got {len(caps)}: {caps}."
            f" Add or remove numbers, or give one number for all ranks."
        )


def check_sum_of_caps(caps: Caps, world_size: int, global_batch_size: int | None, batch_multiple: int = 1) -> None:
    """Check that the limits of ``max_batch_size`` together hold the global batch, if both are known."""
    if caps is None or isinstance(caps, Mapping) or global_batch_size is None:
        return
    of_ranks = list(caps) if isinstance(caps, Sequence) else [caps] * world_size
    if sum(of_ranks) < global_batch_size:
        raise InfeasiblePlanError(
            f"`max_batch_size` must together hold the global batch of {global_batch_size} samples, got {of_ranks},"
            f" which hold {sum(of_ranks)}: {global_batch_size - sum(of_ranks)} too few."
            f" Raise the limits or lower `global_batch_size` to {sum(of_ranks)}."
        )
    # In multiples of `batch_multiple` they may hold less.
    limits = BatchLimits(tuple(int(cap) for cap in of_ranks), batch_multiple)
    proportional_plan([1.0] * world_size, global_batch_size, limits, min_samples=1)


def caps_of_ranks(name: str, caps: Caps, profiles: Sequence[DeviceProfile]) -> list[int] | None:
    """Return one limit per rank, given the device of each rank; None if there is no limit.

    Raises:
        ConfigurationError: If a rank's device is not in the mapping.
    """
    if caps is None:
        return None
    if isinstance(caps, Mapping):
        caps = _by_device(name, caps, profiles)
    return [int(cap) for cap in caps] if isinstance(caps, Sequence) else [int(caps)] * len(profiles)


def check_numbers(name: str, numbers: Any, world_size: int | None = None, of: str = "rank") -> None:
    """Check that ``numbers`` is a list with one positive number per rank, or per whatever ``of`` names."""
    if not _is_list(numbers) or not numbers:
        raise ConfigurationError(f"`{name}` must be one positive number per {of}, got {numbers!r}. For example [1, 2].")
    for i, number in enumerate(numbers):
        check_positive(f"{name}[{i}]", number)
    if world_size is not None and len(numbers) != world_size:
        raise ConfigurationError(
            f"`{name}` must have one number per rank ({world_size}), got {len(numbers)}: {list(numbers)}."
            f" Add or remove numbers, or set `devices` and `num_nodes` to match."
        )


def check_splits(splits: Any, world_size: int | None = None) -> None:
    """Check the ``splits`` argument, and its length if ``world_size`` is known."""
    if isinstance(splits, str) and splits == "auto":
        return
    if not _is_list(splits) or not all(is_integer(split) for split in splits):
        raise ConfigurationError(
            f'`splits` must be "auto", or a list with the first layer of every stage but the first, got {splits!r}.'
            f" For example, [4] makes two stages, the first with four layers."
        )
    if any(a >= b for a, b in pairwise((0, *splits))):
        raise ConfigurationError(f"`splits` must be positive and strictly increasing, got {list(splits)}.")
    if world_size is not None and len(splits) != world_size - 1:
        raise ConfigurationError(
            f"`splits` must have one number fewer than there are ranks ({world_size}), got {len(splits)}:"
            f" {list(splits)}."
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_optional_positive_integer(name: str, value: Any) -> None:
    """Check that ``value`` is None or a positive integer."""
    if value is not None:
        check_at_least(name, value, 1)


def check_fraction(name: str, value: Any) -> None:
    """Check that ``value`` is a fraction: above 0 and at most 1."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ConfigurationError(f"`{name}` must be a number above 0 and at most 1, got {value!r}.")


def check_record(record: Any) -> None:
    """Check the ``record`` argument: true, false, or a directory."""
    if not isinstance(record, bool | str) or record == "" or (isinstance(record, str) and "\0" in record):
        raise ConfigurationError(f"`record` must be true, false, or the path of a directory, got {record!r}.")


def check_bool(name: str, value: Any) -> None:
    """Check that ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}` must be true or false, got {value!r}.")


def check_num_loss_terms(num_loss_terms: Any, loss_reduction: str) -> None:
    """Check the ``num_loss_terms`` argument, and that the loss is a mean."""
    if num_loss_terms is not None and not callable(num_loss_terms):
        raise ConfigurationError(
            f"`num_loss_terms` must be a function that takes a batch, or None, got {num_loss_terms!r}."
        )
    if num_loss_terms is not None and loss_reduction == "sum":
        raise ConfigurationError(
            '`num_loss_terms` must be None with `loss_reduction="sum"`: a sum is not averaged over terms.'
        )


def check_keywords(
    strategy: str, given: Collection[str], own: Collection[str], accepted: Collection[str], excluded: Mapping[str, str]
) -> None:
    """Check that the receiver of passed-on keyword arguments knows them.

    Args:
        strategy: Name of the strategy that passes them on.
        given: Names of the given keyword arguments.
        own: Names of the strategy's own arguments, which a keyword may misspell.
        accepted: Names that may be passed on.
        excluded: Names that must not be passed on, each with the reason.
    """
    for name in given:
        if name in excluded:
            raise ConfigurationError(f"`{name}` must not be given to {strategy}: {excluded[name]}.")
        if name not in accepted:
            known = [*own, *(n for n in accepted if n not in excluded)]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"It takes {', '.join(own)}, and what DDPStrategy takes."
            raise ConfigurationError(f"`{name}` must be an argument of {strategy}, which has none of that name. {hint}")


def check_launching(keywords: Mapping[str, Any]) -> None:
    """Check the arguments of Lightning's DDPStrategy that control how processes are launched and connected."""
    if "start_method" in keywords:
        check_choice("start_method", keywords["start_method"], ("popen", "spawn", "fork", "forkserver"))
    backend = keywords.get("process_group_backend")
    if backend is not None and (not isinstance(backend, str) or not backend):
        raise ConfigurationError(f'`process_group_backend` must be a name such as "gloo" or None, got {backend!r}.')
    timeout = keywords.get("timeout")
    if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta(0)):
        raise ConfigurationError(
            f"`timeout` must be a positive datetime.timedelta or None, got {timeout!r}. For example"
            f" timedelta(minutes=5)."
        )


def check_at_least(name: str, value: Any, least: int, *, whole: bool = True) -> None:
    """Check that ``value`` is a finite number (an integer if ``whole``) of at least ``least``."""
    if not (is_integer(value) if whole else _is_number(value)) or value < least:
        what = "an integer" if whole else "a finite number"
        raise ConfigurationError(f"`{name}` must be {what} of at least {least}, got {value!r}.")


def check_positive(name: str, value: Any, way_out: str = "") -> None:
    """Check that ``value`` is a finite number above 0."""
    if not _is_number(value) or value <= 0:
        raise ConfigurationError(f"`{name}` must be a finite positive number, got {value!r}.{way_out}")


def shares_of_ranks(
    shares: str | Sequence[float] | Mapping[str, float], profiles: Sequence[DeviceProfile]
) -> list[float]:
    """Return one share per rank, given the device of each rank.

    Raises:
        ConfigurationError: If a rank's device is not in the mapping.
    """
    if isinstance(shares, str):
        return [1.0] * len(profiles)
    if not isinstance(shares, Mapping):
        return [float(share) for share in shares]
    return [float(share) for share in _by_device("shares", shares, profiles)]


def shard_weights_of_ranks(
    weights: str | Sequence[float] | Mapping[str, float], profiles: Sequence[DeviceProfile]
) -> list[float] | None:
    """Return one weight per rank, given the device of each rank; None for "auto".

    Raises:
        ConfigurationError: If a rank's device is not in the mapping, or no rank has a weight.
    """
    if isinstance(weights, str):
        return None
    given = _by_device("shard_weights", weights, profiles) if isinstance(weights, Mapping) else weights
    of_ranks = [float(weight) for weight in given]
    if not any(of_ranks):
        raise ConfigurationError(f"`shard_weights` must not be 0 for all devices of this run, got {weights}.")
    return of_ranks


def _by_device(name: str, numbers: Mapping[str, Any], profiles: Sequence[DeviceProfile]) -> list[Any]:
    for rank, profile in enumerate(profiles):
        if profile.name not in numbers:
            raise ConfigurationError(
                f"`{name}` must name the device of every rank, got {sorted(numbers)}, but rank {rank}"
                f" ({profile.host}, {profile.device}) runs on {profile.name!r}."
                f" Add it; the devices of this run are {sorted({p.name for p in profiles})}."
            )
    return [numbers[profile.name] for profile in profiles]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_integer(value: Any) -> bool:
    """Return whether ``value`` is an integer of Python or NumPy, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Return whether ``value`` is a real number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
