"""Run a function on real gloo ranks and return what each rank returned.

Ranks are forked from a server that has imported torch and Lightning, which takes seconds, and nothing else: it has one
thread and no process group.  Pools of ranks are kept for the whole session and shared by all tests.  A call that fails
or runs out of time ends its pool, because its ranks may wait for each other; the next call starts another.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing as mp
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import one_card

# what Lightning imports and is slow
WITHOUT_LIGHTNING = ["torch", "torch._dynamo", "torchmetrics", "lightning_utilities.core.imports", "fsspec"]
# what nearly every test imports, some of it at a training's first step
PRELOADED = [*WITHOUT_LIGHTNING, "lightning.pytorch", "lightning_hetero", "hypothesis", "pytest"]
_PR_SET_PDEATHSIG = 1  # source: Linux, include/uapi/linux/prctl.h


def fork_context() -> Any:
    """Return the context whose processes are forked from the server; ``start`` them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(process: Any, server: forkserver.ForkServer | None = None) -> None:
    """Start a process of ``fork_context``, and the server where it does not run yet; ``server`` for one of its own."""
    connect = (server or forkserver._forkserver).connect_to_new_process
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),  # a server with threads must not fork
        mock.patch.object(forkserver, "connect_to_new_process", connect),
    ):
        process.start()


def share_server() -> None:
    """Let this process, which the server has forked, ask it for others; multiprocessing would start another server."""
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]


class RankError(AssertionError):
    """A rank raised; the message holds the traceback of every rank that did."""


class RankPool:
    """``world_size`` processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = fork_context()
        port = free_port()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # not daemons, which may not have the workers of a DataLoader
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port))
            start(process)
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call ``function(*args)``, a top-level function, on every rank and return the results in order of ranks."""
        for connection in self._connections:
            connection.send((function, args, timeout_s))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout_s
        missing = dict(enumerate(self._connections))
        while missing:
            ready = wait(list(missing.values()), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                if errors:  # the others wait for a rank that has failed
                    break
                raise TimeoutError(f"ranks {list(missing)} did not finish {function.__name__} within {timeout_s} s")
            for rank in [r for r, connection in missing.items() if connection in ready]:
                del missing[rank]
                ok, value = self._receive(rank)
                if ok:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + 5.0)
        if errors:
            raise RankError("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(errors.items())))
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._connections[rank].recv()  # type: ignore[no-any-return]
        except EOFError:
            return False, f"the process ended with exit code {self._processes[rank].exitcode}"

    def close(self, patience_s: float = 5.0) -> None:
        """End all processes; those that still run something after ``patience_s`` are killed."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0))
            process.kill()
            process.join()


class RankPools:
    """One pool for each number of ranks, started when first needed."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call ``function(*args)`` on ``world_size`` ranks."""
        pool = self._pools.pop(world_size, None) or RankPool(world_size)
        try:
            results = pool.run(function, *args, timeout_s=timeout_s)
        except BaseException:
            pool.close(patience_s=2.0)
            raise
        self._pools[world_size] = pool
        return results

    def close(self) -> None:
        """End all pools."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    # no orphans: a rank that waits for a dead peer is killed when the server ends, which ends with the tests
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the workers of loaders are forked, as in a user's script, and not asked for from a server
    mp.set_start_method("fork", force=True)
    share_server()
    # what Lightning's own launcher sets, so that a Trainer takes these processes for its ranks
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if one_card.is_wanted():
        one_card.take_card(rank, world_size)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        try:
            function, args, timeout_s = connection.recv()
        except EOFError:
            return
        # a signal would not do: at the end of a training Lightning resets the handlers that Python does not know
        faulthandler.dump_traceback_later(max(timeout_s - 2, timeout_s / 2))
        with suppress(BrokenPipeError):  # nobody waits for the answer any more
            try:
                connection.send((True, function(*args)))
            except BaseException:
                connection.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
