"""Build the page of a run from its record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_hetero.balance.record.run_record import RunRecord, RunStages
from lightning_hetero.balance.record.run_summary import (
    Comparison,
    compare,
    measured_efficiency,
    plans_over_steps,
    run_status,
    samples_per_s,
    thinned,
    wait_fractions,
)
from lightning_hetero.command.report.charts import (
    efficiency_chart,
    memory_chart,
    share_chart,
    step_time_chart,
    time_line_chart,
)
from lightning_hetero.command.report.pipeline_charts import (
    MAX_STAGES,
    passes_chart,
    predicted_passes,
    recorded_passes,
)
from lightning_hetero.command.report.ranks import ShownRanks, shown_ranks
from lightning_hetero.command.report.svg import clean, number
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["build"]

_MAX_NUMBER = 1e18
_MAX_CHANGES = 200
_MAX_SENTENCES = 50


def build(record: RunRecord, refresh_s: float | None = None, name: str = "the record") -> str:
    """Return the page as HTML that refers to no other file.

    Args:
        record: Record of the run. Its texts are not trusted.
        refresh_s: Seconds after which a browser reloads the page of a running training; None for never.
        name: Name of the record for error messages.

    Raises:
        ConfigurationError: The record has numbers that no run has.
    """
    if any(value > _MAX_NUMBER for value in _numbers(record)):
        raise ConfigurationError(f"{name} must have numbers below {_MAX_NUMBER:g}, got larger ones: it is damaged.")
    comparison = compare(record)
    shown = shown_ranks(record.header.devices, None if comparison is None else comparison.after)
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True)
    environment.filters.update(ms=_milliseconds, percent=_percent, number=number, duration=_duration)
    template = environment.from_string(files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        record=record,
        header=record.header,
        state=run_status(record, is_running=refresh_s is not None),
        refresh_s=None if refresh_s is None else max(1, round(refresh_s)),
        comparison=comparison,
        rates=None if comparison is None else (samples_per_s(comparison.before), samples_per_s(comparison.after)),
        tuned_rate=None if comparison is None else comparison.tuned_samples_per_s,
        efficiency=None if comparison is None else measured_efficiency(comparison.after),
        charts=_batch_charts(record, comparison, shown) | _stage_charts(record),
        shown=shown,
        ranks=_rank_rows(record, comparison),
        changes=thinned(list(enumerate(record.changes, start=1)), _MAX_CHANGES),
        stages=[] if record.stages is None else _stage_rows(record, record.stages),
        max_stages=MAX_STAGES,
        sentences=_notes(record),
        last_s=max((event.time_s for event in _events(record)), default=0.0),
        last_step=max((event.step for event in _events(record)), default=0),
    )


def _batch_charts(record: RunRecord, comparison: Comparison | None, shown: ShownRanks) -> dict[str, Markup]:
    charts: dict[str, Markup | None] = {}
    plans = plans_over_steps(record)
    if plans:
        last_step = max(event.step for event in _events(record))
        charts["shares"] = share_chart(plans, record.changes, last_step, shown)
    if comparison is not None:
        charts["time_line"] = time_line_chart(comparison, shown)
        charts["efficiency"] = efficiency_chart(record.windows)
        charts["step_times"] = step_time_chart(record.windows, shown)
        charts["memory"] = memory_chart(comparison.after, shown)
    return {key: chart for key, chart in charts.items() if chart is not None}


def _stage_charts(record: RunRecord) -> dict[str, Markup]:
    if record.stages is None:
        return {}
    # a step that was recorded before layers have moved belongs to the stages that held then
    held = [s for s in (*record.earlier_stages, record.stages) if record.passes is None or s.step <= record.passes.step]
    stages = held[-1] if held else record.stages
    predicted = predicted_passes(stages) or []
    recorded = [] if record.passes is None else recorded_passes(record.passes)
    until_s = max((p.end_s for p in [*predicted, *recorded]), default=0.0)
    ranks = stages.ranks
    charts = {
        "predicted": passes_chart("predicted", "Predicted step", predicted, ranks, until_s),
        "recorded": passes_chart(
            "recorded", f"Recorded step{f' {record.passes.step}' if record.passes else ''}", recorded, ranks, until_s
        ),
    }
    return {key: chart for key, chart in charts.items() if chart is not None}


@dataclass(frozen=True)
class _RankRow:
    rank: int
    host: str
    device: str
    samples: tuple[int, ...]
    own_s: tuple[float | None, ...]
    waiting_s: tuple[float | None, ...]
    waits: tuple[float | None, ...]


def _rank_rows(record: RunRecord, comparison: Comparison | None) -> list[_RankRow]:
    """Return one row per rank, with the values before and after if there are two measured windows."""
    windows = [] if comparison is None else [comparison.before, comparison.after]
    if comparison is not None and comparison.before is comparison.after:
        windows = windows[1:]
    waits = [wait_fractions(window) for window in windows]
    return [
        _RankRow(
            rank=rank,
            host=device.host,
            device=device.name if device.device in ("cpu", "") else f"{device.device} {device.name}",
            samples=tuple(window.samples[rank] for window in windows),
            own_s=tuple(window.own_s[rank] or None for window in windows),  # 0 if the rank measured nothing
            waiting_s=tuple(window.waiting_s[rank] if window.own_s[rank] else None for window in windows),
            waits=tuple(fractions[rank] for fractions in waits),
        )
        for rank, device in enumerate(record.header.devices)
    ]


@dataclass(frozen=True)
class _StageRow:
    stage: int
    rank: int
    host: str
    device: str
    layers: str
    forward_s: float | None
    backward_s: float | None


def _stage_rows(record: RunRecord, stages: RunStages) -> list[_StageRow]:
    rows = []
    for stage, (rank, (first, end)) in enumerate(zip(stages.ranks, pairwise((0, *stages.ends)), strict=True)):
        device = record.header.devices[rank]
        rows.append(
            _StageRow(
                stage=stage,
                rank=rank,
                host=device.host,
                device=device.name if device.device in ("cpu", "") else f"{device.device} {device.name}",
                layers=f"{end - first} (layer {first})"
                if end - first == 1
                else f"{end - first} ({first} to {end - 1})",
                forward_s=stages.forward_s[stage] if stages.forward_s else None,
                backward_s=stages.backward_s[stage] if stages.backward_s else None,
            )
        )
    return rows


def _notes(record: RunRecord) -> list[str]:
    found = [] if record.advice is None else list(record.advice.sentences)
    if record.stages is not None:
        found += record.stages.sentences
        earlier = [stages.sentences[0] for stages in record.earlier_stages if stages.step and stages.sentences]
        found += reversed(earlier)
    return found[:_MAX_SENTENCES]


def _events(record: RunRecord) -> list[Any]:
    single = (record.advice, record.stages, record.passes, record.end)
    several = (*record.windows, *record.changes, *record.earlier_stages)
    return [*several, *(event for event in single if event is not None)]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _numbers(getattr(value, field.name))


def _shown(value: Any) -> Any:
    """Return the form of a value that the template prints; a missing value is a dash."""
    if value is None:
        return "\N{EN DASH}"
    return clean(value, 1000) if isinstance(value, str) and not isinstance(value, Markup) else value


def _milliseconds(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{1e3 * seconds:.2f}" if seconds < 0.01 else f"{1e3 * seconds:.1f}"


def _percent(part: float | None) -> str | None:
    return None if part is None else f"{part:.0%}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
