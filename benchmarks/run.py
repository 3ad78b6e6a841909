"""Measure all scenarios and write docs/explanation/benchmarks.md and its pictures.

python benchmarks/run.py                # all scenarios
python benchmarks/run.py 1:2 equal      # some; prints the results and writes no page
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import at_scale
import contention
import link
import orders
import pipeline
import real_pipeline
import replicas
from page_texts import (
    COST,
    DECISIONS,
    DETAILS,
    DRIFT,
    HEADER,
    ORDERS,
    PIPELINE,
    PIPELINE_COLUMNS,
    REAL,
    REAL_PIPELINE,
    REPLICAS,
    SCALE,
    TABLE,
)
from scenarios import SCENARIOS, Scenario

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "explanation" / "benchmarks.md"
IMAGES = HERE.parent / "docs" / "images"
TIMEOUT_S = 400
PORT = 29511


def measured(name: str, scenario: Scenario) -> dict[str, Any]:
    """Run a scenario in its own processes and return its results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        script = [str(HERE / "scenario.py"), name, str(path)]
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        if scenario.megabits_per_s:
            with link.linked_nodes(scenario.megabits_per_s) as nodes:
                rendezvous = [f"--master-addr={nodes[0].address}", f"--master-port={PORT}", "--nnodes=2"]
                run_together(
                    [
                        (node.command(*torchrun, *rendezvous, f"--node-rank={node.rank}", *script), node.interface)
                        for node in nodes
                    ]
                )
        else:
            ranks = f"--nproc-per-node={scenario.world_size}"
            run_together([([*torchrun, "--standalone", ranks, *script], None)])
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result


