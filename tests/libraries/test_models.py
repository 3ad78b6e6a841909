"""Models of transformers, timm and torchvision train in stages as on one device, without a wrapper."""

from __future__ import annotations

import pytest
from harness import RankPools
from libraries.model_families import FAMILIES, Way, difference, train
from libraries.model_matrix import train_all

WAYS = [Way(2), Way(2, (3,), checkpointed=True), Way(2, (2,), lora=True)]


@pytest.mark.parametrize("way", WAYS, ids=["found", "checkpointed", "lora"])
def test_families_train_as_on_one_device(ranks: RankPools, way: Way) -> None:
    names = [name for name, family in FAMILIES.items() if family.lora or not way.lora]
    for found in ranks.run(2, train_all, names, way, timeout_s=280.0):
        alone = Way(checkpointed=way.checkpointed, lora=way.lora)
        off = {name: difference(found[name], train(name, alone)) for name in names}
        assert max(off.values()) < 1e-6, off
