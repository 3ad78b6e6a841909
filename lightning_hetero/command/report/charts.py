"""Draw the charts of a run with ``hetero_ddp``, which divides the batch."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_hetero.balance.record.run_record import RunChange, RunWindow
from lightning_hetero.balance.record.run_summary import (
    Comparison,
    bound_samples_per_s,
    measured_efficiency,
    samples_per_s,
    step_parts,
    thinned,
)
from lightning_hetero.command.report.ranks import ShownRanks
from lightning_hetero.command.report.svg import INK, MUTED, SERIES, Tips, draw, number

__all__ = ["efficiency_chart", "memory_chart", "share_chart", "step_time_chart", "time_line_chart"]

OWN, WAITING, COMMUNICATION = SERIES[0], SERIES[1], MUTED
_WIDTH = 11.0
_FEW_RANKS = 8
_MAX_POINTS = 400
_MAX_POINTS_PER_RANK = 40
_MAX_MARKERS = 15
_GIB = 2.0**30


def time_line_chart(comparison: Comparison, shown: ShownRanks) -> Markup:
    """Draw the parts of each rank's step, in the first measured window and in the last."""
    windows = [("first measured steps", comparison.before), ("latest measured steps", comparison.after)]
    if comparison.before is comparison.after:
        windows = windows[1:]
    few = len(shown.ranks) <= _FEW_RANKS
    rows, columns = (len(windows), 1) if few else (1, len(windows))
    height = 0.75 + rows * (0.5 + (0.32 if few else 0.2) * len(shown.ranks))

    def paint(figure: Figure, tips: Tips) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=not few, squeeze=False)
        for axes, (title, window) in zip(grid.flat, windows, strict=True):
            axes.set_title(f"{title} (up to step {window.step}): {number(samples_per_s(window))} samples/s")
            _bars(axes, window, shown, tips, labelled=few)
        for axes in grid[-1]:
            axes.set_xlabel("milliseconds since the step began")
        names = [("own time", OWN), ("communication", COMMUNICATION), ("waiting for slower ranks", WAITING)]
        _legend(figure, names, columns=3)

    label = (
        "Horizontal bars, one per rank: own time, communication and waiting in the first and the latest measured steps."
    )
    return draw("time-line", label, (_WIDTH, height), paint)


def _bars(axes: Axes, window: RunWindow, shown: ShownRanks, tips: Tips, labelled: bool) -> None:
    parts = step_parts(window)
    for row, rank in enumerate(shown.ranks):
        left = 0.0
        for name, seconds, colour in (
            ("own time", parts[rank].own_s, OWN),
            ("communication", parts[rank].communication_s, COMMUNICATION),
            ("waiting", parts[rank].waiting_s, WAITING),
        ):
            (bar,) = axes.barh(row, 1e3 * seconds, left=left, height=0.8, color=colour, linewidth=0)
            tips.add(bar, f"rank {rank}, {window.samples[rank]} samples, {name}: {1e3 * seconds:.4g} ms")
            left += 1e3 * seconds
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(shown.ranks)), [_row(rank, window, labelled) for rank in shown.ranks])
    axes.set_ylim(len(shown.ranks) - 0.5, -0.5)  # the first rank at the top


def _row(rank: int, window: RunWindow, labelled: bool) -> str:
    return f"rank {rank}, {window.samples[rank]} samples" if labelled else f"rank {rank}"


def share_chart(
    plans: Sequence[tuple[int, tuple[int, ...]]], changes: Sequence[RunChange], last_step: int, shown: ShownRanks
) -> Markup:
    """Draw each rank's share of the batch over the steps, and mark each change with its number."""

    def paint(figure: Figure, tips: Tips) -> None:
        axes = figure.subplots()
        kept = thinned(plans, _MAX_POINTS)
        steps = [step for step, _ in kept] + [max(last_step, kept[-1][0]) + 1]
        for rank in shown.ranks:
            parts = [samples[rank] / max(sum(samples), 1) for _, samples in kept]
            (line,) = axes.plot(
                steps, [*parts, parts[-1]], drawstyle="steps-post", color=shown.colours[rank], linewidth=1.8
            )
            tips.add(line, f"rank {rank}: {kept[-1][1][rank]} samples")
        numbered = thinned(list(enumerate(changes, start=1)), _MAX_MARKERS)
        for level, (position, change) in enumerate(numbered):
            mark = axes.axvline(change.step, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            tips.add(mark, f"change {position}, step {change.step}")
            # neighbouring numbers alternate between two levels, so that they do not overlap
            axes.annotate(
                str(position),
                (change.step, 1.02 + 0.07 * (level % 2)),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "none", "edgecolor": MUTED, "linewidth": 0.6},
            )
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda part, _: f"{100 * part:.3g}%")
        axes.set_ylabel("share of the global batch")
        _steps(axes)
        _legend(figure, shown.legend)

    label = "Step lines of each rank's share of the global batch over the training steps; numbers mark the changes."
    return draw("shares", label, (_WIDTH, 3.2), paint)


