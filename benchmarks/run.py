"""Measure all scenarios and write docs/benchmarks.md and its plot.

python benchmarks/run.py                # all
python benchmarks/run.py 1:2 equal      # some; prints them and writes nothing
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scenarios import SCENARIOS, Scenario

from lightning_hetero.balance.batch_solver import solve_batch
from lightning_hetero.balance.types import StepTime

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
TIMEOUT_S = 300

HEADER = """# Benchmarks

Written by `tox -e bench`: {machine}, {cores} cores, Python {python}, torch {torch}, Lightning {lightning}, gloo, one
thread a rank, {minutes:.0f} minutes in all. Every rank is a process whose steps last as long as those of a device of
known speed (`lightning_hetero.testing.SlowDown`); what is compared runs in the same processes, in turn, so the ratios
hold although the machine is shared. Samples/s are medians of blocks of ten steps, over three rounds.

- *cold*: the first 100 steps of `strategy="hetero_ddp"`, warm-up and tuning included (the very first step not).
- *tuned*: the split that the tuning found.
- *best fixed*: the fastest of the tuned split and six others around it.
- *bound*: the sum of what each rank processes alone, in a Trainer without peers, at the mini-batch that it has when
  tuned.

![Throughput as a part of the bound](benchmarks.png)

| devices | ddp | cold | tuned | best fixed | bound | tuned / ddp | tuned / best | tuned / bound | cold / best |
|---|---|---|---|---|---|---|---|---|---|
"""

DETAILS = """
| devices | split found | optimum of devices | changes at | predicted step ms | measured | error | spread of rounds |
|---|---|---|---|---|---|---|---|
"""

DETAILS = """
| devices | split found | optimum of devices | changes at | predicted step ms | measured | error | spread |
|---|---|---|---|---|---|---|---|
"""

THROTTLED = """
## A device that slows down and recovers

Rank 0 of two equal devices becomes twice as slow at step {slow} and recovers at step {fast}: {found} steps pass until
steps are within 5 % of the new optimum. Changes of shares: {changes}.

## Solver

10,000 ranks, global batch 640,000: {solver_ms:.1f} ms (median of 20).
"""


def measured(name: str, scenario: Scenario) -> dict[str, Any]:
    """Run a scenario in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(scenario.world_size), str(HERE / "scenario.py"), name, str(path)]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"})
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result


def row(name: str, r: dict[str, Any]) -> str:
    """Return a line of the first table."""
    rates = " | ".join(f"{r[key]:.0f}" for key in ("ddp", "cold", "tuned", "best", "bound"))
    ratios = ((r["tuned"], r["ddp"]), (r["tuned"], r["best"]), (r["tuned"], r["bound"]), (r["cold"], r["best"]))
    return f"| {name} | {rates} | " + " | ".join(f"{a / b:.3f}" for a, b in ratios) + " |"


def details(name: str, r: dict[str, Any]) -> str:
    """Return a line of the second table."""
    predicted, found = r["predicted_s"] * 1e3, r["measured_s"] * 1e3
    splits = " | ".join(":".join(map(str, r[key])) for key in ("plan", "solution"))
    changes = ", ".join(map(str, r["changes"])) or "none"
    error = predicted / found - 1
    return f"| {name} | {splits} | {changes} | {predicted:.1f} | {found:.1f} | {error:+.1%} | {r['spread']:.1%} |"


def solver_ms(world_size: int = 10_000) -> float:
    """Return the milliseconds that the solver takes for many ranks."""
    times = [StepTime(0.01 + 1e-6 * (r % 97), 0.001 * (1 + r % 4)) for r in range(world_size)]
    found = []
    for _ in range(20):
        start_s = time.perf_counter()
        solve_batch(times, 64 * world_size, min_samples=1)
        found.append((time.perf_counter() - start_s) * 1e3)
    return sorted(found)[10]


def plot(results: dict[str, dict[str, Any]], throttled: dict[str, Any], path: Path) -> None:
    """Draw throughput against the bound, and the steps of the throttled run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 1))
    kinds = {"ddp": "#999999", "cold": "#8fbbe6", "tuned": "#1f6fb4", "best": "#2f9e63"}
    for i, (kind, colour) in enumerate(kinds.items()):
        heights = [r[kind] / r["bound"] for r in results.values()]
        left.bar([x + (i - 1.5) * 0.2 for x in range(len(heights))], heights, 0.2, label=kind, color=colour)
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(results)), results, rotation=15, ha="right")
    left.set_ylabel("samples/s, as a part of the bound")
    left.legend(ncols=4, loc="lower right")
    right.plot([s * 1e3 for s in throttled["step_s"][1:]], color=kinds["tuned"], linewidth=1)
    right.set(xlabel="training step", ylabel="ms", title="rank 0 throttled, then recovered", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure the scenarios named on the command line, or all of them."""
    start_s, names = time.perf_counter(), sys.argv[1:] or list(SCENARIOS)
    results = {}
    for name in names:
        results[name] = measured(name, SCENARIOS[name])
        print(name, {k: v for k, v in results[name].items() if not k.endswith("step_s")}, flush=True)
    if sys.argv[1:]:
        return
    throttled = next(results.pop(name) for name in names if SCENARIOS[name].throttled)
    header = HEADER.format(
        machine=platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=version("torch"),
        lightning=version("lightning"),
        minutes=(time.perf_counter() - start_s) / 60,
    )
    first, second = next((s.throttled_at, s.recovered_at) for s in SCENARIOS.values() if s.throttled)
    tail = THROTTLED.format(
        slow=first,
        fast=second,
        found=f"{throttled['steps_throttled']} and {throttled['steps_recovered']}",
        changes=", ".join(f"{':'.join(map(str, split))} from step {step}" for step, split in throttled["changes"]),
        solver_ms=solver_ms(),
    )
    rows = "\n".join(row(name, r) for name, r in results.items())
    more = "\n".join(details(name, r) for name, r in results.items())
    text = header + rows + "\n" + DETAILS + more + "\n" + tail
    DOCS.joinpath("benchmarks.md").write_text(text, encoding="utf-8")
    plot(results, throttled, DOCS / "benchmarks.png")
    print(text)


if __name__ == "__main__":
    main()
