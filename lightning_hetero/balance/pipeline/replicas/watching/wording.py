"""Say in words how replicas change."""

from __future__ import annotations

from lightning_hetero.balance.pipeline.replicas.plan import ReplicaPlan

__all__ = ["changed_replicas"]


def changed_replicas(before: ReplicaPlan, after: ReplicaPlan) -> str:
    """Return which parts of the samples and which layers replicas have under a plan, as far as they differ.

    Example:
        >>> from lightning_hetero.balance.pipeline.replicas.given import uniform_replicas
        >>> from lightning_hetero.balance.pipeline.replicas.plan import Replica
        >>> before = uniform_replicas(6, [(0, 2), (1,)])
        >>> first, second = before.replicas
        >>> changed_replicas(before, ReplicaPlan((first, Replica(second.ranks, second.stages, 2.0))))
        '50% and 50% of the samples in replicas 0 and 1'
    """
    total = sum(replica.share for replica in after.replicas)
    shares = _listed([f"{replica.share / total:.0%}" for replica in after.replicas])
    parts = [f"{shares} of the samples in replicas {_listed([str(n) for n in range(len(after.replicas))])}"]
    if len(after.replicas) == 1:
        parts = []
    for number, (one, other) in enumerate(zip(before.replicas, after.replicas, strict=True)):
        if one.stages != other.stages:
            ranks = [other.ranks[own] for own in other.stages.ranks]
            layers = [len(other.stages.layers(stage)) for stage in range(other.stages.num_stages)]
            parts.append(f"{layers} layers on ranks {ranks} of replica {number}")
    return ", ".join(parts)


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
