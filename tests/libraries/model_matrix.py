"""Train each family of models in several ways, in stages and on one device, and write the differences into the docs.

    cd tests; python -m libraries.model_matrix

It needs what `tox -e libraries` installs, and takes some minutes.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import harness
import libraries.torchvision_operators  # noqa: F401  before timm imports torchvision
from libraries.model_families import FAMILIES, Outcome, Way, difference, train

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "models.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
WAYS = {
    "2 stages, found": Way(2),
    "3 stages, fixed": Way(3, (2, 4)),
    "float64": Way(2, precision="64-true"),
    "checkpointed": Way(2, checkpointed=True),
    "LoRA": Way(2, lora=True),
    "bf16-mixed": Way(2, precision="bf16-mixed"),
}


def train_all(names: list[str], way: Way) -> dict[str, Outcome]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return {name: train(name, way) for name in names}


def differences(way: Way, names: list[str] | None = None) -> dict[str, float]:
    """Return the largest difference of any loss or parameter from one device, for each family that trains this way."""
    chosen = [name for name in names or FAMILIES if FAMILIES[name].lora or not way.lora]
    pools = harness.RankPools()
    try:
        found = pools.run(way.stages, train_all, chosen, way, timeout_s=1200.0)
    finally:
        pools.close()
    expected = train_all(chosen, replace(way, stages=1, splits=None))
    return {name: max(difference(rank[name], expected[name]) for rank in found) for name in chosen}


def main() -> None:
    harness.PRELOADED.insert(0, "libraries.torchvision_operators")
    columns: dict[str, dict[str, float]] = {}
    for title, way in WAYS.items():
        columns[title] = differences(way)
        sys.stdout.write(f"{title}: at most {max(columns[title].values()):.1e}\n")
    lines = [f"| family | library | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, family in FAMILIES.items():
        values = [f"{column[name]:.0e}" if name in column else "" for column in columns.values()]
        lines.append(f"| {name} | {family.library} | {' | '.join(values)} |")
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
