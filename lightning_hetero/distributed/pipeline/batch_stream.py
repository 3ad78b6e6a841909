"""Send batches from rank 0 to the hosts of all ranks, where threads receive them while the step before is running.

Each iteration has a tag of its own, under which rank 0 sends a few numbers for each batch, then the description of the
batch if it differs from that of the batch before, then the bytes of its tensors.  Rank 0 gives a batch away only when
every rank has received it, because steps may change their batch.
"""

from __future__ import annotations

import itertools
import pickle
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hetero.distributed.collectives import broadcast_from
from lightning_hetero.distributed.host_group import host_group, host_timeout, is_initialized
from lightning_hetero.distributed.pipeline.packed_batch import empty_tensors, packed, unpacked
from lightning_hetero.exceptions import RankFailedError

__all__ = ["ReceivedBatches", "SentBatches", "end_iterations"]

_numbers = itertools.count()
# Pipelines and users send under small tags, and the group may be theirs.
_FIRST_TAG, _TAGS = 1 << 24, 1 << 20
# A batch may be expected during a whole evaluation; a rank that waits for it in its loop has a time-out there.
_FOR_EVER = timedelta(days=365)
_PATIENCE_S = 5.0


class _Kind(IntEnum):
    """What follows: a batch like the one before, a batch with its description, or nothing more."""

    SAME = 0
    NEW = 1
    END = 2
    ERROR = 3
    CLOSED = 4


class SentBatches:
    """An iteration on rank 0, whose batches every rank receives.

    Args:
        batches: The batches of rank 0's loader.
        ahead: Whether the next batch may be loaded and sent, in a thread, while the current one is used.
    """

    def __init__(self, batches: Iterator[Any], *, ahead: bool) -> None:
        self._batches = batches
        self._ahead = ahead
        self._group = weakref.ref(host_group())  # it must not outlive the run, as a loop's iterations may
        self._tag: int | None = None
        self._description = b""
        self._ended = False
        self._closed = False
        self._peers_know = False
        self._next: Future[tuple[_Kind, Any]] | None = None
        _open.add(self)

    def __iter__(self) -> SentBatches:
        return self

    def __next__(self) -> Any:
        if self._ended or self._closed:
            raise StopIteration
        if self._tag is None:
            self._tag = broadcast_from(_FIRST_TAG + next(_numbers) % _TAGS, 0)
        kind, value = self._load() if self._next is None else self._next.result()
        self._next = None
        if kind in (_Kind.SAME, _Kind.NEW):
            if self._ahead:
                self._next = _in_thread(self._load)
            return value
        self._ended = True
        if kind == _Kind.ERROR:
            raise value
        raise StopIteration

    def _load(self) -> tuple[_Kind, Any]:
        """Load a batch and send it, or send why there is none."""
        try:
            batch = next(self._batches)
            sent = packed(batch)
        except StopIteration:
            self._send(_Kind.END)
            return _Kind.END, None
        except Exception as error:
            self._send(_Kind.ERROR, pickle.dumps(f"{type(error).__name__}: {error}"))
            return _Kind.ERROR, error
        if sent.description == self._description:
            self._send(_Kind.SAME, b"", sent.contents)
        else:
            self._description = sent.description
            self._send(_Kind.NEW, sent.description, sent.contents)
        return _Kind.NEW, batch

    def _send(self, kind: _Kind, description: bytes = b"", contents: list[Tensor] | None = None) -> None:
        head = torch.tensor([kind, len(description)], dtype=torch.int64, device="cpu")
        messages = [head, _as_tensor(description), *(contents or [])]
        self._peers_know = kind in (_Kind.END, _Kind.ERROR, _Kind.CLOSED)
        works: list[Any] = [
            dist.isend(message, dst=rank, group=self._group(), tag=self._tag or 0)
            for rank in range(1, dist.get_world_size())
            for message in messages
            if message.numel()
        ]
        if kind == _Kind.CLOSED:
            _unfinished.extend(works)  # sent by whatever drops this object, which must not wait
            return
        for work in works:
            work.wait()

    def close(self) -> None:
        """End the iteration if it is still going on. Its peers leave it at the same point, or are told."""
        if self._ended or self._closed:
            return
        self._closed = True
        if self._next is None:
            self._send_closed()
        else:  # after what is being loaded
            self._next.add_done_callback(lambda _: self._send_closed())

    def _send_closed(self) -> None:
        with suppress(Exception):  # a peer is gone
            if self._tag is not None and not self._peers_know and is_initialized() and self._group() is host_group():
                self._send(_Kind.CLOSED)

    def wait(self) -> None:
        """Wait until nothing is being loaded any more."""
        if self._next is not None:
            with suppress(Exception):
                self._next.result()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


