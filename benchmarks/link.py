"""Simulate two nodes on one machine, with a link of known bandwidth: network namespaces and a token bucket.

Needs the right to create namespaces, and the tools ``ip``, ``tc`` and ``unshare``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Node", "available", "linked_nodes"]

_NETWORK = "10.77.0."


@dataclass(frozen=True)
class Node:
    """One of two nodes.

    Attributes:
        rank: Rank of the node, 0 or 1.
    """

    rank: int

    @property
    def namespace(self) -> str:
        """The name of the node's network namespace."""
        return f"lightning_hetero_{self.rank}"

    @property
    def interface(self) -> str:
        """The name of the node's end of the link."""
        return f"lh{self.rank}"

    @property
    def address(self) -> str:
        """The node's address on the link."""
        return f"{_NETWORK}{self.rank + 1}"

    def command(self, *command: str) -> list[str]:
        """Return a command that runs ``command`` on this node, under the node's own host name."""
        inside = f'hostname node{self.rank}; exec ip netns exec {self.namespace} "$@"'
        return ["unshare", "-u", "sh", "-c", inside, "sh", *command]


def available() -> bool:
    """Return whether this process may create such nodes."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc", "unshare")) and _namespaces_work()


def _namespaces_work() -> bool:
    made = subprocess.run(["ip", "netns", "add", "lightning_hetero_try"], capture_output=True, check=False)
    if made.returncode == 0:
        _run("ip netns del lightning_hetero_try")
    return made.returncode == 0


@contextmanager
def linked_nodes(megabits_per_s: int) -> Iterator[tuple[Node, Node]]:
    """Create two nodes with a link of that bandwidth, and remove them afterwards."""
    nodes = (Node(0), Node(1))
    hosts = "".join(f"{node.address} node{node.rank}\n" for node in nodes)
    try:
        for node in nodes:
            _run(f"ip netns add {node.namespace}")
            _run(f"ip -n {node.namespace} link set lo up")
            folder = Path("/etc/netns", node.namespace)
            folder.mkdir(parents=True, exist_ok=True)
            folder.joinpath("hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        first, second = nodes
        _run(
            f"ip link add {first.interface} netns {first.namespace} type veth"
            f" peer name {second.interface} netns {second.namespace}"
        )
        for node in nodes:
            _run(f"ip -n {node.namespace} addr add {node.address}/24 dev {node.interface}")
            _run(f"ip -n {node.namespace} link set {node.interface} up")
            bucket = f"tbf rate {megabits_per_s}mbit burst 128kb latency 100ms"
            _run(f"tc -n {node.namespace} qdisc add dev {node.interface} root {bucket}")
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", node.namespace), ignore_errors=True)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)
