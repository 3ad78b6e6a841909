"""The texts of docs/explanation/benchmarks.md, without what was measured."""

from __future__ import annotations

__all__ = [
    "COLUMNS",
    "COST",
    "DECISIONS",
    "DETAILS",
    "DRIFT",
    "HEADER",
    "ORDERS",
    "PIPELINE",
    "PIPELINE_COLUMNS",
    "REAL",
    "REAL_PIPELINE",
    "REPLICAS",
    "SCALE",
    "TABLE",
]

HEADER = """# Benchmarks

Written by `tox -e bench`: {machine}, {cores} cores, Python {python}, torch {torch}, Lightning {lightning}, gloo, one
thread per rank, {minutes:.0f} minutes in total. Whatever is compared runs in the same processes, in turn, so the
ratios hold although the machine is shared. Samples/s are medians over rounds; each round contributes the median step
of a block of eight.

- *cold*: the first 100 steps of `strategy="hetero_ddp"`, including warm-up and tuning, but not the very first step.
- *tuned*: the split that the tuning found.
- *best fixed*: the fastest of all splits that were tried. With two ranks, every twelfth of the global batch is tried
  first, and then in each round the best three of them, the tuned split and six around it; with more ranks, those
  around the tuned split. *tuned / best* compares, in each round, with the split that was the fastest in the other
  rounds, since the best of many noisy figures is the luckiest.
- *bound*: the sum of the samples/s of each rank alone, in a Trainer without peers, with the mini-batch that it has when
  tuned.

![Throughput as a fraction of the bound](../images/benchmarks.png)

## Devices of known speed

Every rank is a process whose steps last as long as those of a device of known speed
(`lightning_hetero.testing.SlowDown`); two rounds. The last two lines have 2.6 MB of gradients and two nodes, which are
network namespaces with a link between them.

"""
COLUMNS = "devices|ddp|cold|tuned|best fixed|bound|tuned / ddp|tuned / best|tuned / bound|cold / best"
TABLE = f"| {COLUMNS.replace('|', ' | ')} |\n" + "|---" * 10 + "|\n"
DETAILS = """
| devices | split found | {solution} | changes at | predicted step ms | measured | error | spread |
|---|---|---|---|---|---|---|---|
"""
REAL = """
## Real work on processors with a quota

Each rank's computing thread may use one core for only a part of the time (the kernel's cpu controller, 10 ms period).
The thread really contends for the core, and its speed is not proportional to its quota. *Calibrated* is the speed of
each rank alone under equal shares, in the same run. The batch is so large that a step takes 120 ms at those speeds,
because a quota that refills while a rank waits makes short steps faster than its speed. The CNN trains on the digits
of scikit-learn, the transformer on characters of the standard library's source code. Five rounds; *tuned / best* is
the median (minimum to maximum).

"""
COST = """
## Equal devices

The step time of `hetero_ddp` divided by that of `ddp`: medians of {steps} steps each, in {pairs} pairs of runs; ±
standard error.

| devices | ddp step ms | ratio | changes of shares |
|---|---|---|---|
"""
PIPELINE_COLUMNS = " found / uniform | found / optimum | predicted ms | error | spread | layers found "
PIPELINE = """
## Layers in proportion to speed

Twelve equal layers, batches of 16 samples in 8 micro-batches, 1F1B; medians of two rounds of {steps} steps. *Uniform*
stages have equal numbers of layers, *found* are the stages that `hetero_pipeline` finds by timing layers. *Optimum*
is the simulated step of the best plan, on devices that need time for their layers only. *Alone* is the fastest device
with all layers.

{lines}
![Who computes which micro-batch when, with equal numbers of layers and with those found](../images/pipeline.png)

With three ranks whose layers take hardly any time, a step through the Trainer takes {through:.1f} ms, and with torch's
bare schedule {bare:.1f} ms. In two rounds the Trainer added {added} ms.
"""
ORDERS = """
## Orders of passes

Twelve equal layers, {micro_batches} micro-batches, through the Trainer: the part of the limit that each schedule
reaches, measured and, in brackets, predicted; medians of {rounds} rounds of {steps} steps. The limit is the time in
which the devices would compute all passes if none ever waited. Factors say how many times as long each device takes,
rank 0 first; *chosen* is what `"auto"` has taken, with the layers of its stages. Two ranks may share a layer, so these
may be fractions. The columns of torch are its own zero-bubble schedules with two equal stages per rank, in a plain loop
without the Trainer.

"""
REPLICAS = """
## Pipelines side by side

Twelve equal layers of which three quarters fit into a rank, batches of {samples} samples, {micro_batches} micro-batches
in each pipeline: the part of the limit that is reached, medians of {rounds} rounds of {steps} steps. *Equals* are two
pipelines of a fast and a slow rank each, with equal numbers of layers and samples; *auto* is `replicas="auto"`, and
*planned* is `schedule="auto"`.

"""
REAL_PIPELINE = """
## A transformer in stages

Eight blocks of width {width}, {micro_batches} micro-batches, on processors with quotas; the last steps, medians of
{rounds} rounds. The limit is what the times of the layers allow. A quota refills while a rank waits, so a rank that
waits less computes more slowly.

"""
DRIFT = """
## A device that slows down and recovers

Rank 0 of two equal devices becomes twice as slow at step {slow} and recovers at step {fast}. Steps are within 5 % of
the new optimum {found} steps later. Changes of shares: {changes}.
"""
SCALE = """
## At scale

{ranks} simulated ranks, one of them a straggler that takes twice as long. Steps have 3 % jitter unless stated
otherwise, and one step in two hundred takes five times as long; {seeds} training runs each. Efficiency is the step
time of the best plan divided by that of the plan at that step, both without jitter: the median (and what 99 of 100
runs reach).

| ranks | {steps} |
|---|{bars}
"""
DECISIONS = """
Time of decisions for 10,000 ranks and a global batch of 640,000 samples: {times}.
"""
