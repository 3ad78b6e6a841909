"""Predict shares or stages, step time and speed-up of a cluster described in YAML."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["add_arguments", "run"]

_EPILOG = """\
a minimal cluster.yaml:
  global_batch_size: 256
  devices:
    - name: V100
      count: 2
      samples_per_s: 400
    - name: K80
      count: 4
      samples_per_s: 90

all keys, units in their names (* must be there):
  strategy              hetero_ddp (the default) or hetero_pipeline
  global_batch_size *   samples of all devices in a step
  batch_multiple        every device's samples are a multiple of this
  gradient_megabytes    one number, or a list with one for each parameter
  parameters            instead, how many numbers of 32 bits; likewise
  link_gigabits_per_s   the slowest link of the ring; latency_us beside it
  memory_megabytes_per_sample, memory_megabytes_fixed
                        what a device holds of a sample, and besides
  devices *             a list; an entry has
    name *, count       count is 1 where it is missing
    samples_per_s       or milliseconds_per_sample; overhead_ms of a step
    speed               instead, where only ratios are known
    probe               instead, what `lightning-hetero probe --measure --json`
                        printed; devices and their names are in there
    max_batch_size, memory_gigabytes, price_per_hour

of hetero_pipeline:
  devices *             name *, count, speed *, memory_gigabytes; the first
                        one is rank 0, which has the last stage
  layers *              a number of equal ones, with layer_milliseconds *,
                        layer_parameter_megabytes, layer_activation_megabytes;
                        or a list of {forward_ms *, backward_ms *,
                        parameter_megabytes, activation_megabytes}; times of
                        one micro-batch on a device of speed 1
  num_microbatches      4 where it is missing; schedule: 1f1b or gpipe
  transfer_ms, batch_size, optimizer_states (2, as of Adam)

--json prints one object; its keys are lightning_hetero_plan (the version, 1),
strategy, time_unit ("s" or "relative"), step_time, speed_up, and
  hetero_ddp:      global_batch_size, world_size, devices (name, count,
                   min_ and max_ of samples, own_time, waiting_time),
                   samples_per_time, cost_per_million_samples, ddp (step_time,
                   does_not_fit), efficiency, communication_time,
                   exposed_communication_time, fastest and cheapest (counts,
                   step_time, samples_per_time, cost_per_million_samples),
                   rounding, enough_global_batch_size, notes
  hetero_pipeline: schedule, num_microbatches, stages (rank, device,
                   first_layer, num_layers, busy_time, needed_bytes), uniform
                   (step_time, fits), alone (rank, step_time, fits),
                   better_micro_batches (number, step_time), is_refined
What does not apply is null.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``plan`` takes."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("file", type=Path, metavar="cluster.yaml", help="the description of the cluster")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> None:
    """Print the prediction.

    Raises:
        HeteroError: the file is wrong, or no plan is possible; the message names the file.
    """
    # numpy and rich are only for this command
    from lightning_hetero.command.plan.cluster import Cluster
    from lightning_hetero.command.plan.cluster_file import read_cluster_file
    from lightning_hetero.exceptions import ConfigurationError, HeteroError

    file = read_cluster_file(options.file)
    cluster = file.cluster
    try:
        if isinstance(cluster, Cluster):
            from lightning_hetero.command.plan.cluster_plan import plan_cluster

            plan = plan_cluster(cluster)
        else:
            from lightning_hetero.command.plan.pipeline_cluster import predict_pipeline

            prediction = predict_pipeline(cluster)
    except HeteroError as error:
        raise ConfigurationError(f"{options.file}: {error}") from None
    if options.json:
        from lightning_hetero.command.plan.plan_json import cluster_document, pipeline_document

        document = (
            cluster_document(file, cluster, plan)
            if isinstance(cluster, Cluster)
            else pipeline_document(cluster, prediction)
        )
        print(json.dumps(document, indent=2, allow_nan=False))  # noqa: T201  # a command prints
        return
    from lightning_hetero.command.plan.plan_text import print_cluster_plan, print_pipeline

    if isinstance(cluster, Cluster):
        print_cluster_plan(file, cluster, plan)
    else:
        print_pipeline(cluster, prediction)
