"""Describe one device for ``lightning-hetero probe``, in plain numbers and strings that JSON can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_hetero.balance.types import DeviceProfile, StepTime

__all__ = ["PROCESSOR", "DeviceReport", "Measurement"]

PROCESSOR = "cpu"


@dataclass(frozen=True)
class Measurement:
    """The speed of a device on the reference network.

    Attributes:
        overhead_s: Overhead per step, in seconds.
        seconds_per_sample: Cost per sample, in seconds.
        samples_per_s: Speed at the largest measured batch size.
        spread: Interquartile range of the repetitions at that size, divided by their median.
        workload: Description of the network that was trained.
    """

    overhead_s: float
    seconds_per_sample: float
    samples_per_s: float
    spread: float
    workload: str

    @property
    def step_time(self) -> StepTime:
        """The fitted step time."""
        return StepTime(self.overhead_s, self.seconds_per_sample)


@dataclass(frozen=True)
class DeviceReport:
    """One device of this machine; None stands for an unknown value.

    Attributes:
        device: Name of the device in torch, for example ``"cuda:0"`` or ``"cpu"``.
        name: Name of the model.
        vendor: Name of the vendor, for example ``"NVIDIA"``.
        memory_bytes: Memory of the device; for a processor, the part of the machine's memory that this process may use.
        free_bytes: Memory that no process has allocated.
        clock_mhz: Current clock rate of the cores.
        max_clock_mhz: Highest clock rate of the cores.
        throttled: Reasons why the clock is throttled, one phrase per reason; empty if it is not.
        other_processes: Number of other processes that have allocated memory on the device.
        other_bytes: Memory that these processes have allocated.
        utilisation: Fraction of the device that is busy, 0 to 1, not counting this process.
        temperature_c: Temperature in degrees Celsius.
        nominal_speed: Speed according to the data sheet, comparable between devices for which it is known.
        measured: Measured speed.
        physical_cores: Number of physical cores of a processor.
        logical_cores: Number of logical cores of a processor.
        usable_cores: Number of cores that this process may use at a time; with a quota it may be a fraction.
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
        """Whether the device is the machine's processor rather than an accelerator."""
        return self.device == PROCESSOR

    def profile(self, host: str) -> DeviceProfile:
        """Return the profile of a rank that runs on this device."""
        return DeviceProfile(host, self.device, self.name, self.nominal_speed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)
