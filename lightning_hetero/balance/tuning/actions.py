"""What a tuning session asks its owner to do."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hetero.balance.types import BatchPlan, WindowTiming

__all__ = [
    "Action",
    "AdoptSuggestion",
    "BeginAgain",
    "ChangePlan",
    "CloseStep",
    "ExchangeReports",
    "KeepPlan",
    "ShowSpeedUp",
    "StartTimer",
    "StopTimer",
]


@dataclass(frozen=True)
class StartTimer:
    """Time the steps after this one; what was timed before and not read is forgotten."""


@dataclass(frozen=True)
class StopTimer:
    """Time nothing."""


@dataclass(frozen=True)
class CloseStep:
    """Close the account of the step.

    Attributes:
        keep: Whether the step counts as measured.
        window_begins: Whether the next step is the first of a window, so that the peak of memory counts from here on.
    """

    keep: bool
    window_begins: bool = False


@dataclass(frozen=True)
class BeginAgain:
    """Begin the session again, for another global batch.

    Attributes:
        first_step: The step that is trained next.
    """

    first_step: int


@dataclass(frozen=True)
class AdoptSuggestion:
    """Find the first step that no rank has fetched, and hand it to :meth:`TuningSession.adopt_suggestion`."""


@dataclass(frozen=True)
class ExchangeReports:
    """Gather the reports of all ranks, have rank zero decide, and follow its decision on every rank."""


@dataclass(frozen=True)
class ChangePlan:
    """Follow another plan.

    Attributes:
        first_step: The first step that no rank has fetched: the plan holds from there on.
        plan: The plan.
        reason: Why, for people.
        tune_steps_left: Most steps that the tuning may still take; 0 where it is over.
    """

    first_step: int
    plan: BatchPlan
    reason: str
    tune_steps_left: int


@dataclass(frozen=True)
class KeepPlan:
    """Say that the tuning is over and has changed nothing.

    Attributes:
        plan: The plan that stays.
        reason: Why, for people.
    """

    plan: BatchPlan
    reason: str


@dataclass(frozen=True)
class ShowSpeedUp:
    """Show what the tuning brought.

    Attributes:
        before: One window per rank under the plan that was measured first.
        after: The same under the plan that was found.
    """

    before: tuple[WindowTiming, ...]
    after: tuple[WindowTiming, ...]


Action = (
    StartTimer
    | StopTimer
    | CloseStep
    | BeginAgain
    | AdoptSuggestion
    | ExchangeReports
    | ChangePlan
    | KeepPlan
    | ShowSpeedUp
)
