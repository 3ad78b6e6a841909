"""The record of a run: its measurements and decisions, one JSON object per line, so a crash costs at most one line.

The first line is the header, and every other line is an event.  ``run_record_parser`` reads the record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lightning_hetero.balance.types import DeviceProfile

__all__ = [
    "EVENTS",
    "RECORD_FORMAT",
    "RECORD_VERSION",
    "Event",
    "RunAdvice",
    "RunChange",
    "RunEnd",
    "RunHeader",
    "RunPasses",
    "RunRecord",
    "RunStages",
    "RunWindow",
    "to_line",
]

RECORD_FORMAT = "lightning_hetero run"
RECORD_VERSION = 1
_DIGITS = 6


@dataclass(frozen=True)
class RunHeader:
    """The description of a run.

    Attributes:
        strategy: Name of the strategy, ``"hetero_ddp"`` or ``"hetero_pipeline"``.
        started: Time at which the run started, in ISO 8601 and UTC.
        global_batch_size: Number of samples per step.
        devices: Device of each rank.
        package: Version of this package.
    """

    strategy: str
    started: str
    global_batch_size: int
    devices: tuple[DeviceProfile, ...]
    package: str = ""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.devices)


@dataclass(frozen=True)
class RunWindow:
    """A window of measured steps of all ranks; sequences have the shape ``(world_size,)``.

    Attributes:
        step: Last step of the window, counted from 0 over all epochs.
        time_s: Seconds since the run started.
        tuning: Whether the tuning was still under way.
        samples: Size of each rank's mini-batch.
        own_s: Mean own time per step of each rank, without waiting; 0 for a rank that measured nothing.
        waiting_s: Median of the remaining time of a step.
        deviation_s: Standard deviation of the own time per step.
        overhead_s: Overhead in the fitted step time of each rank; empty until every rank has been measured.
        seconds_per_sample: Cost per sample in the fitted step time of each rank; empty until every rank has been
            measured.
        communication_s: Seconds that a step takes in addition to the slowest rank's own time.
        peak_bytes: Largest memory that each rank has held; 0 where unknown, and empty if unknown for all ranks.
        budget_bytes: Memory that each rank may use; 0 where unknown, and empty if unknown for all ranks.
    """

    kind: ClassVar[str] = "window"
    step: int
    time_s: float
    tuning: bool
    samples: tuple[int, ...]
    own_s: tuple[float, ...]
    waiting_s: tuple[float, ...]
    deviation_s: tuple[float, ...]
    overhead_s: tuple[float, ...] = ()
    seconds_per_sample: tuple[float, ...] = ()
    communication_s: float = 0.0
    peak_bytes: tuple[float, ...] = ()
    budget_bytes: tuple[float, ...] = ()


@dataclass(frozen=True)
class RunChange:
    """A change of shares.

    Attributes:
        step: First step under the new plan.
        time_s: Seconds since the run started.
        samples: Samples of each rank under the new plan, shape ``(world_size,)``.
        reason: Reason for the change, in words.
    """

    kind: ClassVar[str] = "change"
    step: int
    time_s: float
    samples: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class RunAdvice:
    """The prediction for the plan that the tuning has found.

    Attributes:
        step: Step at which it was predicted.
        time_s: Seconds since the run started.
        step_s: Predicted seconds per step.
        speed_up: Predicted samples per second, divided by those under equal shares.
        efficiency: Predicted samples per second, divided by the bound.
        sentences: Notes for the user on what to change.
    """

    kind: ClassVar[str] = "advice"
    step: int
    time_s: float
    step_s: float
    speed_up: float
    efficiency: float
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class RunStages:
    """The stages of a pipeline; sequences have the shape ``(num_stages,)``, the first stage first.

    Attributes:
        step: First step with these stages.
        time_s: Seconds since the run started.
        ranks: Rank of each stage.
        ends: Index of the layer after the last layer of each stage.
        forward_s: Seconds of the forward pass of one micro-batch in each stage; empty if nothing was measured.
        backward_s: Seconds of the backward pass of one micro-batch in each stage; empty if nothing was measured.
        micro_batches: Number of micro-batches per step.
        schedule: Pipeline schedule, ``"1f1b"`` or ``"gpipe"``.
        transfer_s: Seconds that a transfer between two stages takes.
        step_s: Predicted seconds per step; 0 if nothing was measured.
        uniform_step_s: Predicted seconds per step with equal numbers of layers; 0 if nothing was measured.
        sentences: Notes for the user.
    """

    kind: ClassVar[str] = "stages"
    step: int
    time_s: float
    ranks: tuple[int, ...]
    ends: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    micro_batches: int
    schedule: str
    transfer_s: float
    step_s: float
    uniform_step_s: float
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class RunPasses:
    """One recorded step of a pipeline; sequences have one entry per pass.

    Attributes:
        step: Recorded step.
        time_s: Seconds since the run started.
        stages: Stage of each pass.
        kinds: What each pass was: "forward" or "backward", or the part of a backward pass, "input" or "weight".
        micro_batches: Micro-batch of each pass.
        start_s: Start of each pass, in seconds since the start of the step.
        end_s: End of each pass, in seconds since the start of the step.
    """

    kind: ClassVar[str] = "passes"
    step: int
    time_s: float
    stages: tuple[int, ...]
    kinds: tuple[str, ...]
    micro_batches: tuple[int, ...]
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]


@dataclass(frozen=True)
class RunEnd:
    """The end of a run.

    Attributes:
        step: Last step.
        time_s: Seconds since the run started.
        reason: Reason for the end, ``"finished"`` or the error that ended the run.
    """

    kind: ClassVar[str] = "end"
    step: int
    time_s: float
    reason: str


Event = RunWindow | RunChange | RunAdvice | RunStages | RunPasses | RunEnd
EVENTS: tuple[type[Event], ...] = (RunWindow, RunChange, RunAdvice, RunStages, RunPasses, RunEnd)


@dataclass(frozen=True)
class RunRecord:
    """Everything that a record says about a run.

    Attributes:
        header: Description of the run.
        windows: Windows of measured steps in their order; a long run keeps only some of them.
        changes: Changes of shares in their order.
        advice: Latest advice; None before the tuning has finished.
        stages: Latest stages of a pipeline; None for ``hetero_ddp``.
        earlier_stages: Stages of a pipeline before layers have moved, in their order.
        passes: Latest recorded step of a pipeline; None if none was recorded.
        end: End of the run; None while it continues, or if its process was killed.
    """

    header: RunHeader
    windows: tuple[RunWindow, ...] = ()
    changes: tuple[RunChange, ...] = ()
    advice: RunAdvice | None = None
    stages: RunStages | None = None
    earlier_stages: tuple[RunStages, ...] = ()
    passes: RunPasses | None = None
    end: RunEnd | None = None


def to_line(value: RunHeader | Event) -> str:
    """Return a header or an event as one line of JSON, without a line break and with floats of six digits."""
    fields: dict[str, Any] = asdict(value)
    first = (
        {"record": RECORD_FORMAT, "version": RECORD_VERSION} if isinstance(value, RunHeader) else {"event": value.kind}
    )
    return json.dumps({**first, **_rounded(fields)}, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else 0.0
    if isinstance(value, Mapping):
        return {name: _rounded(v) for name, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
