"""Guess the shares before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import DeviceProfile

__all__ = ["nominal_shares"]


def nominal_shares(profiles: Sequence[DeviceProfile]) -> list[float] | None:
    """Return the nominal speeds of the devices as shares, shape ``(world_size,)``.

    Args:
        profiles: Device of each rank.

    Returns:
        One positive number per rank. None if all devices are the same model, which counts as equally fast until
        measured, or if the speed of one is unknown, because the others cannot be compared with it.

    Example:
        >>> nominal_shares([DeviceProfile("a", "cuda:0", "K80", 2187.0), DeviceProfile("a", "cuda:1", "V100", 7834.0)])
        [2187.0, 7834.0]
    """
    if len({profile.name for profile in profiles}) < 2:
        return None
    speeds = [profile.nominal_speed for profile in profiles]
    known = [speed for speed in speeds if speed is not None]
    return known if len(known) == len(speeds) else None
