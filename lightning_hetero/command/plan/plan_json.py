"""Build the JSON document that ``lightning-hetero plan --json`` prints."""

from __future__ import annotations

from typing import Any

from lightning_hetero.command.plan.cluster import Cluster
from lightning_hetero.command.plan.cluster_file import ClusterFile
from lightning_hetero.command.plan.cluster_plan import ClusterPlan, DeviceSet
from lightning_hetero.command.plan.pipeline.pipeline_cluster import PipelineCluster, PipelinePrediction

__all__ = ["cluster_document", "pipeline_document"]

VERSION = 1


def cluster_document(file: ClusterFile, cluster: Cluster, plan: ClusterPlan) -> dict[str, Any]:
    """Return the document of ``strategy: hetero_ddp``.

    Times are in the unit that ``time_unit`` names: ``"s"`` for seconds, or ``"relative"`` for what the slowest device
    needs for one sample. ``samples_per_time`` uses the same unit. ``devices`` has one entry per kind, in the order of
    the file, and the lists ``counts`` have the same order. ``ddp.step_time``, ``speed_up``, the costs, ``fastest`` and
    ``cheapest`` are null if there is nothing to report.
    """
    return {
        "lightning_hetero_plan": VERSION,
        "strategy": "hetero_ddp",
        "time_unit": "relative" if file.is_relative else "s",
        "global_batch_size": cluster.global_batch_size,
        "world_size": cluster.world_size,
        "devices": [
            {
                "name": one.kind.name,
                "count": one.kind.count,
                "min_samples": one.min_samples,
                "max_samples": one.max_samples,
                "min_own_time": one.min_own_s,
                "max_own_time": one.max_own_s,
                "min_waiting_time": one.min_waiting_s,
                "max_waiting_time": one.max_waiting_s,
            }
            for one in plan.kinds
        ],
        **_set_fields(plan.whole, file.is_relative),
        "ddp": {"step_time": plan.ddp_step_s, "does_not_fit": plan.ddp_does_not_fit},
        "speed_up": plan.speed_up,
        "efficiency": plan.efficiency,
        "communication_time": cluster.all_reduce.total_s(cluster.world_size),
        "exposed_communication_time": plan.exposed_communication_s,
        "fastest": _other_set(plan.fastest, file.is_relative),
        "cheapest": _other_set(plan.cheapest, file.is_relative),
        "rounding": plan.rounding,
        "enough_global_batch_size": plan.enough_global_batch_size,
        "notes": list(file.notes),
    }


def _set_fields(devices: DeviceSet, is_relative: bool) -> dict[str, Any]:
    return {
        "step_time": devices.step_s,
        "samples_per_time": devices.samples_per_s,
        "cost_per_million_samples": None if is_relative else devices.cost_per_million_samples,
    }


def _other_set(devices: DeviceSet | None, is_relative: bool) -> dict[str, Any] | None:
    return None if devices is None else {"counts": list(devices.counts), **_set_fields(devices, is_relative)}


def pipeline_document(cluster: PipelineCluster, prediction: PipelinePrediction) -> dict[str, Any]:
    """Return the document of ``strategy: hetero_pipeline``.

    ``stages`` has the first stage first. ``needed_bytes``, ``uniform.fits`` and ``alone.fits`` are null if no memory is
    known. ``better_micro_batches`` is null if no other number would be better.
    """
    advice = prediction.advice
    better = advice.better_micro_batches
    return {
        "lightning_hetero_plan": VERSION,
        "strategy": "hetero_pipeline",
        "time_unit": "s",
        "schedule": cluster.schedule,
        "num_microbatches": cluster.micro_batches,
        "stages": [
            {
                "rank": stage.rank,
                "device": stage.device.name,
                "first_layer": stage.first_layer,
                "num_layers": stage.num_layers,
                "busy_time": stage.busy_s,
                "needed_bytes": stage.needed_bytes,
            }
            for stage in prediction.stages
        ],
        "step_time": advice.step_s,
        "uniform": {"step_time": advice.uniform_step_s, "fits": prediction.uniform_fits},
        "speed_up": advice.uniform_step_s / advice.step_s,
        "alone": {"rank": advice.fastest_rank, "step_time": advice.alone_s, "fits": advice.fits_alone},
        "better_micro_batches": None if better is None else {"number": better, "step_time": advice.better_step_s},
        "is_refined": prediction.is_refined,
    }
