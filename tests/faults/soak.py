"""Train for half an hour on ranks that slow down, stall, die and change in number; count what was lost.

    tox -e soak -- --minutes 30

A third of the time two ranks train without being killed, which is when memory and file descriptors are looked at; then
one job follows the other, each on another number of ranks, killed at drawn moments and started again by torchrun.  At
the end each sample of each epoch has to be in the ledger exactly once, and the parameters have to be those of a single
process.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from faults.job import Fault
from faults.launch import attempts, found, job, ledger, one_node, run
from training import largest_difference, reference_batches, reference_parameters

BATCH, SIZE = 24, 250
STEPS_AN_EPOCH = -(-SIZE // BATCH)
WITHOUT_KILLS = 1 / 3
# of the memory that a rank has after its first epochs; torch's allocator and Python's heap keep what they once had
MOST_GROWTH = 0.05


@dataclass
class Happened:
    """What was done to the training so far."""

    epochs: int = 0
    jobs: int = 0
    kills: int = 0
    stalls: int = 0
    world_sizes: list[int] = field(default_factory=list)


def draw_faults(rng: random.Random, ranks: int, first_step: int, steps: int, *, kills: bool) -> list[Fault]:
    """Return what happens in the next job, in its order."""
    faults = []
    for step in sorted(rng.sample(range(first_step + 1, first_step + steps), rng.randint(1, 3))):
        rank = rng.randrange(ranks)
        if kills and rng.random() < 0.7:
            faults.append(Fault(rank, "kill", rng.choice(["step", "step", "checkpoint", "validation"]), step))
        else:
            faults.append(Fault(rank, "stop", "step", step, seconds=rng.uniform(0.5, 3)))
    return faults


def one_job(folder: Path, rng: random.Random, ranks: int, epochs: int, done: Happened, *, kills: bool) -> float:
    """Go on for some epochs; fail where a sample is lost or repeated, or where the job hangs or leaves processes.

    Returns:
        The seconds that it took.
    """
    faults = draw_faults(rng, ranks, done.epochs * STEPS_AN_EPOCH, epochs * STEPS_AN_EPOCH, kills=kills)
    for mark in folder.glob("fault-*.happened"):
        mark.unlink()
    done.epochs += epochs
    done.jobs += 1
    done.world_sizes.append(ranks)
    argument = job(
        folder, ranks, *faults, batch=BATCH, size=SIZE, epochs=done.epochs, seconds_per_sample=0.001,
        factors=[1.0 + rank for rank in range(ranks)], weather=rng.randrange(1 << 30),
    )  # fmt: skip
    deaths = sum(fault.what == "kill" for fault in faults)
    (ended,) = run(folder, [one_node(ranks, argument, restarts=deaths + 1)], timeout_s=600 + 5 * epochs)
    assert ended.status == 0, ended.text
    taken = found(folder, ranks)[0]["steps"]
    assert taken == done.epochs * STEPS_AN_EPOCH, f"{ended.text}\n{taken} steps in {done.epochs} epochs"
    happened = len(list(folder.glob("fault-*.happened")))
    done.kills += sum(fault.what == "kill" for fault in faults[:happened])
    done.stalls += sum(fault.what == "stop" for fault in faults[:happened])
    check_ledger(folder, done.epochs)
    print(
        f"{done.jobs} jobs, {done.epochs} epochs; ranks {ranks}, {deaths} kills, {len(faults) - deaths} stalls: whole"
    )
    sys.stdout.flush()
    return ended.seconds


def check_ledger(folder: Path, epochs: int) -> None:
    """Fail where a sample of an epoch is missing, or there twice."""
    expected, last = reference_batches(SIZE, BATCH, epochs), ledger(folder)
    assert sorted(last) == list(range(len(expected)))
    for step, members in enumerate(expected):
        drawn = sorted(index for entry in last[step] for index in entry["samples"])
        assert drawn == sorted(members), f"step {step}: {drawn} for {sorted(members)}"


def growth(folder: Path, ranks: int) -> list[tuple[int, int, int, int]]:
    """Return for each rank its memory and file descriptors early in the long job, and at its end."""
    rows = []
    for rank in range(ranks):
        lines = (folder / f"resources-{rank}.jsonl").read_text(encoding="utf-8").splitlines()
        readings = [json.loads(line) for line in lines]
        early, late = readings[len(readings) // 5], readings[-1]
        rows.append((early["rss_bytes"], late["rss_bytes"], early["descriptors"], late["descriptors"]))
    return rows


def main() -> None:
    """Run the soak and print what came of it."""
    parser = argparse.ArgumentParser(description="train on ranks that slow down, stall, die and change in number")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    options = parser.parse_args()
    rng, started, done = random.Random(options.seed), time.monotonic(), Happened()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # how long an epoch takes on this machine, without the start
        short_s = one_job(folder, rng, 2, 2, done, kills=False)
        an_epoch_s = max(one_job(folder, rng, 2, 22, done, kills=False) - short_s, 4.0) / 20
        for rank in range(2):
            (folder / f"resources-{rank}.jsonl").unlink()
        epochs = max(int(60 * options.minutes * WITHOUT_KILLS / an_epoch_s), 10)
        one_job(folder, rng, 2, epochs, done, kills=False)
        rows = growth(folder, 2)
        while time.monotonic() - started < 60 * options.minutes - 30:
            one_job(folder, rng, rng.choice([1, 2, 2, 3, 4]), rng.randint(10, 40), done, kills=True)
        expected = reference_parameters(SIZE, BATCH, done.epochs * STEPS_AN_EPOCH)
        results = found(folder, done.world_sizes[-1])
        difference = max(largest_difference(result["parameters"], expected) for result in results)
        restarts = len(attempts(folder)) - done.jobs
    print(
        f"{(time.monotonic() - started) / 60:.1f} minutes, {done.jobs} jobs on {sorted(set(done.world_sizes))} ranks,"
        f" {restarts} restarts, {done.kills} kills, {done.stalls} stalls; {done.epochs} epochs,"
        f" {done.epochs * STEPS_AN_EPOCH} steps, {done.epochs * SIZE} samples: 0 lost, 0 repeated;"
        f" largest difference of a parameter from a single process {difference:.1e}"
    )
    for rank, (early, late, descriptors, descriptors_late) in enumerate(rows):
        print(
            f"rank {rank} of the job without kills: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB at the end;"
            f" {descriptors} file descriptors early, {descriptors_late} at the end"
        )
        assert late < early * (1 + MOST_GROWTH), "memory grows"
        assert descriptors_late <= descriptors, "file descriptors are lost"
    assert difference < 1e-8, "this is another training"


if __name__ == "__main__":
    main()
