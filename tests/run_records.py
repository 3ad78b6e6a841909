"""Records of runs that never were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stages import StageTimes
from lightning_hetero.balance.record.run_record import (
    Event,
    RunAdvice,
    RunChange,
    RunEnd,
    RunHeader,
    RunPasses,
    RunStages,
    RunWindow,
    to_line,
)
from lightning_hetero.balance.types import DeviceProfile

OVERHEAD_S, COMMUNICATION_S = 0.004, 0.003
GIB = 2.0**30


def header(names: Sequence[str], strategy: str = "hetero_ddp", host: str = "node") -> RunHeader:
    devices = tuple(DeviceProfile(f"{host}-{rank // 4}", f"cuda:{rank % 4}", name) for rank, name in enumerate(names))
    return RunHeader(strategy, "2026-03-01T09:30:00+00:00", 64 * len(names), devices, "0.1.0")


def batch_run(costs_s: Sequence[float], windows: int = 12, reason: str = "finished") -> list[Event]:
    """Return the events of a run on ranks of these seconds a sample, 64 samples a rank on average."""
    world_size, batch = len(costs_s), 64 * len(costs_s)
    speeds = [1 / cost_s for cost_s in costs_s]
    found = [int(batch * speed / sum(speeds)) for speed in speeds]
    for rank in range(batch - sum(found)):
        found[rank % world_size] += 1
    equal, shares = (64,) * world_size, tuple(found)

    def window(step: int, samples: tuple[int, ...], tuning: bool) -> RunWindow:
        own_s = tuple(OVERHEAD_S + cost_s * n for cost_s, n in zip(costs_s, samples, strict=True))
        until_s = max(own_s) + COMMUNICATION_S
        return RunWindow(
            step=step,
            time_s=step / 10,
            tuning=tuning,
            samples=samples,
            own_s=own_s,
            waiting_s=tuple(until_s - s for s in own_s),
            deviation_s=(0.001,) * world_size,
            overhead_s=() if tuning else (OVERHEAD_S,) * world_size,
            seconds_per_sample=() if tuning else tuple(costs_s),
            communication_s=COMMUNICATION_S,
            peak_bytes=tuple((2 + 0.05 * n) * GIB for n in samples),
            budget_bytes=(15.2 * GIB,) * world_size,
        )

    steps = [20 * (i + 1) for i in range(windows)]
    return [
        window(5, equal, tuning=True),
        RunChange(7, 0.7, shares, "predicted: 1.48x as many samples/s"),
        RunAdvice(9, 0.9, 0.0868, 1.48, 0.97, ("without rank 1 a step would be 9% faster",)),
        *(window(step, shares, tuning=False) for step in steps),
        RunEnd(steps[-1] + 5, steps[-1] / 10 + 1, reason),
    ]


def pipeline_run() -> list[Event]:
    """Return the events of a run of three stages, one step of which was recorded."""
    times = StageTimes((0.02, 0.021, 0.019), (0.04, 0.041, 0.038))
    passes = simulate_pipeline(times, 4, "1f1b", 0.003).passes
    return [
        RunStages(
            step=0,
            time_s=1.0,
            ranks=(1, 2, 0),
            ends=(7, 11, 12),
            forward_s=times.forward_s,
            backward_s=times.backward_s,
            micro_batches=4,
            schedule="1f1b",
            transfer_s=0.001,
            step_s=0.41,
            uniform_step_s=0.533,
            sentences=("predicted 410 ms a step; 533 ms with equal numbers of layers",),
        ),
        RunPasses(
            step=5,
            time_s=3.0,
            stages=tuple(p.stage for p in passes),
            kinds=tuple(p.kind for p in passes),
            micro_batches=tuple(p.micro_batch for p in passes),
            start_s=tuple(p.start_s for p in passes),
            end_s=tuple(p.end_s for p in passes),
        ),
    ]


TWO_COSTS_S = (0.001, 0.002)
TWO = [to_line(header(["Tesla V100-SXM2-16GB", "Tesla K80"])), *map(to_line, batch_run(TWO_COSTS_S))]
PIPELINE = [to_line(header(["A100", "V100", "T4"], "hetero_pipeline")), *map(to_line, pipeline_run())]


def write(path: Path, lines: Sequence[str] = TWO) -> Path:
    """Write a record and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
