"""Divide a rank's samples of a step into passes that are small enough for its memory."""

from __future__ import annotations

__all__ = ["halved", "pass_sizes"]


def pass_sizes(samples: int, most: int | None) -> tuple[int, ...]:
    """Return the sizes of as few passes as possible, as equal as possible, the larger ones first.

    Args:
        samples: what is divided.
        most: most samples of a pass, at least 1; None for no limit.

    Example:
        >>> pass_sizes(10, 4), pass_sizes(10, None), pass_sizes(0, 4)
        ((4, 3, 3), (10,), ())
    """
    if samples == 0:
        return ()
    passes = 1 if most is None else -(-samples // most)
    size, larger = divmod(samples, passes)
    return (size + 1,) * larger + (size,) * (passes - larger)


def halved(size: int) -> int:
    """Return the next smaller limit behind a pass of ``size`` samples, at least 2, that did not fit."""
    return -(-size // 2)
