"""Let measured ranks be alike that differ only a little, so that there are fewer groups to compare.

Two cards of a kind never take exactly the same time. A search that tells them apart spends its effort on exchanges that
change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem
from lightning_hetero.balance.pipeline.replicas.timing import Floats
from lightning_hetero.balance.pipeline.stages import LayerCosts

__all__ = ["with_fewer_kinds"]

_ALIKE = 1.05  # times of all layers together, and budgets, differ by this factor at most
_LAYERS_ALIKE = 1.25  # and times of each layer by this one


def with_fewer_kinds(problem: ReplicaProblem) -> ReplicaProblem:
    """Return the problem with ranks of a kind that have their mean times and their least budget."""
    work = np.array(problem.costs.total_s)
    budgets = np.ones(problem.world_size) if problem.memory is None else np.array(problem.memory.budgets_bytes)
    kinds: list[list[int]] = []
    totals = work.sum(axis=1)
    for rank in np.argsort(totals, kind="stable").tolist():
        for kind in kinds:
            if (
                _ratio(totals[[rank]], totals[kind[:1]]) <= _ALIKE
                and _ratio(budgets[[rank]], budgets[kind[:1]]) <= _ALIKE
                and _ratio(work[rank], work[kind[0]]) <= _LAYERS_ALIKE
            ):
                kind.append(rank)
                break
        else:
            kinds.append([rank])
    memory = problem.memory
    if memory is not None:
        least = [0.0] * problem.world_size
        for kind in kinds:
            for rank in kind:
                least[rank] = float(budgets[kind].min())
        memory = replace(memory, budgets_bytes=tuple(least))
    return replace(
        problem,
        costs=_averaged(problem.costs, kinds),
        overheads=None if problem.overheads is None else _averaged(problem.overheads, kinds),
        memory=memory,
    )


def _ratio(one: Floats, other: Floats) -> float:
    """Return the largest factor by which positive numbers differ; those that are both 0 are equal."""
    a, b = np.maximum(one, 1e-12), np.maximum(other, 1e-12)
    return float(np.maximum(a / b, b / a).max())


def _averaged(costs: LayerCosts, kinds: Sequence[Sequence[int]]) -> LayerCosts:
    found = []
    for rows in (costs.forward_s, costs.backward_s, costs.input_s, costs.weight_s):
        if not rows:
            continue
        values = np.array(rows)
        for kind in map(list, kinds):
            if (values[kind] != values[kind[0]]).any():  # the mean of equal numbers may be another one
                values[kind] = values[kind].mean(axis=0)
        found.append(tuple(tuple(row) for row in values.tolist()))
    return LayerCosts(*found)