class ReceivedBatches:
    """An iteration on another rank than 0, over the batches of rank 0."""

    def __init__(self) -> None:
        self._received: queue.SimpleQueue[tuple[_Kind | None, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False

    def __iter__(self) -> ReceivedBatches:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        if self._thread is None:
            tag: int = broadcast_from(0, 0)
            # a function without this object, which may be dropped at any time
            self._thread = _start(partial(_receive, self._received, host_group(), tag))
        try:
            kind, value = self._received.get(timeout=host_timeout().total_seconds())
        except queue.Empty:
            seconds = host_timeout().total_seconds()
            raise RuntimeError(f"gloo: timed out waiting {seconds:.0f} s for a batch of rank 0") from None
        if kind == _Kind.NEW:
            return value
        self._ended = True
        if kind == _Kind.END:
            raise StopIteration
        if kind == _Kind.ERROR:
            raise RankFailedError(f"Rank 0 could not load a batch: {value}")
        if kind == _Kind.CLOSED:
            raise RuntimeError("process group: rank 0 has left the loop in which other ranks expect a batch of it")
        raise value


_open: weakref.WeakSet[SentBatches] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_unfinished: list[Any] = []


def end_iterations() -> None:
    """End the iterations that have been left before their end; every rank must call this at the same point."""
    for iteration in list(_open):
        iteration.close()
    deadline = time.monotonic() + _PATIENCE_S
    for thread in list(_threads):
        thread.join(max(deadline - time.monotonic(), 0.0))
    with suppress(RuntimeError):  # of a group that has ended
        while _unfinished:
            _unfinished.pop().wait()


def _receive(received: queue.SimpleQueue[tuple[_Kind | None, Any]], group: dist.ProcessGroup, tag: int) -> None:
    """Receive the batches of an iteration until rank 0 ends it, also those that nobody takes."""

    def receive(tensor: Tensor) -> Any:
        return dist.irecv(tensor, src=0, group=group, tag=tag)

    def received_bytes(size: int) -> bytes:
        tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size:
            receive(tensor).wait()
        return tensor.numpy().tobytes()

    description = b""
    try:
        while True:
            head = torch.zeros(2, dtype=torch.int64, device="cpu")
            receive(head).wait(_FOR_EVER)
            kind, size = _Kind(int(head[0])), int(head[1])
            if kind in (_Kind.END, _Kind.CLOSED):
                received.put((kind, None))
                return
            described = received_bytes(size)
            if kind == _Kind.ERROR:
                received.put((kind, pickle.loads(described)))  # of another rank of this training
                return
            description = described or description
            tensors, contents = empty_tensors(description)
            for work in [receive(content) for content in contents if content.numel()]:
                work.wait()
            received.put((_Kind.NEW, unpacked(description, tensors)))
    except BaseException as error:
        received.put((None, error))


def _as_tensor(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _start(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run, name="batches of rank 0", daemon=True)
    _threads.add(thread)
    thread.start()
    return thread


def _in_thread(load: Callable[[], tuple[_Kind, Any]]) -> Future[tuple[_Kind, Any]]:
    future: Future[tuple[_Kind, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(load())
        except BaseException as error:
            future.set_exception(error)

    _start(run)
    return future
