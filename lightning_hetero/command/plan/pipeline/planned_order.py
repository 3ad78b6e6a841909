"""Predict a pipeline whose order of passes is planned, as ``hetero_pipeline`` does by default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_hetero.balance.pipeline.orders.choice import choose_order
from lightning_hetero.balance.pipeline.orders.proof import most_held
from lightning_hetero.balance.pipeline.orders.search import OrderProblem, most_held_by_default
from lightning_hetero.command.plan.pipeline.pipeline_cluster import PipelineCluster
from lightning_hetero.exceptions import InfeasiblePlanError

__all__ = ["OrderPrediction", "predict_order"]


@dataclass(frozen=True)
class OrderPrediction:
    """The prediction for a planned order.

    Attributes:
        name: Name of the way in which it runs, such as "v".
        step_s: Seconds per step.
        needed_bytes: Largest memory that each rank needs, rank 0 first; None if no device's memory is known.
    """

    name: str
    step_s: float
    needed_bytes: tuple[float, ...] | None


def predict_order(cluster: PipelineCluster) -> OrderPrediction | None:
    """Return what a planned order reaches; None if "1f1b" is as good, and where planning would take too long.

    Which backward passes can be split and which layers two ranks may share is known only when the model is measured
    before its first step, so neither is considered, and a training may be faster.

    Example:
        >>> from lightning_hetero.command.plan.pipeline.pipeline_cluster import Layer, PipelineDevice
        >>> devices = (PipelineDevice("fast", 2.0), PipelineDevice("slow", 1.0))
        >>> found = predict_order(PipelineCluster(devices, (Layer(0.004, 0.008),) * 12, micro_batches=8))
        >>> found.name, round(found.step_s, 3)
        ('v', 0.396)
    """
    if not cluster.is_refined:
        return None
    memory, size = cluster.memory, len(cluster.devices)
    most = most_held_by_default(size, memory)
    problem = OrderProblem(cluster.costs, cluster.micro_batches, 0, cluster.transfer_s, memory, most)
    try:
        choice = choose_order(problem)
    except InfeasiblePlanError:
        return None
    if choice.order is None:
        return None
    needed = None
    if memory is not None:
        task = problem.task(choice.stages)
        assert task is not None, "it was planned"
        # with no memory at all, what is left is what is missing
        left = replace(memory, budgets_bytes=(0.0,) * size).left_bytes(choice.stages)
        needed = tuple(held - less for held, less in zip(most_held(choice.order, task.held), left, strict=True))
    return OrderPrediction(choice.name, choice.step_s, needed)
