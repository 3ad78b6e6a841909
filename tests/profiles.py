"""How many cases are drawn: few of them in CI, many with ``HYPOTHESIS_PROFILE=thorough``, as ``tox -e thorough`` sets.

``LIGHTNING_HETERO_THOROUGH=1`` does the same.
"""

from __future__ import annotations

import os

import pytest

__all__ = ["THOROUGH", "drawn", "thorough"]

THOROUGH = os.environ.get("LIGHTNING_HETERO_THOROUGH") == "1" or os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

thorough = pytest.mark.skipif(not THOROUGH, reason="in the thorough profile only: LIGHTNING_HETERO_THOROUGH=1")


def drawn(few: int, many: int) -> int:
    """Return how many cases a test draws: ``few``, or ``many`` in the thorough profile."""
    return many if THOROUGH else few
