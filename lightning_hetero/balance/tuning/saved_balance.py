"""What a checkpoint holds of the balance: plain numbers and texts, read with suspicion."""

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
    """The balance of a run whose tuning was over.

    Attributes:
        devices: the name of each rank's device.
        schedule: which plan holds at which training step.
        step_times: the expected step time of each rank; empty where it was not measured.
        balance: the state of the judgement, as :meth:`Rebalancer.to_dict` returned it; None where there is none.
    """

    devices: tuple[str, ...]
    schedule: PlanSchedule
    step_times: tuple[StepTime, ...]
    balance: Mapping[str, Any] | None

    @classmethod
    def from_dict(cls, state: Any) -> SavedBalance | None:
        """Return what a checkpoint says, or None where it was saved before the tuning was over.

        Raises:
            ConfigurationError: the state is damaged, of another version, or its parts are of different numbers of
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
            raise ConfigurationError(f"Its parts must be of one number of ranks, got {sorted(ranks)}.")
        return cls(devices, schedule, times, balance)

    def is_of(self, profiles: Sequence[DeviceProfile]) -> bool:
        """Return whether the state is of these devices, one per rank."""
        return self.devices == tuple(profile.name for profile in profiles)
