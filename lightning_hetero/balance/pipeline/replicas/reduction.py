"""Predict when the gradients of all replicas are averaged.

The ranks that hold a layer, one per replica, average its gradients in a ring (P. Patarasuk and X. Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations", *J. Parallel Distrib. Comput.* 69, 2009). Consecutive
layers of the same ranks go together. They begin as soon as the last backward pass of each of these stages has ended, so
rings of the last stages overlap with the drain of the pipelines. A rank is in one ring at a time, the last layers
first, and the link of a node to others carries one ring at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hetero.balance.pipeline.replicas.plan import Replica
from lightning_hetero.balance.pipeline.replicas.problem import ReplicaProblem

__all__ = ["reduced_s"]


def reduced_s(problem: ReplicaProblem, replicas: Sequence[Replica], stage_ends_s: Sequence[Sequence[float]]) -> float:
    """Return the seconds from the start of a step until all gradients are averaged.

    Args:
        problem: Sizes of gradients, and links.
        replicas: The replicas, each with one stage per rank.
        stage_ends_s: When the last backward pass of each stage ends, for each replica.
    """
    last_s = max(map(max, stage_ends_s))
    if len(replicas) == 1 or not any(problem.parameter_bytes):
        return last_s
    free_at: dict[tuple[str, int], float] = {}
    ends = sorted({0, *(end for replica in replicas for end in replica.stages.ends)})
    for start, end in zip(ends[-2::-1], ends[:0:-1], strict=True):
        size_bytes = sum(problem.parameter_bytes[start:end])
        if not size_bytes:
            continue
        stages = [next(s for s, e in enumerate(replica.stages.ends) if start < e) for replica in replicas]
        ranks = [r.ranks[r.stages.ranks[stage]] for r, stage in zip(replicas, stages, strict=True)]
        nodes = {problem.node_of(rank) for rank in ranks}
        busy = [("rank", rank) for rank in ranks] + [("node", node) for node in nodes if len(nodes) > 1]
        begins_s = max(ends_s[stage] for ends_s, stage in zip(stage_ends_s, stages, strict=True))
        begins_s = max([begins_s, *(free_at.get(one, 0.0) for one in busy)])
        ended_s = begins_s + problem.link(ranks).ring_s(size_bytes, len(ranks))
        free_at.update(dict.fromkeys(busy, ended_s))
        last_s = max(last_s, ended_s)
    return last_s
