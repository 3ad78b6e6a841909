"""Predict what a file describes, and how to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_hetero.command.plan.auto.choice import AutoCluster, predict_all
from lightning_hetero.command.plan.auto.output import auto_document, print_auto
from lightning_hetero.command.plan.cluster import Cluster
from lightning_hetero.command.plan.cluster_file import ClusterFile
from lightning_hetero.command.plan.cluster_plan import plan_cluster
from lightning_hetero.command.plan.pipeline.pipeline_cluster import predict_pipeline
from lightning_hetero.command.plan.plan_json import cluster_document, pipeline_document
from lightning_hetero.command.plan.plan_text import print_cluster_plan, print_pipeline
from lightning_hetero.command.plan.shards.output import print_shards, shards_document
from lightning_hetero.command.plan.shards.prediction import ShardedCluster, predict_shards

__all__ = ["Prediction", "predicted"]


@dataclass(frozen=True)
class Prediction:
    """A prediction.

    Attributes:
        show: Function that prints a table and notes.
        document: Function that returns the object that ``--json`` prints.
    """

    show: Callable[[], None]
    document: Callable[[], dict[str, Any]]


def predicted(file: ClusterFile) -> Prediction:
    """Return the prediction for a file.

    Raises:
        HeteroError: No plan is possible.
    """
    cluster = file.cluster
    if isinstance(cluster, Cluster):
        plan = plan_cluster(cluster)
        return Prediction(
            partial(print_cluster_plan, file, cluster, plan), partial(cluster_document, file, cluster, plan)
        )
    if isinstance(cluster, ShardedCluster):
        shards = predict_shards(cluster)
        return Prediction(
            partial(print_shards, cluster, shards, file.notes), partial(shards_document, cluster, shards, file.notes)
        )
    if isinstance(cluster, AutoCluster):
        found = predict_all(cluster)
        return Prediction(partial(print_auto, cluster, found), partial(auto_document, cluster, found))
    stages = predict_pipeline(cluster)
    return Prediction(partial(print_pipeline, cluster, stages), partial(pipeline_document, cluster, stages))
