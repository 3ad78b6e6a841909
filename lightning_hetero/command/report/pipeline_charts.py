"""Draw the charts of a run with ``hetero_pipeline``, which divides the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_hetero.balance.pipeline.simulation import Pass, simulate_pipeline
from lightning_hetero.balance.pipeline.stages import Kind, Schedule, StageTimes
from lightning_hetero.balance.record.run_record import RunPasses, RunStages
from lightning_hetero.command.report.svg import CARD, SERIES, Tips, draw

__all__ = ["MAX_STAGES", "passes_chart", "predicted_passes", "recorded_passes"]

_NAMES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "input": "gradient of the input",
    "weight": "gradients of parameters",
}
_COLOURS = dict(zip(_NAMES, (SERIES[0], SERIES[1], SERIES[2], SERIES[3]), strict=True))
MAX_STAGES = 32
_MAX_PASSES = 4000
_MAX_LABELLED_PASSES = 160


def predicted_passes(stages: RunStages) -> list[Pass] | None:
    """Return the simulated passes of a step; None if nothing was measured or there are too many to show."""
    measured = len(stages.forward_s) == len(stages.backward_s) == len(stages.ends)
    if not measured or stages.schedule not in ("1f1b", "gpipe") or not stages.micro_batches:
        return None
    if 2 * len(stages.ends) * stages.micro_batches > 10 * _MAX_PASSES:
        return None
    times = StageTimes(stages.forward_s, stages.backward_s)
    timeline = simulate_pipeline(times, stages.micro_batches, cast(Schedule, stages.schedule), stages.transfer_s)
    return list(timeline.passes)


def recorded_passes(passes: RunPasses) -> list[Pass]:
    """Return the passes of a recorded step."""
    return [
        Pass(stage, cast(Kind, kind), micro_batch, start_s, max(start_s, end_s))
        for stage, kind, micro_batch, start_s, end_s in zip(
            passes.stages, passes.kinds, passes.micro_batches, passes.start_s, passes.end_s, strict=True
        )
    ]


def passes_chart(name: str, title: str, passes: Sequence[Pass], ranks: Sequence[int], until_s: float) -> Markup | None:
    """Draw when each stage computes which pass of a step.

    Args:
        name: Name of the chart, unique in the page.
        title: Title above the chart.
        passes: Passes of the step.
        ranks: Rank of each stage.
        until_s: End of the time axis, so that two charts can have the same one.

    Returns:
        The chart; None if there are no passes, or too many.
    """
    half = MAX_STAGES // 2
    stages = range(len(ranks))
    shown = list(stages) if len(stages) <= MAX_STAGES else [*stages[:half], *stages[-half:]]
    row_of = {stage: row for row, stage in enumerate(shown)}
    kept = [p for p in passes if p.stage in row_of]
    if not kept or len(kept) > _MAX_PASSES or until_s <= 0:
        return None

    def paint(figure: Figure, tips: Tips) -> None:
        axes = figure.subplots()
        for p in kept:
            length_ms = 1e3 * (p.end_s - p.start_s)
            (bar,) = axes.barh(
                row_of[p.stage], length_ms, left=1e3 * p.start_s, height=0.8, facecolor=_COLOURS[p.kind], edgecolor=CARD
            )
            if len(kept) <= _MAX_PASSES // 4:
                tips.add(bar, f"stage {p.stage}, {_NAMES[p.kind]} of micro-batch {p.micro_batch}: {length_ms:.4g} ms")
            if len(kept) <= _MAX_LABELLED_PASSES and p.end_s - p.start_s > 0.012 * until_s:
                middle_ms = 500 * (p.start_s + p.end_s)
                axes.text(
                    middle_ms, row_of[p.stage], str(p.micro_batch), ha="center", va="center", color=CARD, fontsize=8
                )
        axes.set_yticks(range(len(shown)), [f"stage {stage} (rank {ranks[stage]})" for stage in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1e3 * until_s)
        axes.set_xlabel("milliseconds since the step began")
        axes.set_title(title)
        drawn = [kind for kind in _NAMES if any(p.kind == kind for p in kept)]
        handles = [Line2D([], [], color=_COLOURS[kind], linewidth=5, label=_NAMES[kind]) for kind in drawn]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))

    label = f"{title}: horizontal bars, one row per stage, each bar a forward or backward pass of a micro-batch."
    return draw(name, label, (11.0, 1.3 + 0.34 * len(shown)), paint)
