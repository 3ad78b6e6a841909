"""The actions that a tuning session asks its owner to perform."""

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
    "WaitForDevice",
]


@dataclass(frozen=True)
class StartTimer:
    """Start to time steps with the next one, and discard timings that were not read."""


@dataclass(frozen=True)
class StopTimer:
    """Stop timing steps."""


@dataclass(frozen=True)
class CloseStep:
    """End the measurement of the current step.

    Attributes:
        keep: Whether the step counts as measured.
        window_begins: Whether the next step is the first of a window, so that the peak of memory counts from now on.
    """

    keep: bool
    window_begins: bool = False


@dataclass(frozen=True)
class WaitForDevice:
    """Let the host wait for its device before the next step, which is measured."""


@dataclass(frozen=True)
class BeginAgain:
    """Begin the session again, for another global batch size.

    Attributes:
        first_step: Step that is trained next.
    """

    first_step: int


@dataclass(frozen=True)
class AdoptSuggestion:
    """Find the first step that no rank has fetched, and pass it to :meth:`TuningSession.adopt_suggestion`."""


@dataclass(frozen=True)
class ExchangeReports:
    """Gather the reports of all ranks, have rank zero decide, and follow its decision on every rank."""


@dataclass(frozen=True)
class ChangePlan:
    """Follow another plan.

    Attributes:
        first_step: First step that no rank has fetched, from which the plan holds.
        plan: The new plan.
        reason: Reason for the change, to be shown to the user.
        tune_steps_left: Maximum number of steps that the tuning may still take; 0 if it is over.
    """

    first_step: int
    plan: BatchPlan
    reason: str
    tune_steps_left: int


@dataclass(frozen=True)
class KeepPlan:
    """Report that the tuning is over and has kept the plan.

    Attributes:
        plan: The plan that stays.
        reason: Reason to keep it, to be shown to the user.
    """

    plan: BatchPlan
    reason: str


@dataclass(frozen=True)
class ShowSpeedUp:
    """Show the speed-up of the tuning.

    Attributes:
        before: One window per rank under the plan that was measured first.
        after: One window per rank under the plan that was found.
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
    | WaitForDevice
)
