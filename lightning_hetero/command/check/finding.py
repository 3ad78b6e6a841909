"""What a check finds: a figure, the bound it was compared with, and what else is worth a look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "at_most", "failed", "measured_at_most", "skipped"]

_ERRORS = 3.0

Outcome = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Finding:
    """The result of a check, on one rank or of all of them.

    Attributes:
        outcome: "PASS", "FAIL", or "SKIP" if the check could not be run here.
        figure: The measured number; None if there is none.
        unit: Unit of the figure and the bound.
        bound: The largest figure that passes; None if there is none.
        note: What was measured, or why the check failed or was skipped.
        details: Further values, for the JSON line.
    """

    outcome: Outcome
    figure: float | None = None
    unit: str = ""
    bound: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Finding:
        """Return the object that :meth:`to_dict` has described."""
        return cls(**fields)


def at_most(bound: float, figure: float, unit: str, note: str, **details: Any) -> Finding:
    """Return a finding that passes if the figure does not exceed the bound; NaN does not pass."""
    return Finding("PASS" if figure <= bound else "FAIL", figure, unit, bound, note, details)


def measured_at_most(bound: float, figure: float, error: float, unit: str, note: str, **details: Any) -> Finding:
    """Return a finding on a figure with a standard error, which is skipped where the error is too large to tell.

    It fails if the figure exceeds the bound by more than three standard errors.
    """
    finding = at_most(bound, figure, unit, note, error=error, **details)
    if finding.outcome == "FAIL" and figure - _ERRORS * error <= bound:
        reason = f"this machine is too busy to tell: {figure:.4g} ± {error:.1g} {unit}, to be at most {bound:g}"
        return skipped(reason, figure=figure, error=error, **details)
    return finding


def failed(note: str, **details: Any) -> Finding:
    """Return the finding of a check that failed without a figure."""
    return Finding("FAIL", note=note, details=details)


def skipped(reason: str, **details: Any) -> Finding:
    """Return the finding of a check that cannot be run here."""
    return Finding("SKIP", note=reason, details=details)
