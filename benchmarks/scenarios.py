"""The scenarios that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SCENARIOS", "Scenario"]


@dataclass(frozen=True)
class Scenario:
    """Devices and the training that runs on them.

    Attributes:
        factors: How many times as long each rank takes, one number per rank.
        seconds_per_sample: Seconds that a sample takes on a device of factor 1 (of a pipeline: for one layer); 0 if
            devices do real work, as fast as they can.
        overhead_s: Seconds that a step takes in addition on a device of factor 1.
        batch_size: Number of samples per rank under equal shares.
        measures: What is measured. "shares" compares ddp, hetero_ddp and fixed splits; "drift" slows down a device in
            the middle of a run; "cost" compares ddp with hetero_ddp on equal devices; "pipeline" compares ways to
            divide the layers; "orders" compares orders of passes; "replicas" compares one pipeline with several;
            "real" compares ways to train a transformer; "trainer" measures what the Trainer adds to a pipeline
            schedule.
        workload: Name of the workload in ``workloads.WORKLOADS``.
        quotas: Fraction of a core that each rank may use; empty for whole cores.
        megabits_per_s: Bandwidth between two nodes of one rank each; 0 for a single node.
        throttled_at: Step at which rank 0 becomes twice as slow, with "drift".
        recovered_at: Step at which rank 0 recovers, with "drift".
    """

    factors: tuple[float, ...]
    seconds_per_sample: float = 0.0
    overhead_s: float = 0.0
    batch_size: int = 64
    measures: Literal["shares", "drift", "cost", "pipeline", "orders", "replicas", "real", "trainer"] = "shares"
    workload: str = "light"
    quotas: tuple[float, ...] = ()
    megabits_per_s: int = 0
    throttled_at: int = 60
    recovered_at: int = 120

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.factors)

    @property
    def is_virtual(self) -> bool:
        """Whether the devices are simulated ones of known speed."""
        return self.seconds_per_sample > 0


SCENARIOS = {
    "1:2": Scenario((1, 2), 0.0012),
    "1:4": Scenario((1, 4), 0.0010),
    "1:1:2": Scenario((1, 1, 2), 0.0012),
    "1:2:2:4": Scenario((1, 2, 2, 4), 0.0008),
    "8 ranks of 4 kinds": Scenario((1, 1, 2, 2, 3, 3, 4, 4), 0.0010),
    "equal": Scenario((1, 1), 0.0012),
    "large overhead, 1:4": Scenario((1, 4), 0.0005, 0.020),
    "1:2, link of 1 Gbit/s": Scenario((1, 2), 0.0012, workload="heavy gradients", megabits_per_s=1000),
    "1:2, link of 200 Mbit/s": Scenario((1, 2), 0.0012, workload="heavy gradients", megabits_per_s=200),
    "CNN, quotas 80:40 %": Scenario((1, 1), batch_size=192, workload="CNN", quotas=(0.8, 0.4)),
    "transformer, quotas 80:40 %": Scenario((1, 1), batch_size=48, workload="transformer", quotas=(0.8, 0.4)),
    "equal, known speed": Scenario((1, 1), 0.0012, measures="cost"),
    "equal, CNN": Scenario((1, 1), measures="cost", workload="CNN"),
    "pipeline 1:2": Scenario((1, 2), 0.008, batch_size=16, measures="pipeline"),
    "pipeline 1:2:4": Scenario((1, 2, 4), 0.004, batch_size=16, measures="pipeline"),
    "orders 1:2": Scenario((1, 2), 0.006, batch_size=16, measures="orders"),
    "orders 1:4": Scenario((1, 4), 0.006, batch_size=16, measures="orders"),
    "orders 1:2:2": Scenario((1, 2, 2), 0.006, batch_size=16, measures="orders"),
    "orders 1:2:4": Scenario((1, 2, 4), 0.006, batch_size=16, measures="orders"),
    "orders 1:2:2:4": Scenario((1, 2, 2, 4), 0.006, batch_size=16, measures="orders"),
    "replicas 1:1:2:2": Scenario((1, 1, 2, 2), 0.004, batch_size=48, measures="replicas"),
    "transformer in stages, quotas 80:40 %": Scenario(
        (1, 1), batch_size=32, measures="real", workload="transformer", quotas=(0.8, 0.4)
    ),
    "pipeline of three ranks": Scenario((1, 1, 1), batch_size=16, measures="trainer"),
    "drift": Scenario((1, 1), 0.0012, measures="drift"),
}
