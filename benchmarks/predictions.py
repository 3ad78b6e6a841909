"""Compare the predictions of ``lightning-hetero plan`` for the scenarios with the measurements in docs/benchmarks.md.

Prints the two tables of docs/plan.md. Nothing is trained.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scenarios import SCENARIOS, Scenario

MEASURED = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
MICRO_BATCHES, LAYERS = 8, 12
HEAVY_GRADIENTS = [608_000, 19_000, 19_000, 1]  # of workloads.heavy_gradients(), in the order of its parameters


def main() -> None:
    """Print both tables."""
    print(
        "| devices | split | ddp samples/s | measured | step ms | measured | added ms | speed-up | measured | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, scenario in SCENARIOS.items():
        if scenario.measures == "shares" and scenario.is_virtual:
            print(shares_row(name, scenario))
    print("\n| speeds | layers | uniform ms | measured | step ms | measured | error | alone ms | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, scenario in SCENARIOS.items():
        if scenario.measures == "pipeline":
            print(pipeline_row(name.removeprefix("pipeline "), scenario))


def measured(heading: str, name: str) -> list[str]:
    """Return the cells of a line in the first table after a heading."""
    for line in MEASURED[MEASURED.index(heading) :].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == name:
            return cells
    raise LookupError(f"{heading} has no line {name}")


def predicted(description: str) -> Any:
    """Return the predictions of the command."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cluster.yaml")
        file.write_text(description, encoding="utf-8")
        command = [sys.executable, "-m", "lightning_hetero", "plan", str(file), "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def shares_row(name: str, scenario: Scenario) -> str:
    """Return the line of the first table, on data-parallel devices."""
    lines = [f"global_batch_size: {scenario.world_size * scenario.batch_size}"]
    if scenario.megabits_per_s:
        lines += [f"link_gigabits_per_s: {scenario.megabits_per_s / 1e3}", f"parameters: {HEAVY_GRADIENTS}"]
    lines.append("devices:")
    for factor in scenario.factors:
        cost, overhead = (1e3 * factor * seconds for seconds in (scenario.seconds_per_sample, scenario.overhead_s))
        lines.append(f"  - {{name: 'x{factor}', milliseconds_per_sample: {cost:.9g}, overhead_ms: {overhead:.9g}}}")
    found = predicted("\n".join(lines))
    rates, steps = measured("## Devices of known speed", name), measured("| devices | split found", name)
    ddp, speed_up, step_ms = float(rates[1]), float(rates[6]), float(steps[5])
    split = ":".join(str(device["max_samples"]) for device in found["devices"])
    predicted_ms = 1e3 * found["step_time"]
    return (
        f"| {name} | {split} | {found['global_batch_size'] / found['ddp']['step_time']:.0f} | {ddp:.0f}"
        f" | {predicted_ms:.1f} | {step_ms:.1f} | {step_ms - predicted_ms:.1f}"
        f" | {found['speed_up']:.3f} | {speed_up:.3f} | {found['speed_up'] / speed_up - 1:+.1%} |"
    )


def pipeline_row(speeds: str, scenario: Scenario) -> str:
    """Return the line of the second table, on a pipeline."""
    layer_ms = 1e3 * scenario.seconds_per_sample * scenario.batch_size / MICRO_BATCHES
    lines = ["strategy: hetero_pipeline", f"num_microbatches: {MICRO_BATCHES}", f"layers: {LAYERS}"]
    lines += [f"layer_milliseconds: {layer_ms}", "devices:"]
    lines += [f"  - {{name: 'x{factor}', speed: {1 / factor}}}" for factor in scenario.factors]
    found = predicted("\n".join(lines))
    uniform, tuned, _, alone = map(float, measured("## Layers in proportion", speeds)[1:5])
    layers = {stage["rank"]: stage["num_layers"] for stage in found["stages"]}
    step_ms = 1e3 * found["step_time"]
    return (
        f"| {speeds} | {':'.join(str(layers[rank]) for rank in sorted(layers))}"
        f" | {1e3 * found['uniform']['step_time']:.0f} | {uniform:.0f}"
        f" | {step_ms:.0f} | {tuned:.0f} | {step_ms / tuned - 1:+.1%} | {1e3 * found['alone']['step_time']:.0f}"
        f" | {alone:.0f} |"
    )


if __name__ == "__main__":
    main()
