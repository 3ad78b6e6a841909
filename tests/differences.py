"""Keeps the largest difference that each comparison found, for the table in docs/explanation/exactness.md.

``pytest --differences`` prints it.
"""

from __future__ import annotations

__all__ = ["found", "measured"]

found: dict[str, float] = {}


def measured(comparison: str, difference: float) -> float:
    """Return the difference; keep it if it is the largest of that comparison so far."""
    if not difference <= found.get(comparison, -1.0):
        found[comparison] = difference
    return difference
