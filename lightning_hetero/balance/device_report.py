"""What ``lightning-hetero probe`` says about one device: plain numbers and strings, and therefore JSON-able."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_hetero.balance.types import DeviceProfile, StepTime

__all__ = ["PROCESSOR", "DeviceReport", "Measurement"]

PROCESSOR = "cpu"


@dataclass(frozen=True)
class Measurement:
    """What a device made of the reference network.

    Attributes:
        overhead_s: what a step costs whatever its size.
        seconds_per_sample: what each further sample costs.
        samples_per_s: speed at the largest size that was measured.
        spread: quartile range of that size's repetitions over their median.
        workload: what was trained, for people.
    """

    overhead_s: float
    seconds_per_sample: float
    samples_per_s: float
    spread: float
    workload: str

    @property
    def step_time(self) -> StepTime:
        """The line that was fitted."""
        return StepTime(self.overhead_s, self.seconds_per_sample)


@dataclass(frozen=True)
class DeviceReport:
    """One device of this machine; whatever is unknown is None.

    Attributes:
        device: where it is, for example ``"cuda:0"`` or ``"cpu"``.
        name: the model.
        vendor: who made it, for example ``"NVIDIA"``.
        memory_bytes: of the device; for a processor what this process may use of the machine's.
        free_bytes: what nobody has of it.
        clock_mhz: of its cores, now.
        max_clock_mhz: the highest one.
        throttled: why the clock is held back, one phrase a reason; empty where it is not.
        other_processes: how many processes beside this one have memory of the device.
        other_bytes: how much memory they have.
        utilisation: the part of the device that is busy, 0 to 1, without this process.
        temperature_c: in degrees Celsius.
        nominal_speed: how fast it is by its data, comparable among devices for which it is known.
        measured: how fast it is by measurement.
        physical_cores: of a processor.
        logical_cores: of a processor.
        usable_cores: how many of them this process may use at a time; a quota need not be a whole number.
    """

    device: str
    name: str
    vendor: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    throttled: tuple[str, ...] | None = None
    other_processes: int | None = None
    other_bytes: int | None = None
    utilisation: float | None = None
    temperature_c: int | None = None
    nominal_speed: float | None = None
    measured: Measurement | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    usable_cores: float | None = None

    @property
    def is_processor(self) -> bool:
        """Whether it is the machine's processor and no accelerator."""
        return self.device == PROCESSOR

    def profile(self, host: str) -> DeviceProfile:
        """Return what a rank on this device runs on."""
        return DeviceProfile(host, self.device, self.name, self.nominal_speed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)
