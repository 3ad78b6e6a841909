"""Ranks of their own for each library, which therefore does not meet what another has imported."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import libraries.torchvision_operators  # noqa: F401  before torchmetrics imports torchvision
import pytest

harness.PRELOADED.insert(0, "libraries.torchvision_operators")


@pytest.fixture(scope="module")
def ranks() -> Iterator[harness.RankPools]:
    """Pools of real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    pools = harness.RankPools()
    yield pools
    pools.close()
