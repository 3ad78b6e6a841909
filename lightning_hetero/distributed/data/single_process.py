"""Tell a loader that it is alone, where one rank loads for all: it may divide what it loads by its rank.

It asks `torch.distributed` for that, or reads the variables that launchers set, as webdataset does.  It may load in a
thread while the main thread goes on, so only the thread that loads is told this, and the processes that it starts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

__all__ = ["AsSingleProcess", "as_single_process", "installed"]

# What torchrun, Lightning, SLURM and MPI tell their processes.
_RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK"),
)
_SIZES = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES"),
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_SIZE"),
)
_ALONE = {**dict.fromkeys(_RANKS, "0"), **dict.fromkeys(_SIZES, "1")}

_loading = threading.local()


@contextmanager
def installed() -> Iterator[None]:
    """Answer in this context as :func:`as_single_process` says."""
    with ExitStack() as patches:
        patches.enter_context(_replaced(dist, "get_rank", _told(dist.get_rank, 0)))
        patches.enter_context(_replaced(dist, "get_world_size", _told(dist.get_world_size, 1)))
        patches.enter_context(_replaced(os, "environ", _environment(os.environ)))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _told(function: Callable[..., int], alone: int) -> Callable[..., int]:
    @wraps(function)
    def tell(group: Any = None) -> int:
        return alone if _is_loading() else function(group)

    return tell


def _environment(original: Any) -> Any:
    """Return the environment of this process, with other answers for a thread that loads; writing it writes both."""

    class Environment(type(original)):  # type: ignore[misc]
        def __getitem__(self, name: str) -> str:
            found: str = super().__getitem__(name)
            return _ALONE.get(name, found) if _is_loading() else found

    answers = Environment.__new__(Environment)
    answers.__dict__.update(vars(original))
    return answers


def _is_loading() -> bool:
    return getattr(_loading, "depth", 0) > 0


@contextmanager
def as_single_process() -> Iterator[None]:
    """Tell this thread, and processes that it forks, that it is alone, in this context."""
    _loading.depth = getattr(_loading, "depth", 0) + 1
    try:
        yield
    finally:
        _loading.depth -= 1


@contextmanager
def _environment_of_single_process() -> Iterator[None]:
    """Change the variables themselves in this context, for processes that are not forked."""
    known = {name: os.environ[name] for name in _ALONE if name in os.environ}
    os.environ.update({name: _ALONE[name] for name in known})
    try:
        yield
    finally:
        os.environ.update(known)


class AsSingleProcess(Iterator[Any]):
    """An iterator that is told that it is alone.

    Args:
        begin: Function that returns the iterator, and starts whatever processes load for it.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        with _environment_of_single_process(), as_single_process():
            self._iterator = begin()

    def __next__(self) -> Any:
        with as_single_process():
            return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)
