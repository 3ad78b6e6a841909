"""Put results into words: a line per check, and a summary to paste into an issue."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_hetero.command.check.layout import Layout
from lightning_hetero.command.check.runner import Result

__all__ = ["json_line", "line", "summary"]

_GIB = 2**30


def line(result: Result) -> str:
    """Return one line on a check."""
    finding = result.finding
    words = [w for w in (_figure(result), finding.note) if w]
    return f"{finding.outcome}  {result.check.name:<19} {', '.join(words)}  [{result.seconds:.0f} s]"


def _figure(result: Result) -> str:
    finding = result.finding
    if finding.figure is None:
        return ""
    figure = f"{finding.figure:.4g} {finding.unit}".rstrip()
    return figure if finding.bound is None else f"{figure} (at most {finding.bound:g})"


def json_line(result: Result) -> str:
    """Return a check and what it found as one line of JSON."""
    fields = {"check": result.check.name, **result.finding.to_dict(), "seconds": round(result.seconds, 2)}
    if result.finding.figure is not None and not math.isfinite(result.finding.figure):
        fields["figure"] = None  # JSON has no such numbers
    return json.dumps(fields | ({"output": result.output} if result.output else {}))


def summary(results: Sequence[Result], layout: Layout, environment: dict[str, Any]) -> str:
    """Return what to paste into an issue: versions, devices and results, in Markdown.

    Args:
        results: Results in their order.
        layout: Where the ranks ran.
        environment: Details of the check "environment"; empty if it has found none.
    """
    counts = Counter(result.finding.outcome for result in results)
    seconds = sum(result.seconds for result in results)
    lines = [
        f"lightning-hetero check: {counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped,"
        f" {seconds:.0f} s",
        "",
        ", ".join(f"{name} {value}" for name, value in environment.get("versions", {}).items()),
        "",
    ]
    lines += [f"- {_device(device)}" for device in environment.get("devices", ())]
    lines += [f"- ran on {layout.title}", "", "| check | outcome | figure | note |", "|---|---|---|---|"]
    for result in results:
        note = result.finding.note.replace("|", "/").replace("\n", " ")
        lines.append(f"| {result.check.name} | {result.finding.outcome} | {_figure(result)} | {note} |")
    for result in results:
        if result.output:
            lines += ["", f"{result.check.name}:", "", "```text", result.output, "```"]
    return "\n".join(lines)


def _device(device: dict[str, Any]) -> str:
    parts = [f"cuda:{device['number']} {device['name']}"]
    if "capability" in device:
        parts += [f"capability {device['capability']}", f"{device['memory_bytes'] / _GIB:.1f} GiB"]
        parts += [] if device["bf16"] else ["bf16 is emulated"]
    return ", ".join([*parts, *(device[key] for key in ("problem", "note") if device[key])])
