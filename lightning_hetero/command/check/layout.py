"""Where the ranks of the checks run."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_hetero.exceptions import ConfigurationError

__all__ = ["CPU", "Layout", "free_port", "layout_of", "parse_devices"]

# NCCL refuses two ranks on one card of one host, so each rank gets a host of its own. They then talk through sockets.
_SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MAX_NCHANNELS": "1"}

# Variables of launchers and batch systems: these ranks are nobody else's.
_OF_LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_", "PL_")
_OF_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_RANK")


@dataclass(frozen=True)
class Layout:
    """The ranks of the checks and their devices.

    Attributes:
        kind: "cpu", or "cuda" for the devices of CUDA and ROCm.
        devices: torch's numbers of the CUDA devices, one per rank, or a single one that all ranks share.
        names: Names of these devices.
        ranks: Number of ranks.
    """

    kind: str
    devices: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    ranks: int = 2

    @property
    def cards(self) -> int:
        """The number of CUDA devices."""
        return len(self.devices)

    @property
    def shared(self) -> bool:
        """Whether all ranks are on one card."""
        return self.cards == 1

    @property
    def backend(self) -> str:
        """The usual backend of the process group: ranks that share a card are much faster over gloo."""
        return "nccl" if self.cards > 1 else "gloo"

    @property
    def title(self) -> str:
        """The ranks, their devices and their backend, in words."""
        if self.kind == "cpu":
            return f"{self.ranks} ranks on the processor over gloo"
        named = [f"cuda:{number} ({name})" for number, name in zip(self.devices, self.names, strict=True)]
        return f"{self.ranks} ranks on {' and '.join(named)} over {self.backend}"

    def of_rank(self, rank: int, *, nccl: bool = False) -> dict[str, Any]:
        """Return what a rank's process is told.

        Args:
            rank: Number of the rank.
            nccl: Whether CUDA devices communicate through NCCL even where all ranks share one.
        """
        return {
            "rank": rank,
            "ranks": self.ranks,
            "kind": self.kind,
            "devices": list(self.devices),
            "names": list(self.names),
            "backend": "nccl" if nccl and self.cards else self.backend,
        }

    def environment(self, rank: int, port: int, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a rank's process.

        Args:
            rank: Number of the rank.
            port: Port at which the ranks meet.
            variables: Environment to begin with; what launchers have set in it is left out.
        """
        kept = {k: v for k, v in variables.items() if not k.startswith(_OF_LAUNCHERS) and k not in _OF_RANKS}
        # Lightning lets no two ranks of a node share a card, so each rank is a node where they do.
        node, local = (rank, 0) if self.shared else (0, rank)
        return {
            "OMP_NUM_THREADS": "1",
            **kept,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(self.ranks),
            "NODE_RANK": str(node),
            "LOCAL_RANK": str(local),
            **({"NCCL_HOSTID": f"rank {rank}", **_SOCKETS} if self.shared else {}),
        }


CPU = Layout("cpu")


def parse_devices(text: str) -> tuple[int, ...]:
    """Return the numbers of CUDA devices that a user has asked for; empty for the processor.

    Raises:
        ConfigurationError: The text is neither "cpu" nor different numbers, separated by commas.
    """
    if text == "cpu":
        return ()
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    if len(numbers) < len(parts) or len(set(numbers)) < len(numbers):
        raise ConfigurationError(
            f"`--devices` must be `cpu` or different numbers of CUDA devices, separated by commas, got {text!r}. For"
            " example `--devices 0,1`, or `--devices 0` for two ranks on one card."
        )
    return tuple(numbers)


def layout_of(wanted: tuple[int, ...] | None, found: Sequence[str], broken: Collection[int] = ()) -> Layout:
    """Return the layout for the devices that the user wants, or the best one.

    By default two cards are used, of different models if there are any; one card that two ranks share if there is no
    other; and the processor if there is none.

    Args:
        wanted: Numbers of CUDA devices; empty for the processor, None for the default.
        found: Names of the machine's CUDA devices.
        broken: Numbers of those that do not work, which only the user can want.

    Raises:
        ConfigurationError: A device that the user wants does not exist.
    """
    if wanted is None:
        working = [number for number in range(len(found)) if number not in broken]
        others = [number for number in working if found[number] != found[working[0]]]
        wanted = tuple(working[:2] if not others else [working[0], others[0]])
    if missing := [number for number in wanted if number >= len(found)]:
        raise ConfigurationError(
            f"`--devices` must be numbers of CUDA devices that torch finds ({len(found)}), got {missing[0]}."
            " `lightning-hetero probe` lists them."
        )
    if not wanted:
        return CPU
    return Layout("cuda", wanted, tuple(found[number] for number in wanted), max(len(wanted), 2))


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