def run_together(commands: Sequence[tuple[list[str], str | None]]) -> None:
    """Run commands at the same time, each with its network interface."""
    running = []
    for command, interface in commands:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if interface:
            environment["GLOO_SOCKET_IFNAME"] = interface
        running.append(subprocess.Popen(command, env=environment))
    end = time.monotonic() + TIMEOUT_S
    try:
        codes = [process.wait(max(end - time.monotonic(), 1)) for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        raise RuntimeError(f"All processes of a benchmark must succeed, got the exit codes {codes}.")


def why_not(scenario: Scenario) -> str | None:
    """Return why this machine cannot run a scenario; None if it can."""
    if scenario.quotas and not contention.available():
        return "needs a writable cpu controller of control groups v1"
    if scenario.megabits_per_s and not link.available():
        return "needs the right to create network namespaces, and the tools ip, tc and unshare"
    return None


def row(name: str, r: dict[str, Any]) -> str:
    """Return a line of the table of throughputs."""
    rates = " | ".join(f"{r[key]:.0f}" for key in ("ddp", "cold", "tuned", "best", "bound"))
    least, middle, most = r["against_best"]
    best = f"{middle:.3f}" + (f" ({least:.2f} to {most:.2f})" if r["calibrated"] else "")
    first, *others = ((r["tuned"], r["ddp"]), (r["tuned"], r["bound"]), (r["cold"], r["best"]))
    ratios = [f"{first[0] / first[1]:.3f}", best, *(f"{a / b:.3f}" for a, b in others)]
    return f"| {name} | {rates} | {' | '.join(ratios)} |\n"


def details(name: str, r: dict[str, Any]) -> str:
    """Return a line of the table of splits and predictions."""
    predicted, found = r["predicted_s"] * 1e3, r["measured_s"] * 1e3
    splits = " | ".join(":".join(map(str, r[key])) for key in ("plan", "solution"))
    if r["calibrated"]:
        slowest = min(r["calibrated"])
        splits += f" ({':'.join(f'{rate / slowest:.2f}' for rate in r['calibrated'])})"
    changes = ", ".join(map(str, r["changes"])) or "none"
    error = predicted / found - 1
    return f"| {name} | {splits} | {changes} | {predicted:.1f} | {found:.1f} | {error:+.1%} | {r['spread']:.1%} |\n"


def shares_tables(results: dict[str, dict[str, Any]], solution: str) -> str:
    """Return both tables of scenarios that compare shares."""
    lines = "".join(row(name, r) for name, r in results.items())
    return TABLE + lines + DETAILS.format(solution=solution) + "".join(details(name, r) for name, r in results.items())


def scale_text() -> str:
    """Measure the tuning of many ranks and describe the results."""
    text = SCALE.format(
        ranks=at_scale.RANKS,
        seeds=at_scale.SEEDS,
        steps=" | ".join(f"step {step}" for step in at_scale.SHOWN_STEPS),
        bars="---|" * len(at_scale.SHOWN_STEPS),
    )
    for name in at_scale.CASES:
        values = " | ".join(f"{middle:.3f} ({low:.3f})" for middle, low in at_scale.efficiencies(name))
        text += f"| {name} | {values} |\n"
    return text + DECISIONS.format(times=", ".join(f"{k} {v:.3g} ms" for k, v in at_scale.milliseconds().items()))


def pipeline_text(of_splits: dict[str, dict[str, Any]], trainer: dict[str, Any]) -> str:
    """Describe the results of pipelines."""
    head = "|".join((" speeds ", *(f" {n} ms " for n in ("uniform", "found", "optimum", "alone")), PIPELINE_COLUMNS))
    lines = f"|{head}|\n{'|---' * (head.count('|') + 1)}|\n"
    for name, r in of_splits.items():
        found, predicted = r["auto_s"], r["predicted_s"]
        times = " | ".join(f"{1e3 * r[key]:.0f}" for key in ("uniform_s", "auto_s", "optimum_s", "alone_s"))
        ratios = f"{found / r['uniform_s']:.3f} | {found / r['optimum_s']:.3f}"
        plans = " or ".join(sorted({":".join(map(str, plan)) for plan in r["plans"]}))
        lines += (
            f"| {name.removeprefix('pipeline ')} | {times} | {ratios}"
            f" | {1e3 * predicted:.0f} | {predicted / found - 1:+.1%} | {r['spread']:.1%} | {plans} |\n"
        )
    added = ", ".join(f"{value:.1f}" for value in trainer["added"])
    return PIPELINE.format(
        steps=pipeline.STEPS - 1, lines=lines, through=trainer["through"], bare=trainer["bare"], added=added
    )


def orders_text(results: dict[str, dict[str, Any]]) -> str:
    """Describe what orders of passes reach."""
    names = orders.SCHEDULES
    columns = ["factors", *names, *orders.ZERO_BUBBLE, "chosen"]
    lines = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    for scenario, r in results.items():
        own = [f"{r['measured'][name]:.3f} ({r['predicted'][name]:.3f})" for name in names]
        values = " | ".join([*own, *(f"{r['measured'][name]:.3f}" for name in orders.ZERO_BUBBLE)])
        chosen = " or ".join(r["chosen"]["auto"])
        lines += f"| {scenario.removeprefix('orders ')} | {values} | {chosen} |\n"
    text = ORDERS.format(micro_batches=pipeline.MICRO_BATCHES, rounds=orders.ROUNDS, steps=pipeline.STEPS - 1)
    return text + lines


def replicas_text(results: dict[str, dict[str, Any]]) -> str:
    """Describe what several pipelines reach."""
    names = list(next(iter(results.values()))["measured"])
    lines = f"| factors | {' | '.join(names)} | step ms (predicted) | found |\n{'|---' * (len(names) + 3)}|\n"
    for scenario, r in results.items():
        values = " | ".join(f"{value:.3f}" for value in r["measured"].values())
        steps = "; ".join(f"{n} {r['step_ms'][n]:.0f} ({ms:.0f})" for n, ms in r["predicted_ms"].items())
        found = "; ".join(f"{name}: {' or '.join(ways)}" for name, ways in r["found"].items())
        lines += f"| {scenario.removeprefix('replicas ')} | {values} | {steps} | {found} |\n"
    samples = SCENARIOS[next(iter(results))].batch_size
    text = REPLICAS.format(
        samples=samples, micro_batches=replicas.MICRO_BATCHES, rounds=replicas.ROUNDS, steps=replicas.STEPS - 1
    )
    return text + lines


def real_pipeline_text(results: dict[str, dict[str, Any]]) -> str:
    """Describe ways to train a real model."""
    names = list(next(iter(results.values()))["step_ms"])
    lines = f"| | {' | '.join(names)} | limit | auto, predicted | chosen |\n{'|---' * (len(names) + 4)}|\n"
    for scenario, r in results.items():
        values = " | ".join(f"{value:.0f} ms" for value in r["step_ms"].values())
        found = f"{r['limit_ms']:.0f} ms | {r['predicted_ms']:.0f} ms | {' or '.join(r['chosen'])}"
        lines += f"| {scenario} | {values} | {found} |\n"
    text = REAL_PIPELINE.format(
        width=real_pipeline.WIDTH, micro_batches=real_pipeline.MICRO_BATCHES, rounds=real_pipeline.ROUNDS
    )
    return text + lines


def plot_timelines(result: dict[str, Any], path: Path) -> None:
    """Draw which stage computes which micro-batch when."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(12, 5), sharex=True)
    titles = {"uniform": "equal numbers of layers", "auto": "the layers that were found"}
    for axis, (name, passes) in zip(axes, result["timelines"].items(), strict=True):
        for one in passes:
            colour = "#1f6fb4" if one["kind"] == "forward" else "#2f9e63"
            length_s = one["end_s"] - one["start_s"]
            axis.barh(one["stage"], length_s, left=one["start_s"], height=0.8, color=colour, edgecolor="white")
            if length_s > 0.012:
                middle_s = one["start_s"] + length_s / 2
                axis.text(
                    middle_s, one["stage"], one["micro_batch"], ha="center", va="center", color="white", fontsize=7
                )
        stages = sorted({one["stage"] for one in passes})
        axis.set(title=titles[name], ylabel="stage", yticks=stages)
        axis.invert_yaxis()
    axes[1].set_xlabel("seconds from the start of the step; blue: forward passes, green: backward, by micro-batch")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def plot(results: dict[str, dict[str, Any]], drift: dict[str, Any], path: Path) -> None:
    """Draw the throughput relative to the bound, and the step times of the run with a drift."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), width_ratios=(3, 1))
    kinds = {"ddp": "#999999", "cold": "#8fbbe6", "tuned": "#1f6fb4", "best": "#2f9e63"}
    for i, (kind, colour) in enumerate(kinds.items()):
        heights = [r[kind] / r["bound"] for r in results.values()]
        left.bar([x + (i - 1.5) * 0.2 for x in range(len(heights))], heights, 0.2, label=kind, color=colour)
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set_xticks(range(len(results)), results, rotation=20, ha="right")
    left.set_ylabel("samples/s, as a fraction of the bound")
    left.legend(ncols=4, loc="lower right")
    right.plot([s * 1e3 for s in drift["step_s"][1:]], color=kinds["tuned"], linewidth=1)
    right.set(xlabel="training step", ylabel="ms", title="rank 0 throttled, then recovered", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def page(results: dict[str, dict[str, Any]], skipped: dict[str, str], start_s: float) -> str:
    """Return docs/explanation/benchmarks.md."""
    scale = scale_text()
    of = {kind: {n: r for n, r in results.items() if SCENARIOS[n].measures == kind} for kind in ("shares", "cost")}
    virtual = {name: r for name, r in of["shares"].items() if SCENARIOS[name].is_virtual}
    real = {name: r for name, r in of["shares"].items() if not SCENARIOS[name].is_virtual}
    drift, scenario = results["drift"], SCENARIOS["drift"]
    text = HEADER.format(
        machine=platform.machine(),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=version("torch"),
        lightning=version("lightning"),
        minutes=(time.perf_counter() - start_s) / 60,
    )
    text += shares_tables(virtual, "optimum of the devices alone")
    if real:
        text += REAL + shares_tables(real, "best fixed (speeds calibrated)")
    pairs, steps = (next(iter(of["cost"].values()))[key] for key in ("pairs", "steps"))
    text += COST.format(steps=steps, pairs=pairs)
    for name, r in of["cost"].items():
        text += f"| {name} | {r['ddp_ms']:.1f} | {r['ratio']:.4f} ± {r['error']:.4f} | {r['changes']} |\n"
    of_splits = {n: r for n, r in results.items() if SCENARIOS[n].measures == "pipeline"}
    (trainer,) = (r for n, r in results.items() if SCENARIOS[n].measures == "trainer")
    text += pipeline_text(of_splits, trainer)
    text += orders_text({n: r for n, r in results.items() if SCENARIOS[n].measures == "orders"})
    text += replicas_text({n: r for n, r in results.items() if SCENARIOS[n].measures == "replicas"})
    of_real = {n: r for n, r in results.items() if SCENARIOS[n].measures == "real"}
    text += real_pipeline_text(of_real) if of_real else ""
    text += DRIFT.format(
        slow=scenario.throttled_at,
        fast=scenario.recovered_at,
        found=f"{drift['steps_throttled']} and {drift['steps_recovered']}",
        changes=", ".join(f"{':'.join(map(str, split))} from step {step}" for step, split in drift["changes"]),
    )
    text += scale
    if skipped:
        text += "\n## Skipped on this machine\n\n" + "".join(f"- {name}: {why}\n" for name, why in skipped.items())
    return text


def main() -> None:
    """Measure the scenarios named on the command line, or all of them."""
    start_s, names = time.perf_counter(), sys.argv[1:] or list(SCENARIOS)
    results, skipped = {}, {}
    for name in names:
        reason = why_not(SCENARIOS[name])
        if reason is not None:
            skipped[name] = reason
            print(f"{name}: skipped, {reason}", flush=True)
            continue
        begun_s = time.perf_counter()
        results[name] = measured(name, SCENARIOS[name])
        shown = {k: v for k, v in results[name].items() if not k.endswith(("step_s", "timelines"))}
        print(f"{name} ({time.perf_counter() - begun_s:.0f} s): {shown}", flush=True)
    if sys.argv[1:]:
        for name in (n for n in names if SCENARIOS[n].measures == "pipeline"):
            plot_timelines(results[name], Path(f"{name.replace(':', '-')}.png"))
        return
    text = page(results, skipped, start_s)
    PAGE.write_text(text, encoding="utf-8")
    plot(
        {n: r for n, r in results.items() if SCENARIOS[n].measures == "shares"},
        results["drift"],
        IMAGES / "benchmarks.png",
    )
    plot_timelines(results["pipeline 1:2:4"], IMAGES / "pipeline.png")
    print(text)


if __name__ == "__main__":
    main()
