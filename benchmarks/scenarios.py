"""The set-ups that are measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCENARIOS", "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """Devices of known speed and the training that runs on them.

    Attributes:
        factors: how many times as long each rank takes, one number a rank.
        seconds_per_sample: seconds that a sample takes on a device of factor 1.
        overhead_s: seconds that a step takes besides, on a device of factor 1.
        batch_size: samples a rank under equal shares.
        throttled_at: the step at which rank 0 becomes twice as slow; 0 where it does not.
        recovered_at: the step at which it recovers.
    """

    factors: tuple[float, ...]
    seconds_per_sample: float
    overhead_s: float = 0.0
    batch_size: int = 64
    throttled_at: int = 0
    recovered_at: int = 0

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.factors)

    @property
    def throttled(self) -> bool:
        """Whether a device changes its speed in the midst of a run."""
        return self.throttled_at > 0


SCENARIOS = {
    "1:2": Scenario((1, 2), 0.0012),
    "1:4": Scenario((1, 4), 0.0010),
    "1:1:2": Scenario((1, 1, 2), 0.0012),
    "1:2:2:4": Scenario((1, 2, 2, 4), 0.0008),
    "8 ranks of 4 kinds": Scenario((1, 1, 2, 2, 3, 3, 4, 4), 0.0010),
    "equal": Scenario((1, 1), 0.0012),
    "large overhead, 1:4": Scenario((1, 4), 0.0005, 0.020),
    "throttled in mid-run": Scenario((1, 1), 0.0012, throttled_at=60, recovered_at=120),
}
