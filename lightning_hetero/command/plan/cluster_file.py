"""Read the file of ``lightning-hetero plan``: the choice of strategy, and the keys of ``hetero_ddp``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_hetero.balance.types import StepTime
from lightning_hetero.command.plan.auto.auto_file import AUTO_KEYS, read_auto
from lightning_hetero.command.plan.auto.choice import AutoCluster
from lightning_hetero.command.plan.cluster import Cluster, DeviceKind, SampleMemory
from lightning_hetero.command.plan.communication import AllReduce, bucket_bytes, bucket_bytes_of_parameters
from lightning_hetero.command.plan.fields import Fields
from lightning_hetero.command.plan.pipeline.pipeline_cluster import PipelineCluster
from lightning_hetero.command.plan.pipeline.pipeline_file import PIPELINE_KEYS, read_pipeline
from lightning_hetero.command.plan.probe_file import read_probe
from lightning_hetero.command.plan.shards.prediction import ShardedCluster
from lightning_hetero.command.plan.yaml_file import read_yaml
from lightning_hetero.exceptions import ConfigurationError, HeteroError

__all__ = ["ClusterFile", "read_cluster_file"]

_DATA_PARALLEL_KEYS = (
    *("strategy", "global_batch_size", "batch_multiple", "gradient_megabytes", "parameters", "link_gigabits_per_s"),
    *("latency_us", "memory_megabytes_per_sample", "memory_megabytes_fixed", "devices"),
)
_DEVICE_KEYS = (
    *("name", "count", "samples_per_s", "milliseconds_per_sample", "overhead_ms", "speed", "probe", "max_batch_size"),
    *("memory_gigabytes", "price_per_hour"),
)
_KEYS = {
    "hetero_ddp": _DATA_PARALLEL_KEYS,
    "hetero_fsdp": (*_DATA_PARALLEL_KEYS, "units", "optimizer_states"),
    "hetero_pipeline": PIPELINE_KEYS,
    "auto": AUTO_KEYS,
}
_SPEEDS = ("samples_per_s", "milliseconds_per_sample", "speed", "probe")
_MAX_DEVICES = 1_000_000
_MAX_SAMPLES = 10**9
_BYTES_PER_GRADIENT = 4  # 32 bits


@dataclass(frozen=True)
class ClusterFile:
    """The content of a file.

    Attributes:
        cluster: Devices and training to predict.
        is_relative: Whether only relative speeds are known. The unit of time is then what the slowest device needs for
            one sample.
        notes: Notes for the user about the input.
    """

    cluster: Cluster | PipelineCluster | ShardedCluster | AutoCluster
    is_relative: bool = False
    notes: tuple[str, ...] = ()


def read_cluster_file(path: Path) -> ClusterFile:
    """Read and check a file.

    Raises:
        ConfigurationError: The file is wrong; the message names the file and the path of the value.
    """
    values = read_yaml(path)
    try:
        top = Fields(values, sorted({key for keys in _KEYS.values() for key in keys}))
        strategy = top.choice("strategy", tuple(_KEYS), "hetero_ddp")
        for key in values:
            if key not in _KEYS[strategy]:
                others = " and ".join(name for name, keys in _KEYS.items() if key in keys)
                raise ConfigurationError(
                    f"`{key}` must be left out with `strategy: {strategy}`, because only {others} has it."
                )
        if strategy == "hetero_pipeline":
            return ClusterFile(read_pipeline(top))
        if strategy == "auto":
            return ClusterFile(read_auto(top, path.parent))
        file = _read_data_parallel(top, path.parent)
        return file if strategy == "hetero_ddp" else _read_shards(top, file)
    except HeteroError as error:
        raise ConfigurationError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Device:
    kind: DeviceKind
    is_relative: bool
    workload: str = ""


def _read_data_parallel(top: Fields, folder: Path) -> ClusterFile:
    batch = top.integer("global_batch_size", maximum=_MAX_SAMPLES)
    entries = top.items("devices", "a list with one entry for each kind of device")
    devices = [
        device
        for i, entry in enumerate(entries)
        for device in _read_devices(Fields(entry, _DEVICE_KEYS, f"devices[{i}]"), folder)
    ]
    total = sum(device.kind.count for device in devices)
    if total > _MAX_DEVICES:
        raise ConfigurationError(f"`devices` must be at most {_MAX_DEVICES} in total, got {total}.")
    is_relative = devices[0].is_relative
    if any(device.is_relative != is_relative for device in devices):
        raise ConfigurationError(
            "`devices` must all have times, or all have relative speeds (`speed`, or a probe without measurements), got"
            " both."
        )
    kinds = [device.kind for device in devices]
    if is_relative:  # nominal speeds can be numbers of any size
        slowest = max(kind.step_time.seconds_per_sample for kind in kinds)
        kinds = [replace(kind, step_time=StepTime(0.0, kind.step_time.seconds_per_sample / slowest)) for kind in kinds]
    cluster = Cluster(
        tuple(kinds),
        batch,
        _read_all_reduce(top, is_relative),
        top.integer("batch_multiple", 1, maximum=_MAX_SAMPLES),
        _read_memory(top),
    )
    return ClusterFile(cluster, is_relative, tuple(_notes(cluster, devices)))


def _read_shards(top: Fields, file: ClusterFile) -> ClusterFile:
    cluster = file.cluster
    assert isinstance(cluster, Cluster)
    if file.is_relative:
        raise ConfigurationError("`devices` must have times with `strategy: hetero_fsdp`. Give samples_per_s of each.")
    unknown = [kind.name for kind in cluster.kinds if kind.memory_bytes is None]
    if unknown:
        raise ConfigurationError(
            f"`memory_gigabytes` must be given for all devices with `strategy: hetero_fsdp`, got none for {unknown[0]}."
        )
    size = sum(cluster.all_reduce.buckets)
    if not size:
        raise ConfigurationError("`parameters` or `gradient_megabytes` must be given with `strategy: hetero_fsdp`.")
    ignored = "the memory of the devices is ignored without memory_megabytes_per_sample"
    notes = [note for note in file.notes if note != ignored]
    if cluster.memory is None:
        notes.append("activations are ignored; to include them, give memory_megabytes_per_sample")
    sharded = ShardedCluster(cluster, size, top.integer("units"), top.number("optimizer_states", 2.0, above=None))
    return ClusterFile(sharded, notes=tuple(notes))


def _read_devices(entry: Fields, folder: Path) -> list[_Device]:
    speed = entry.one_of(_SPEEDS, "how fast the device is")
    count = entry.integer("count", 1, maximum=_MAX_DEVICES)
    memory = entry.optional_number("memory_gigabytes")
    memory_bytes = None if memory is None else 1e9 * memory
    most = entry.optional_integer("max_batch_size")
    price = entry.optional_number("price_per_hour", above=None)
    if speed not in {"samples_per_s", "milliseconds_per_sample"} and "overhead_ms" in entry:
        raise entry.wrong(
            "overhead_ms", f"left out with `{speed}`", "It belongs to samples_per_s or milliseconds_per_sample."
        )
    if speed == "probe":
        if "name" in entry:
            raise entry.wrong("name", "left out with `probe`", "The probe contains the names.")
        return [
            _Device(
                DeviceKind(one.name, count, one.step_time, most, memory_bytes or one.memory_bytes, price),
                one.is_relative,
                one.workload,
            )
            for one in read_probe(folder / entry.text("probe"))
        ]
    name = entry.text("name")
    if speed == "speed":
        step_time = StepTime(0.0, 1 / entry.number("speed"))
    else:
        value = entry.number(speed)
        step_time = StepTime(
            entry.number("overhead_ms", 0.0, above=None) / 1e3, 1 / value if speed == "samples_per_s" else value / 1e3
        )
    return [_Device(DeviceKind(name, count, step_time, most, memory_bytes, price), speed == "speed")]


def _read_all_reduce(top: Fields, is_relative: bool) -> AllReduce:
    for key in ("link_gigabits_per_s", "latency_us"):
        if key in top and is_relative:
            raise top.wrong(key, "left out if only relative speeds are known", "Give samples_per_s of each device.")
    if "gradient_megabytes" in top and "parameters" in top:
        top.one_of(("gradient_megabytes", "parameters"), "how large the gradients are")
    bandwidth = top.optional_number("link_gigabits_per_s")
    latency_s = top.number("latency_us", 0.0, above=None) / 1e6
    size: float | list[float] | None = None
    if "gradient_megabytes" in top:
        size = _scaled(top.numbers("gradient_megabytes"), lambda megabytes: 1e6 * megabytes)
    elif "parameters" in top:
        size = _scaled(top.numbers("parameters"), lambda number: _BYTES_PER_GRADIENT * number)
    elif bandwidth is not None:
        raise ConfigurationError(
            "`gradient_megabytes` or `parameters` must be given with `link_gigabits_per_s`, but both are missing."
        )
    if size is None:
        return AllReduce((0.0,), None, latency_s)
    buckets = bucket_bytes_of_parameters(size) if isinstance(size, list) else bucket_bytes(size)
    return AllReduce(buckets, None if bandwidth is None else 1e9 * bandwidth, latency_s)


def _scaled(values: float | list[float], scale: Callable[[float], float]) -> float | list[float]:
    return [scale(one) for one in values] if isinstance(values, list) else scale(values)


def _read_memory(top: Fields) -> SampleMemory | None:
    fixed_bytes = 1e6 * top.number("memory_megabytes_fixed", 0.0, above=None)
    if "memory_megabytes_per_sample" not in top:
        if "memory_megabytes_fixed" in top:
            raise top.wrong("memory_megabytes_per_sample", "given with `memory_megabytes_fixed`")
        return None
    return SampleMemory(1e6 * top.number("memory_megabytes_per_sample"), fixed_bytes)


def _notes(cluster: Cluster, devices: list[_Device]) -> list[str]:
    found = []
    knows_memory = any(device.kind.memory_bytes is not None for device in devices)
    if cluster.memory is not None and not knows_memory:
        found.append("memory_megabytes_per_sample has no effect, because no device has memory_gigabytes")
    workloads = sorted({device.workload for device in devices if device.workload})
    if cluster.memory is None and knows_memory and not workloads:
        found.append("the memory of the devices is ignored without memory_megabytes_per_sample")
    if workloads:
        found.append(
            f"the probe measured {' and '.join(workloads)}; shares and speed-up hold as far as your training behaves"
            f" like that"
        )
    if cluster.all_reduce.bits_per_s is None and cluster.all_reduce.latency_s == 0 and cluster.world_size > 1:
        found.append(
            "communication is ignored; to include it, give link_gigabits_per_s, and gradient_megabytes or parameters"
        )
    return found
