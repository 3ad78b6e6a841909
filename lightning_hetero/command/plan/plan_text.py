"""Print a prediction as a table and notes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_hetero.command.plan.cluster import Cluster
from lightning_hetero.command.plan.cluster_file import ClusterFile
from lightning_hetero.command.plan.cluster_plan import ClusterPlan, DeviceSet
from lightning_hetero.command.plan.pipeline.pipeline_cluster import PipelineCluster, PipelinePrediction

__all__ = ["console", "print_cluster_plan", "print_pipeline", "short"]

_SHOWN_KINDS = 40


def console() -> Console:
    """Return a console as wide as the terminal, or of 80 columns without one; it interprets no markup."""
    width = None if Console().is_terminal else 80
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def print_cluster_plan(file: ClusterFile, cluster: Cluster, plan: ClusterPlan) -> None:
    """Print shares, step time and better alternatives.

    Args:
        file: File that describes the cluster.
        cluster: Cluster of the prediction.
        plan: Prediction to print.
    """
    out = console()
    number = f"{cluster.world_size} device{'s' if cluster.world_size > 1 else ''}"
    out.print(f"hetero_ddp on {number}, global batch of {cluster.global_batch_size} samples; per device:")
    out.print(_shares_table(plan, file.is_relative))
    if len(plan.kinds) > _SHOWN_KINDS:
        out.print(f"and {len(plan.kinds) - _SHOWN_KINDS} more kinds of devices; --json lists all of them")
    for note in _data_parallel_notes(file, cluster, plan):
        out.print(f"- {note}")


def _shares_table(plan: ClusterPlan, is_relative: bool) -> Table:
    table = Table()
    unit, scale = ("units", 1.0) if is_relative else ("ms", 1e3)
    table.add_column("device", max_width=28, overflow="fold")
    table.add_column("count", justify="right", no_wrap=True)
    for heading in ("samples", f"own {unit}", f"waiting {unit}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in plan.kinds[:_SHOWN_KINDS]:
        table.add_row(
            one.kind.name,
            str(one.kind.count),
            _span(str(one.min_samples), str(one.max_samples)),
            _span(short(one.min_own_s * scale), short(one.max_own_s * scale)),
            # the device with fewer samples waits longer
            _span(short(one.max_waiting_s * scale), short(one.min_waiting_s * scale)),
        )
    return table


def _span(one: str, other: str) -> str:
    return one if one == other else f"{one} to {other}"


def short(value: float) -> str:
    """Return a number with at most four digits, or as an integer if it is large; rounding errors become 0."""
    value = value if value > 1e-9 else 0.0
    if value >= 1e7 or 0 < value < 1e-2:
        return f"{value:.3g}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _data_parallel_notes(file: ClusterFile, cluster: Cluster, plan: ClusterPlan) -> list[str]:
    unit = "unit" if file.is_relative else "second"

    def time(seconds: float) -> str:
        return f"{short(seconds)} units" if file.is_relative else f"{short(1e3 * seconds)} ms"

    def rate(samples_per_s: float) -> str:
        return f"{short(samples_per_s)} samples per {unit}"

    found = [f"a step takes {time(plan.whole.step_s)}: {rate(plan.whole.samples_per_s)}"]
    if plan.ddp_step_s is None:
        found.append(f"plain ddp, with equal shares, cannot train: {plan.ddp_does_not_fit}")
    else:
        ddp_rate = rate(cluster.global_batch_size / plan.ddp_step_s)
        found.append(f"plain ddp, with equal shares: {time(plan.ddp_step_s)}, {ddp_rate}; speed-up {plan.speed_up:.2f}")
    found.append(
        f"efficiency: {plan.efficiency:.0%} of the samples per {unit} that the devices could process without waiting"
    )
    if plan.exposed_communication_s > 0:
        found.append(
            f"the all-reduce adds {time(plan.exposed_communication_s)} to a step; it takes"
            f" {time(cluster.all_reduce.total_s(cluster.world_size))}, and the rest overlaps with the backward pass"
        )
    if plan.whole.cost_per_million_samples is not None and not file.is_relative:
        found.append(f"a million samples cost {short(plan.whole.cost_per_million_samples)}")
    if plan.fastest is not None:
        left_out = _left_out(cluster, plan.fastest)
        gain = plan.whole.step_s / plan.fastest.step_s - 1
        found.append(
            f"leave out {left_out}: a step then takes {time(plan.fastest.step_s)}, with {gain:.0%} more samples per"
            f" {unit}"
        )
    if plan.cheapest is not None:
        found.append(_cheapest_sentence(file, cluster, plan, plan.cheapest))
    if plan.enough_global_batch_size is not None:
        found.append(
            f"the global batch is too small for the ratio of speeds: rounding to whole samples costs"
            f" {plan.rounding:.0%} of a step; use a global batch of about {plan.enough_global_batch_size} samples or"
            f" more"
        )
    if file.is_relative:
        found.append("only relative speeds are known: a unit is the time that the slowest device needs for one sample")
    return found + list(file.notes)


def _left_out(cluster: Cluster, devices: DeviceSet) -> str:
    missing = [
        f"{kind.count - kept} of {kind.count} {kind.name}" if kept else f"all {kind.count} {kind.name}"
        for kind, kept in zip(cluster.kinds, devices.counts, strict=True)
        if kept < kind.count
    ]
    return ", ".join(missing[:5]) + (f" and devices of {len(missing) - 5} more kinds" if len(missing) > 5 else "")


def _cheapest_sentence(file: ClusterFile, cluster: Cluster, plan: ClusterPlan, cheapest: DeviceSet) -> str:
    used = [f"{n} {kind.name}" for kind, n in zip(cluster.kinds, cheapest.counts, strict=True) if n]
    names = ", ".join(used[:5]) + (f" and devices of {len(used) - 5} more kinds" if len(used) > 5 else "")
    cost, whole = cheapest.cost_per_million_samples or 0.0, plan.whole.cost_per_million_samples or 1.0
    price = "" if file.is_relative else f"{short(cost)} per million samples, "
    return (
        f"samples cost least on {names}: {price}{1 - cost / whole:.0%} less than on all devices, and a step takes"
        f" {short(cheapest.step_s / plan.whole.step_s)} times as long"
    )


def print_pipeline(cluster: PipelineCluster, prediction: PipelinePrediction) -> None:
    """Print stages, step time and better alternatives.

    Args:
        cluster: Cluster of the prediction.
        prediction: Prediction to print.
    """
    out = console()
    out.print(
        f"hetero_pipeline: {len(cluster.layers)} layers on {len(cluster.devices)} devices, {cluster.micro_batches}"
        f" micro-batches, {cluster.schedule}"
    )
    table = Table()
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("device", max_width=28, overflow="fold")
    for heading in ("layers", "from", "busy ms", "idle ms", "GB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, stage in enumerate(prediction.stages):
        table.add_row(
            str(number),
            str(stage.rank),
            stage.device.name,
            str(stage.num_layers),
            str(stage.first_layer),
            short(1e3 * stage.busy_s),
            short(1e3 * (prediction.advice.step_s - stage.busy_s)),
            "" if stage.needed_bytes is None else f"{stage.needed_bytes / 1e9:.3g}",
        )
    out.print(table)
    for note in _pipeline_notes(cluster, prediction):
        out.print(f"- {note}")


def _pipeline_notes(cluster: PipelineCluster, prediction: PipelinePrediction) -> list[str]:
    advice = prediction.advice
    fastest = cluster.devices[advice.fastest_rank].name
    uniform = f"{short(1e3 * advice.uniform_step_s)} ms; speed-up {advice.uniform_step_s / advice.step_s:.2f}"
    if prediction.uniform_fits is False:
        uniform += ", but these stages do not fit into memory"
    alone = {
        True: "the model fits into its memory",
        False: "but the model does not fit into its memory",
        None: "if the model fits into its memory",
    }[advice.fits_alone]
    found = [
        f"a step takes {short(1e3 * advice.step_s)} ms",
        f"with equal numbers of layers: {uniform}",
        f"the fastest device, {fastest} (rank {advice.fastest_rank}), alone: {short(1e3 * advice.alone_s)} ms; {alone}",
    ]
    if advice.alone_s < advice.step_s and advice.fits_alone is not False:
        found.append(f"use {fastest} alone: it is {advice.step_s / advice.alone_s:.2f} times as fast as this pipeline")
    if advice.better_micro_batches is not None:
        found.append(
            f"{advice.better_micro_batches} micro-batches instead of {advice.micro_batches}:"
            f" {short(1e3 * advice.better_step_s)} ms, if smaller ones cost as much per sample"
        )
    if not prediction.is_refined:
        found.append(
            "with this many devices, layers and micro-batches, only the slowest stage was minimised; hetero_pipeline"
            " also tries moves of single layers, and may find a slightly faster plan"
        )
    return found
