"""Read the keys of ``strategy: auto``."""

from __future__ import annotations

from pathlib import Path

from lightning_hetero.command.plan.auto.choice import AutoCluster, AutoDevice
from lightning_hetero.command.plan.auto.model_file import read_layers, read_profile
from lightning_hetero.command.plan.fields import Fields
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["AUTO_KEYS", "read_auto"]

AUTO_KEYS = (
    *("strategy", "global_batch_size", "num_microbatches", "link_gigabits_per_s", "latency_us", "optimizer_states"),
    *("model", "layers", "devices", "devices_per_node", "node_gigabits_per_s"),
)
_DEVICE_KEYS = ("name", "count", "speed", "memory_gigabytes", "price_per_hour")
_MAX_DEVICES = 4096
_MAX_MICRO_BATCHES = 1024
_MAX_SAMPLES = 10**9


def read_auto(top: Fields, folder: Path) -> AutoCluster:
    """Return the devices, the model and its training.

    Args:
        top: The keys of the file.
        folder: Folder of the file, to which the path of the model's file is relative.

    Raises:
        ConfigurationError: A value is wrong; the message names its path.
    """
    devices = []
    for i, entry in enumerate(top.items("devices", "a list with one entry for each kind of device")):
        fields = Fields(entry, _DEVICE_KEYS, f"devices[{i}]")
        memory = fields.optional_number("memory_gigabytes")
        devices.append(
            AutoDevice(
                fields.text("name"),
                fields.integer("count", 1, maximum=_MAX_DEVICES),
                fields.number("speed"),
                None if memory is None else 1e9 * memory,
                fields.optional_number("price_per_hour", above=None),
            )
        )
    priced = [device for device in devices if device.price_per_hour is not None]
    if priced and len(priced) < len(devices):
        raise ConfigurationError("`price_per_hour` must be given for all devices or for none. Use 0 for free ones.")
    bandwidth = top.optional_number("link_gigabits_per_s")
    within = top.optional_number("node_gigabits_per_s")
    per_node = top.optional_integer("devices_per_node")
    if within is not None and (bandwidth is None or per_node is None):
        raise top.wrong(
            "node_gigabits_per_s", "given together with `devices_per_node` and `link_gigabits_per_s`, which is slower"
        )
    if top.one_of(("model", "layers"), "what the model takes") == "model":
        if "optimizer_states" in top:
            raise top.wrong("optimizer_states", "left out with `model`", "The file of the profile has it.")
        model = read_profile(folder / top.text("model"))
    else:
        model = read_layers(top)
    batch = top.integer("global_batch_size", maximum=_MAX_SAMPLES)
    return AutoCluster(
        tuple(devices),
        model,
        batch,
        top.integer("num_microbatches", min(8, batch), maximum=min(_MAX_MICRO_BATCHES, batch)),
        None if bandwidth is None else 1e9 * bandwidth,
        top.number("latency_us", 0.0, above=None) / 1e6,
        per_node,
        None if within is None else 1e9 * within,
    )
