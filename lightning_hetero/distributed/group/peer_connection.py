"""Messages between two ranks over a TCP connection of their own, which breaks when one of the processes dies."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from contextlib import suppress

__all__ = ["ClosedError", "Connection", "listen", "wake_pair"]

_SEND_S = 1.0
_CONNECT_S = 2.0
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20
_LONGEST_HEAD = 200
_LONGEST_TAIL = 20_000
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

# A forked process, for example a worker of a DataLoader, would hold the connections of its parent open after the parent
# has died.
_inherited: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_inherited() -> None:
    with suppress(Exception):
        for its in list(_inherited):
            its.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class ClosedError(ConnectionResetError):
    """The system at the other end has closed the connection, and the network has carried that here."""


class Connection:
    """One end of a connection.

    Attributes:
        socket: The socket, for a selector.
        rank: Rank at the other end; None until it is known.
        heard: Time at which the other end was last heard.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.rank: int | None = None
        self.heard = time.monotonic()
        self._rest = b""
        self._sending = threading.Lock()
        connected.settimeout(_SEND_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _inherited.add(connected)

    @classmethod
    def to(cls, host: str, port: int) -> Connection:
        """Connect to a listening rank.

        Raises:
            ConnectionRefusedError: If that machine says that nobody listens there.
            OSError: If it cannot be reached.
        """
        return cls(socket.create_connection((host, port), timeout=_CONNECT_S))

    def send(self, kind: str, text: str = "") -> None:
        """Send a message; a connection that is broken is found by ``receive``."""
        if len(text) > _LONGEST_HEAD + _LONGEST_TAIL:
            text = f"{text[:_LONGEST_HEAD]}\n...\n{text[-_LONGEST_TAIL:]}"
        line = json.dumps([kind, text]).encode() + b"\n"
        with self._sending, suppress(OSError):
            self.socket.sendall(line)

    def receive(self) -> list[tuple[str, str]]:
        """Return the messages that have arrived, each a kind and a text.

        Raises:
            ClosedError: If the other end is closed.
            ConnectionResetError: If the other end is closed, or knows nothing of this connection any more.
            OSError: If the other end cannot be reached.
        """
        try:
            data = self.socket.recv(_CHUNK)
        except TimeoutError:
            return []
        if not data:
            raise ClosedError
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise OSError("not a rank")
        messages = []
        for line in lines:
            with suppress(ValueError, TypeError):  # no rank wrote this
                kind, text = json.loads(line)
                messages.append((str(kind), str(text)))
        return messages

    def close(self) -> None:
        """Close this end."""
        with suppress(OSError):
            self.socket.close()

    def leave(self, patience_s: float = 0.5) -> None:
        """Say that this rank leaves in good order, and close once the other end has read it.

        To close while something unread has arrived would reset the connection, and the other end might not read it.
        """
        self.send("leaves")
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            self.socket.settimeout(patience_s)
            deadline = time.monotonic() + patience_s
            while self.socket.recv(_CHUNK) and time.monotonic() < deadline:
                pass
        self.close()


def listen(host: str) -> socket.socket:
    """Return a socket that listens at a free port: of this machine alone if ``host`` is, otherwise of all addresses."""
    if host in _LOOPBACK:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family, backlog=1024)
    else:
        listening = _listen_everywhere()
    listening.setblocking(False)
    _inherited.add(listening)
    return listening


def _listen_everywhere() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be compiled in and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def wake_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets: what is sent to the second wakes a thread that waits for the first."""
    pair = socket.socketpair()
    for its in pair:
        its.setblocking(False)
        _inherited.add(its)
    return pair