def efficiency_chart(windows: Sequence[RunWindow]) -> Markup | None:
    """Draw samples per second with their bound, and the efficiency; None if no window has both."""
    points = [
        (window.step, samples_per_s(window), bound, reached, window.tuning)
        for window in thinned(windows, _MAX_POINTS)
        if (bound := bound_samples_per_s(window)) and (reached := measured_efficiency(window)) is not None
    ]
    if not points:
        return None
    steps, rates, bounds, parts, tuning = zip(*points, strict=True)

    def paint(figure: Figure, tips: Tips) -> None:
        left, right = figure.subplots(1, 2, sharex=True)
        marker = "o" if len(steps) <= _MAX_POINTS_PER_RANK else None
        (bound,) = left.plot(steps, bounds, color=SERIES[1], linestyle="--", linewidth=1.5, marker=marker, markersize=3)
        (rate,) = left.plot(steps, rates, color=SERIES[0], linewidth=1.8, marker=marker, markersize=4)
        tips.add(bound, "bound: no rank ever waits")
        tips.add(rate, "measured")
        left.set_ylim(bottom=0)
        left.set_title("samples per second")
        left.set_ylabel("samples/s")
        right.plot(steps, parts, color=SERIES[2], linewidth=1.8, marker=marker, markersize=4)
        right.axhline(1.0, color=SERIES[1], linestyle="--", linewidth=1.5)
        right.set_ylim(0, 1.08)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        right.set_title("efficiency: measured samples per second over the bound")
        right.set_ylabel("efficiency")
        for axes in (left, right):
            _steps(axes)
            if True in tuning:
                last = max(step for step, busy in zip(steps, tuning, strict=True) if busy)
                axes.axvspan(min(steps), last, color=MUTED, alpha=0.12, linewidth=0)
        names = [("measured", SERIES[0]), ("bound: no rank ever waits", SERIES[1]), ("efficiency", SERIES[2])]
        _legend(figure, [*names, *([("while tuning", MUTED)] if True in tuning else [])], columns=4)

    label = "Two line charts over training steps: samples per second with their bound, and the efficiency in percent."
    return draw("efficiency", label, (_WIDTH, 3.1), paint)


def step_time_chart(windows: Sequence[RunWindow], shown: ShownRanks) -> Markup | None:
    """Draw own times over mini-batch sizes, and the fitted step times; None if nothing was measured."""
    kept = thinned(windows, _MAX_POINTS_PER_RANK)
    fitted = next((window for window in reversed(windows) if window.overhead_s), None)
    points = {
        rank: [(w.samples[rank], w.own_s[rank]) for w in kept if w.own_s[rank] > 0 and w.samples[rank]]
        for rank in shown.ranks
    }
    most = max((n for found in points.values() for n, _ in found), default=0)
    if not most:
        return None

    def paint(figure: Figure, tips: Tips) -> None:
        axes = figure.subplots()
        for rank in shown.ranks:
            if fitted is not None:
                overhead_s, cost_s = fitted.overhead_s[rank], fitted.seconds_per_sample[rank]
                ends = (0.0, 1.08 * most)
                (line,) = axes.plot(
                    ends, [1e3 * (overhead_s + cost_s * n) for n in ends], color=shown.colours[rank], linewidth=1.4
                )
                tips.add(line, f"rank {rank}: {1e3 * overhead_s:.4g} ms + {1e3 * cost_s:.4g} ms per sample")
            dots = axes.scatter(
                [n for n, _ in points[rank]],
                [1e3 * s for _, s in points[rank]],
                color=shown.colours[rank],
                s=18,
                alpha=0.75,
                linewidth=0,
                zorder=3,
            )
            tips.add(dots, f"rank {rank}, measured")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("samples in the rank's mini-batch")
        axes.set_ylabel("own time per step, ms")
        _legend(figure, shown.legend)

    label = "Points: measured own time per step over the size of the mini-batch. Lines: the fitted step times."
    return draw("step-times", label, (_WIDTH, 3.4), paint)


def memory_chart(window: RunWindow, shown: ShownRanks) -> Markup | None:
    """Draw the largest memory that each rank has held, and its budget; None if no memory is known."""
    budgets = window.budget_bytes or (0.0,) * len(window.peak_bytes)
    ranks = [rank for rank in shown.ranks if window.peak_bytes and window.peak_bytes[rank] > 0]
    if not ranks:
        return None

    def paint(figure: Figure, tips: Tips) -> None:
        axes = figure.subplots()
        for row, rank in enumerate(ranks):
            peak, budget = window.peak_bytes[rank] / _GIB, budgets[rank] / _GIB
            (bar,) = axes.barh(row, peak, height=0.6, color=SERIES[0], linewidth=0)
            text = f"rank {rank}: {peak:.4g} GiB" + (f" of {budget:.4g} GiB" if budget else "")
            tips.add(bar, text)
            if budget:
                axes.barh(row, budget, height=0.8, fill=False, edgecolor=INK, linewidth=1.2)
        axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("GiB")
        _legend(figure, [("peak", SERIES[0]), ("budget (outline)", INK)], columns=2)

    label = "Horizontal bars, one per rank: the largest memory held, inside an outline of the memory budget."
    return draw("memory", label, (_WIDTH, 1.1 + 0.28 * len(ranks)), paint)


def _steps(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _legend(figure: Figure, names: Sequence[tuple[str, str]], columns: int | None = None) -> None:
    handles = [Line2D([], [], color=colour, linewidth=5, label=name) for name, colour in names]
    if columns is None:
        figure.legend(handles=handles, loc="outside right upper")
    else:
        figure.legend(handles=handles, loc="outside upper left", ncols=columns)
