"""A first guess at the shares, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.types import DeviceProfile

__all__ = ["nominal_shares"]


def nominal_shares(profiles: Sequence[DeviceProfile]) -> list[float] | None:
    """Return the speeds that the devices have by their data, shape ``(world_size,)``.

    Args:
        profiles: what each rank runs on.

    Returns:
        One positive number a rank; None where all run on the same model, which is equally fast until measured, or
        where the speed of one is unknown, since a known one cannot be compared with it.

    Example:
        >>> nominal_shares([DeviceProfile("a", "cuda:0", "K80", 2187.0), DeviceProfile("a", "cuda:1", "V100", 7834.0)])
        [2187.0, 7834.0]
    """
    if len({profile.name for profile in profiles}) < 2:
        return None
    speeds = [profile.nominal_speed for profile in profiles]
    known = [speed for speed in speeds if speed is not None]
    return known if len(known) == len(speeds) else None
