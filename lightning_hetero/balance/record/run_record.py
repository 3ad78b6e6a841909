"""The record of a run: what was measured and decided, one JSON object a line, so that a crash costs one line at most.

The first line is the header; each further one is an event.  ``run_record_parser`` reads it.
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
    """What a run is.

    Attributes:
        strategy: ``"hetero_ddp"`` or ``"hetero_pipeline"``.
        started: when, as ISO 8601 in UTC.
        global_batch_size: samples of a step.
        devices: what each rank runs on.
        package: version of this package.
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
    """Some measured steps of all ranks; sequences have the shape ``(world_size,)``.

    Attributes:
        step: the last one of them, counted from 0 over all epochs.
        time_s: seconds since the run began.
        tuning: whether the first search for the shares was under way.
        samples: size of each rank's mini-batch.
        own_s: mean own time of a step of each rank, without waiting; 0 where it measured nothing.
        waiting_s: median of the rest of a step.
        deviation_s: standard deviation of a step's own time.
        overhead_s: of the fitted step time of each rank; empty before every rank was measured.
        seconds_per_sample: likewise.
        communication_s: what a step takes besides the slowest rank's own time.
        peak_bytes: memory held at most, 0 where unknown; empty where it is for all.
        budget_bytes: memory that each rank may hold, likewise.
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
        step: the first one under the new plan.
        time_s: seconds since the run began.
        samples: the new plan, shape ``(world_size,)``.
        reason: why, for people.
    """

    kind: ClassVar[str] = "change"
    step: int
    time_s: float
    samples: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class RunAdvice:
    """What is predicted of the plan that the tuning has found.

    Attributes:
        step: when.
        time_s: seconds since the run began.
        step_s: predicted seconds of a step.
        speed_up: samples a second over those under equal shares.
        efficiency: samples a second over the sum of what each rank would process alone.
        sentences: what a person might change.
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
        step: the first one on these stages.
        time_s: seconds since the run began.
        ranks: the rank of each stage.
        ends: the layer behind the last one of each stage.
        forward_s: what each stage takes for a micro-batch; empty where nothing was measured.
        backward_s: likewise.
        micro_batches: of a step.
        schedule: ``"1f1b"`` or ``"gpipe"``.
        transfer_s: of a transfer between stages.
        step_s: predicted seconds of a step; 0 where nothing was measured.
        uniform_step_s: likewise with equal numbers of layers.
        sentences: what a person should know.
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
    """One recorded step of a pipeline; sequences have one entry a pass.

    Attributes:
        step: which.
        time_s: seconds since the run began.
        stages: which stage computed.
        backward: whether it was a backward pass.
        micro_batches: which micro-batch.
        start_s: from the start of the step.
        end_s: likewise.
    """

    kind: ClassVar[str] = "passes"
    step: int
    time_s: float
    stages: tuple[int, ...]
    backward: tuple[bool, ...]
    micro_batches: tuple[int, ...]
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]


@dataclass(frozen=True)
class RunEnd:
    """The end of a run.

    Attributes:
        step: the last one.
        time_s: seconds since the run began.
        reason: ``"finished"``, or the error that ended it.
    """

    kind: ClassVar[str] = "end"
    step: int
    time_s: float
    reason: str


Event = RunWindow | RunChange | RunAdvice | RunStages | RunPasses | RunEnd
EVENTS: tuple[type[Event], ...] = (RunWindow, RunChange, RunAdvice, RunStages, RunPasses, RunEnd)


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run.

    Attributes:
        header: what the run is.
        windows: measured steps in their order; of a long run not all.
        changes: all changes of shares.
        advice: the latest; None before the tuning is over.
        stages: the latest stages of a pipeline; None for ``hetero_ddp``.
        passes: the latest recorded step of a pipeline; None where none was recorded.
        end: how it ended; None while it goes on, or where its process was killed.
    """

    header: RunHeader
    windows: tuple[RunWindow, ...] = ()
    changes: tuple[RunChange, ...] = ()
    advice: RunAdvice | None = None
    stages: RunStages | None = None
    passes: RunPasses | None = None
    end: RunEnd | None = None


def to_line(value: RunHeader | Event) -> str:
    """Return a header or an event as one line of JSON, without the line break, floats in six digits."""
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
