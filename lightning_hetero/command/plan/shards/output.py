"""Print a prediction for shards, as a table with notes or as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from lightning_hetero.command.plan.cluster import MEMORY_FRACTION
from lightning_hetero.command.plan.plan_text import console, short
from lightning_hetero.command.plan.shards.prediction import ShardedCluster, ShardedPrediction

__all__ = ["print_shards", "shards_document"]

VERSION = 1


def print_shards(sharded: ShardedCluster, prediction: ShardedPrediction, notes: tuple[str, ...]) -> None:
    """Print samples, shards, memory and step time.

    Args:
        sharded: Cluster and training of the prediction.
        prediction: Prediction to print.
        notes: Notes about the input.
    """
    out, cluster = console(), sharded.cluster
    out.print(
        f"hetero_fsdp on {cluster.world_size} devices, global batch of {cluster.global_batch_size} samples; per device:"
    )
    table = Table()
    table.add_column("device", max_width=28, overflow="fold")
    for heading in ("count", "samples", "shard %", "GB needed", "GB usable", "own ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in prediction.kinds:
        table.add_row(
            one.kind.name,
            str(one.kind.count),
            str(one.samples),
            f"{100 * one.weight:.1f}",
            f"{one.needed_bytes / 1e9:.3g}",
            f"{MEMORY_FRACTION * (one.kind.memory_bytes or 0.0) / 1e9:.3g}",
            f"{short(1e3 * one.kind.step_time.seconds(one.samples))}",
        )
    out.print(table)
    for note in [*_sentences(sharded, prediction), *notes]:
        out.print(f"- {note}")


def _sentences(sharded: ShardedCluster, prediction: ShardedPrediction) -> list[str]:
    step, memory, batch = prediction.step, sharded.memory, sharded.cluster.global_batch_size
    found = [
        f"a step takes {short(1e3 * step.step_s)} ms: {short(batch / step.step_s)} samples per second",
        f"parameters, gradients and states of the optimiser take {memory.sharded_bytes / 1e9:.3g} GB in shards, and"
        f" what is whole at a time {memory.gathered_bytes / 1e9:.3g} GB on every device",
    ]
    if prediction.even is None:
        found.append(f"equal batches and equal shards do not fit: {prediction.even_does_not_fit}")
    else:
        found.append(
            f"with equal batches and equal shards: {short(1e3 * prediction.even.step_s)} ms; speed-up"
            f" {prediction.speed_up:.2f}"
        )
    if step.link_s:
        found.append(
            f"the link is busy for {short(1e3 * step.link_s)} ms, of which {short(1e3 * (step.step_s - step.own_s))} ms"
            f" do not overlap"
        )
    return found


def shards_document(sharded: ShardedCluster, prediction: ShardedPrediction, notes: tuple[str, ...]) -> dict[str, Any]:
    """Return the document that ``--json`` prints with ``strategy: hetero_fsdp``."""
    step = prediction.step
    return {
        "lightning_hetero_plan": VERSION,
        "strategy": "hetero_fsdp",
        "time_unit": "s",
        "global_batch_size": sharded.cluster.global_batch_size,
        "world_size": sharded.cluster.world_size,
        "devices": [
            {
                "name": one.kind.name,
                "count": one.kind.count,
                "samples": one.samples,
                "shard": one.weight,
                "needed_bytes": one.needed_bytes,
                "own_time": one.kind.step_time.seconds(one.samples),
            }
            for one in prediction.kinds
        ],
        "sharded_bytes": sharded.memory.sharded_bytes,
        "gathered_bytes": sharded.memory.gathered_bytes,
        "step_time": step.step_s,
        "communication_time": step.link_s,
        "exposed_communication_time": step.step_s - step.own_s,
        "even": {
            "step_time": None if prediction.even is None else prediction.even.step_s,
            "does_not_fit": prediction.even_does_not_fit,
        },
        "speed_up": prediction.speed_up,
        "notes": list(notes),
    }
