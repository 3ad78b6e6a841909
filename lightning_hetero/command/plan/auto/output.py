"""Print the predictions for all strategies, as a table with notes or as JSON."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from lightning_hetero.command.plan.auto.choice import AutoCluster, AutoPrediction, Candidate
from lightning_hetero.command.plan.cluster import MEMORY_FRACTION
from lightning_hetero.command.plan.plan_text import console, short

__all__ = ["auto_document", "print_auto"]

VERSION = 1


def print_auto(cluster: AutoCluster, prediction: AutoPrediction) -> None:
    """Print a row per strategy, which one to take, and why others cannot train this.

    Args:
        cluster: Devices and training of the prediction.
        prediction: Prediction to print.
    """
    out, model = console(), cluster.model
    out.print(
        f"{len(model.layers)} layers with {model.parameter_bytes / 1e6:.4g} MB of parameters on {cluster.world_size}"
        f" devices, global batch of {cluster.global_batch_size} samples"
    )
    prices = cluster.price_per_hour is not None
    table = Table()
    table.add_column("strategy", no_wrap=True)
    for heading in ("step ms", "samples/s", "GB per device", *(["cost per million"] if prices else [])):
        table.add_column(heading, justify="right")
    for one in prediction.candidates:
        if one.step_s is None:
            table.add_row(one.strategy, "-", "-", "-", *(["-"] if prices else []))
            continue
        cost = _cost(cluster, one)
        table.add_row(
            f"{one.strategy} *" if one is prediction.chosen else one.strategy,
            short(1e3 * one.step_s),
            short(cluster.global_batch_size / one.step_s),
            _memory(cluster, one),
            *([] if cost is None else [short(cost)]),
        )
    out.print(table)
    for note in _notes(cluster, prediction):
        out.print(f"- {note}")


def _memory(cluster: AutoCluster, one: Candidate) -> str:
    if one.needed_bytes is None:
        return ""
    pairs = zip(one.needed_bytes, cluster.devices, strict=True)
    return ", ".join(
        f"{needed / 1e9:.3g}"
        + ("" if device.memory_bytes is None else f" of {MEMORY_FRACTION * device.memory_bytes / 1e9:.3g}")
        for needed, device in pairs
    )


def _notes(cluster: AutoCluster, prediction: AutoPrediction) -> list[str]:
    chosen, found = prediction.chosen, []
    if chosen is None:
        found.append("none of them can train this: use more or larger devices, a smaller batch, or a smaller model")
    else:
        found.append(f"take Trainer(strategy={chosen.argument}, devices={cluster.world_size})")
        faster = [one for one in prediction.candidates if one.step_s is not None and one.step_s < (chosen.step_s or 0)]
        if faster:
            found.append(f"{faster[-1].strategy} is predicted to be less than 2 % faster, and is less simple")
    found += [f"{one.strategy} cannot train this: {one.why_not}" for one in prediction.candidates if one.why_not]
    if cluster.bits_per_s is None and cluster.world_size > 1:
        found.append("communication is ignored, which may decide; to include it, give link_gigabits_per_s")
    if all(device.memory_bytes is None for device in cluster.devices):
        found.append("memory is ignored; to include it, give memory_gigabytes of the devices")
    return found


def _cost(cluster: AutoCluster, one: Candidate) -> float | None:
    price = cluster.price_per_hour
    if price is None or one.step_s is None:
        return None
    return price / 3600 * one.step_s / cluster.global_batch_size * 1e6


def auto_document(cluster: AutoCluster, prediction: AutoPrediction) -> dict[str, Any]:
    """Return the document that ``--json`` prints with ``strategy: auto``."""
    return {
        "lightning_hetero_plan": VERSION,
        "strategy": "auto",
        "time_unit": "s",
        "global_batch_size": cluster.global_batch_size,
        "world_size": cluster.world_size,
        "num_microbatches": cluster.micro_batches,
        "chosen": None if prediction.chosen is None else prediction.chosen.strategy,
        "candidates": [
            {
                "strategy": one.strategy,
                "argument": one.argument,
                "step_time": one.step_s,
                "needed_bytes": None if one.needed_bytes is None else list(one.needed_bytes),
                "cost_per_million_samples": _cost(cluster, one),
                "why_not": one.why_not,
            }
            for one in prediction.candidates
        ],
    }
