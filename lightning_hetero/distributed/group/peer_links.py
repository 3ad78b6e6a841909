"""The connections of the ranks' watches: all lead to rank 0."""

from __future__ import annotations

import json
import selectors
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

from typing_extensions import override

from lightning_hetero.distributed.group.peer_connection import ClosedError, Connection, listen, wake_pair

__all__ = ["Hub", "Link", "Spoke"]

# A connection may be cut between two processes that are alive; then one of them comes back.  Where it was reset, the
# machine of rank 0 may have slept for so long that the other end has given it up, and tries to connect now and then.
_RETURN_S = 2.0
_RETURN_AFTER_RESET_S = 30.0
# At first rank 0 may not listen yet, but a rank that has no connection cannot be missed.
_FIRST_RETRY_S, _RETRY_S = 0.05, 1.0
_HELLO_S = 10.0
# Where rank 0 has left, the run ends here too, and torch prints a page if the store is asked that ends with rank 0.
_LEFT_S = 2.0

_DIED = (
    "rank {} has died without a message: it was killed, for lack of memory for example, or crashed outside Python."
    " What it has printed and its exit code may tell more"
)


class Link(ABC):
    """What a watch needs of its connections.

    Attributes:
        failed: Why a rank has failed; None if none is known to have.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = wake_pair()
        self._selector.register(self._woken, selectors.EVENT_READ)

    @abstractmethod
    def step(self, timeout_s: float) -> None:
        """Handle what arrives within ``timeout_s``."""

    @abstractmethod
    def connections(self) -> dict[int, Connection]:
        """Return the connections to other ranks by rank; may be called from another thread."""

    def send_to_all(self, kind: str, text: str = "") -> None:
        """Send a message through every connection; may be called from another thread."""
        for connection in self.connections().values():
            connection.send(kind, text)

    def forgive_silence(self, seconds: float) -> None:
        """Leave a time out of account in which this rank could not listen."""
        for connection in self.connections().values():
            connection.heard += seconds

    def wake(self) -> None:
        """End a ``step`` that waits; called from another thread."""
        with suppress(OSError):
            self._waker.send(b"!")

    def close(self) -> None:
        """Leave in good order."""
        for connection in self.connections().values():
            connection.send("leaves")
        for connection in self.connections().values():
            connection.leave()
        self._selector.close()
        for its in (self._woken, self._waker):
            its.close()

    def _ready(self, timeout_s: float) -> list[Connection | None]:
        """Return the connections from which something has arrived; None stands for the listening socket."""
        ready = [key for key, _ in self._selector.select(timeout_s)]
        if any(key.fileobj is self._woken for key in ready):
            with suppress(OSError):
                self._woken.recv(64)
        return [key.data for key in ready if key.fileobj is not self._woken]

    def _forget(self, connection: Connection) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.close()


class Hub(Link):
    """Rank 0: listens, and passes on what a rank says.

    Args:
        host: Address at which the other ranks reach rank 0.
        publish: Makes a text known to all ranks under which they find this one.
    """

    def __init__(self, host: str, publish: Callable[[str], None]) -> None:
        super().__init__()
        self._identifier = uuid.uuid4().hex
        self._listening = listen(host)
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._strangers: set[Connection] = set()
        self._peers: dict[int, Connection] = {}
        self._lost: dict[int, float] = {}
        publish(json.dumps([self._listening.getsockname()[1], self._identifier]))

    @override
    def step(self, timeout_s: float) -> None:
        for connection in self._ready(timeout_s):
            if connection is None:
                self._accept()
            elif connection in self._strangers or self._peers.get(connection.rank or 0) is connection:
                self._receive(connection)
        now = time.monotonic()
        for stranger in [its for its in self._strangers if now - its.heard > _HELLO_S]:
            self._strangers.discard(stranger)
            self._forget(stranger)
        for rank in [rank for rank, until in self._lost.items() if now > until]:
            del self._lost[rank]
            self._fail(_DIED.format(rank), None)

    def _accept(self) -> None:
        with suppress(OSError):
            connection = Connection(self._listening.accept()[0])
            self._strangers.add(connection)
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
        except OSError as error:
            self._strangers.discard(connection)
            self._forget(connection)
            if connection.rank is not None:
                del self._peers[connection.rank]
                if isinstance(error, ConnectionResetError):
                    patience_s = _RETURN_S if isinstance(error, ClosedError) else _RETURN_AFTER_RESET_S
                    self._lost[connection.rank] = time.monotonic() + patience_s
            return
        for kind, text in messages:
            if connection in self._strangers:
                self._greet(connection, kind, text)
            elif kind == "failed":
                self._fail(text, connection)
            elif kind == "leaves":
                del self._peers[connection.rank or 0]
                self._forget(connection)
                return

    def _greet(self, connection: Connection, kind: str, text: str) -> None:
        identifier, _, rank = text.partition(" ")
        if kind != "hello" or identifier != self._identifier or not rank.isdecimal():
            return
        connection.rank = int(rank)
        self._strangers.discard(connection)
        self._lost.pop(connection.rank, None)
        old = self._peers.pop(connection.rank, None)
        if old is not None:
            self._forget(old)
        self._peers[connection.rank] = connection
        connection.send("welcome", self._identifier)
        if self.failed is not None:
            connection.send("failed", self.failed)

    def _fail(self, reason: str, source: Connection | None) -> None:
        if self.failed is None:
            self.failed = reason
            for connection in list(self._peers.values()):
                if connection is not source:
                    connection.send("failed", reason)

    @override
    def connections(self) -> dict[int, Connection]:
        return dict(self._peers)

    @override
    def forgive_silence(self, seconds: float) -> None:
        super().forgive_silence(seconds)
        for rank in self._lost:
            self._lost[rank] += seconds

    @override
    def close(self) -> None:
        with suppress(OSError):
            self._listening.close()
        for connection in self._strangers:
            connection.close()
        super().close()


class Spoke(Link):
    """Another rank: keeps a connection to rank 0.

    Args:
        rank: Rank of this process.
        host: Address at which this rank reaches rank 0.
        look_up: Returns what rank 0 has published; None if it has published nothing.
        announced: Returns the failure that a rank has left in the store; asked where rank 0 cannot be reached.
    """

    def __init__(
        self, rank: int, host: str, look_up: Callable[[], str | None], announced: Callable[[], str | None]
    ) -> None:
        super().__init__()
        self._rank = rank
        self._host = host
        self._look_up = look_up
        self._announced = announced
        self._hub: Connection | None = None
        self._place: tuple[int, str] | None = None
        self._was_welcome = False  # at this place
        self._retry_at = 0.0
        self._pause_s = _FIRST_RETRY_S

    @override
    def step(self, timeout_s: float) -> None:
        now = time.monotonic()
        if self._hub is None and now >= self._retry_at:
            self._retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _RETRY_S)
            self._find()
        elif self._hub is not None and not self._was_welcome and now - self._hub.heard > _HELLO_S:
            self._drop()
        for connection in self._ready(min(timeout_s, self._pause_s) if self._hub is None else timeout_s):
            if connection is not None and connection is self._hub:
                self._receive(connection)

    def _find(self) -> None:
        if not self._was_welcome:  # otherwise rank 0 is still where it was, and the store may have died with it
            self.failed = self.failed or self._announced()
            published = self._look_up()
            with suppress(ValueError):
                port, identifier = json.loads(published or "")
                self._place = (port, identifier)
        if self._place is not None:
            self._connect(*self._place)

    def _connect(self, port: int, identifier: str) -> None:
        try:
            connection = Connection.to(self._host, port)
        except ConnectionRefusedError:
            if self._was_welcome:  # and rank 0 did not take its leave: its process does not exist any more
                self.failed = self.failed or _DIED.format(0)
        except OSError:
            pass  # the network may come back
        else:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            self._hub = connection
            connection.send("hello", f"{identifier} {self._rank}")

    def _drop(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            self._forget(hub)

    def _receive(self, hub: Connection) -> None:
        assert self._place is not None
        try:
            messages = hub.receive()
        except OSError as error:
            self._drop()
            if isinstance(error, ConnectionResetError) and self._was_welcome:
                self._retry_at = time.monotonic() + 0.1  # a dying process may still seem to listen for a moment
            return
        for kind, text in messages:
            if kind == "welcome" and text == self._place[1]:
                self._was_welcome = True
                if self.failed is not None:
                    hub.send("failed", self.failed)
            elif kind == "failed" and self._was_welcome:
                self.failed = self.failed or text
            elif kind == "leaves":
                self._drop()
                self._place, self._was_welcome = None, False
                self._retry_at = time.monotonic() + _LEFT_S
                return

    @override
    def connections(self) -> dict[int, Connection]:
        hub = self._hub
        return {} if hub is None else {0: hub}
