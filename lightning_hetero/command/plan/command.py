"""Predict shares or stages, step time and speed-up of a cluster described in YAML.

Nothing is started, and none of the devices is needed: the file gives their
speeds, and the sizes of the batch and of the model.
"""

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

All keys follow, with units in their names. An asterisk marks required keys.

  strategy              The strategy to predict: hetero_ddp, which divides the
                        batch (default), hetero_fsdp, which also divides the
                        model by memory, hetero_pipeline, which divides the
                        layers, or auto: all of them, and which to take.

keys with strategy: hetero_ddp
  global_batch_size *   Number of samples of all devices in a training step.
  batch_multiple        Number that every device's samples are a multiple of,
                        except on one device, which takes the remainder
                        (default: 1).
  gradient_megabytes    Size of the gradients: one number, or a list with one
                        number for each parameter of the model.
  parameters            Instead of gradient_megabytes, the number of 32-bit
                        numbers in the model, or a list in the same way.
  link_gigabits_per_s   Bandwidth of the slowest link in the ring of the
                        all-reduce. Without it, transfers take no time.
  latency_us            Latency of one message on such a link (default: 0).
  memory_megabytes_per_sample
                        Memory that each sample needs. It limits the samples
                        of devices with memory_gigabytes.
  memory_megabytes_fixed
                        Memory that a device needs in addition, whatever its
                        number of samples (default: 0).
  devices *             List with one entry for each kind of device, which has
                        exactly one of samples_per_s, milliseconds_per_sample,
                        speed and probe:
    name *              Name to show. Leave it out with probe.
    count               Number of these devices (default: 1).
    samples_per_s       Speed of one device with large batches.
    milliseconds_per_sample
                        Time that each further sample takes on one device.
    overhead_ms         Overhead of every step, whatever its size (default: 0).
    speed               Speed relative to the other devices, if only the ratios
                        are known.
    probe               File with the output of `lightning-hetero probe
                        --measure --json`, relative to this file. It contains
                        the devices, their names, memory and speeds.
    max_batch_size      Most samples that one device gets.
    memory_gigabytes    Memory of one device, of which 92 % is used.
    price_per_hour      Price of one device, in any currency. Give it for all
                        devices or for none.

keys with strategy: hetero_fsdp, besides those of hetero_ddp; parameters or
gradient_megabytes and, for every device, memory_gigabytes are then required
  units *               Number of units, for example of transformer blocks.
  optimizer_states      Numbers that the optimiser keeps for each parameter: 2
                        for Adam (default), 0 for plain SGD.

keys with strategy: hetero_pipeline
  devices *             List with one entry for each kind of device. The first
                        device is rank 0, which has the last stage.
    name *              Name to show.
    count               Number of these devices (default: 1).
    speed *             Speed relative to the device on which the layers were
                        timed.
    memory_gigabytes    Memory of one device, of which 92 % is used.
  layers *              Number of equal layers, which the next three keys
                        describe; or a list with one entry for each layer, with
                        forward_ms *, backward_ms *, parameter_megabytes and
                        activation_megabytes. Times and activations are those
                        of one micro-batch.
  layer_milliseconds    Forward and backward pass of an equal layer; required
                        with a number of layers.
  layer_parameter_megabytes
                        Size of an equal layer's parameters (default: 0).
  layer_activation_megabytes
                        Size of the activations that an equal layer keeps for
                        its backward pass (default: 0).
  num_microbatches      Number of micro-batches per step (default: 4).
  schedule              Pipeline schedule: 1f1b (default) or gpipe.
  transfer_ms           Time of a transfer between two stages (default: 0).
  batch_size            Number of samples per step. No more micro-batches than
                        that are recommended.
  optimizer_states      Numbers that the optimiser keeps for each parameter: 2
                        for Adam (default), 0 for plain SGD.

keys with strategy: auto
  global_batch_size *   Number of samples of all devices in a training step.
  devices *             List with one entry for each kind of device, in the
                        order of ranks: name *, speed * relative to the device
                        on which the layers were timed, count (default: 1),
                        memory_gigabytes, and price_per_hour.
  model                 File that `lightning-hetero profile --json` has written,
                        relative to this file; or, in its place,
  layers                List with one entry for each kind of layer, in the order
                        of their calls, per sample: forward_ms *, backward_ms *,
                        activation_megabytes and output_megabytes; and besides
                        parameter_megabytes, overhead_ms (of a step, whatever
                        its size), name, and count, how many of them follow each
                        other (default: 1).
  optimizer_states      With layers: numbers that the optimiser keeps for each
                        parameter: 2 for Adam (default), 0 for plain SGD.
  num_microbatches      Number of micro-batches of a pipeline's step
                        (default: 8).
  link_gigabits_per_s, latency_us
                        As above, for all-reduces, shards and stages.

keys of the object that --json prints
  with all strategies: lightning_hetero_plan (the version of the format, 1),
    strategy, time_unit ("s" for seconds, or "relative" for the time that the
    slowest device needs for one sample), step_time, speed_up (over equal shares
    or equal numbers of layers)
  with hetero_ddp: global_batch_size, world_size, devices (name, count, and min_
    and max_ of samples, own_time and waiting_time), samples_per_time,
    cost_per_million_samples, ddp (step_time, does_not_fit), efficiency,
    communication_time, exposed_communication_time, fastest and cheapest
    (counts, step_time, samples_per_time, cost_per_million_samples), rounding,
    enough_global_batch_size, notes
  with hetero_fsdp: global_batch_size, world_size, devices (name, count,
    samples, shard, needed_bytes, own_time), sharded_bytes, gathered_bytes,
    communication_time, exposed_communication_time, even (step_time,
    does_not_fit; with equal batches and equal shards), notes
  with hetero_pipeline: schedule, num_microbatches, stages (rank, device,
    first_layer, num_layers, busy_time, needed_bytes), uniform (step_time,
    fits), alone (rank, step_time, fits), better_micro_batches (number,
    step_time), is_refined
  with auto, in place of step_time and speed_up: chosen (the strategy to take),
    candidates (strategy, argument, the code for Trainer's `strategy`,
    step_time, needed_bytes per kind of device, cost_per_million_samples,
    why_not)
  A value that does not apply is null.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``plan``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("file", type=Path, metavar="cluster.yaml", help="File that describes the cluster.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")


def run(options: argparse.Namespace) -> None:
    """Print the prediction.

    Args:
        options: Parsed options, with the attributes ``file`` and ``json``.

    Raises:
        HeteroError: The file is wrong, or no plan is possible; the message names the file.
    """
    # imported here, because only this command needs numpy and rich
    from lightning_hetero.command.plan.cluster_file import read_cluster_file
    from lightning_hetero.command.plan.predictions import predicted
    from lightning_hetero.exceptions import ConfigurationError, HeteroError

    file = read_cluster_file(options.file)
    try:
        prediction = predicted(file)
    except HeteroError as error:
        raise ConfigurationError(f"{options.file}: {error}") from None
    if options.json:
        print(json.dumps(prediction.document(), indent=2, allow_nan=False))  # noqa: T201  # a command prints
    else:
        prediction.show()
