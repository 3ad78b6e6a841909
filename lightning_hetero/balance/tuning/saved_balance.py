"""Read the balance from a checkpoint, whose plain numbers and strings are validated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hetero.balance.checked import as_bool, as_list, as_mapping, as_str, entry
from lightning_hetero.balance.tuning.rebalancer import Rebalancer
from lightning_hetero.balance.types import DeviceProfile, PlanSchedule, StepTime
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["SavedBalance"]


@dataclass(frozen=True)
class SavedBalance:
    """The balance of a run whose tuning had finished.

    Attributes:
        devices: Name of each rank's device.
        schedule: Plan schedule of the run.
        step_times: Expected step time of each rank; empty if they were not measured.
        balance: State of the rebalancer, as :meth:`Rebalancer.to_dict` returned it; None if there is none.
    """

    devices: tuple[str, ...]
    schedule: PlanSchedule
    step_times: tuple[StepTime, ...]
    balance: Mapping[str, Any] | None

    @classmethod
    def from_dict(cls, state: Any) -> SavedBalance | None:
        """Return the balance in a checkpoint; None if it was saved before the tuning had finished.

        Raises:
            ConfigurationError: The state is damaged or of another version, or its parts have different numbers of
                ranks.
        """
        values = as_mapping(state, "state")
        if not as_bool(values.get("finished", False), "finished"):
            return None
        devices = tuple(as_str(name, "devices") for name in as_list(entry(values, "devices"), "devices"))
        schedule = PlanSchedule.from_dict(entry(values, "schedule"))
        times = tuple(StepTime.from_dict(time) for time in as_list(entry(values, "step_times"), "step_times"))
        balance = values.get("balance")
        ranks = {len(devices), schedule.plans[0].world_size, len(times) or len(devices)}
        if balance is not None:
            initial, model = Rebalancer.initial_of(balance), Rebalancer.model_of(balance)
            ranks |= {initial.world_size, model.world_size}
        if len(ranks) > 1:
            raise ConfigurationError(f"All parts of the state must have the same number of ranks, got {sorted(ranks)}.")
        return cls(devices, schedule, times, balance)

    def is_of(self, profiles: Sequence[DeviceProfile]) -> bool:
        """Return whether the state is of these devices, one per rank."""
        return self.devices == tuple(profile.name for profile in profiles)
