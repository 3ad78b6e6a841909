"""What the connections between ranks count as a death, and when a rank is ended; both ends are in this process."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from lightning_hetero.distributed.group import failure, peer_connection, peer_links, peer_watch
from lightning_hetero.distributed.group.peer_connection import Connection
from lightning_hetero.distributed.group.peer_links import Hub, Link, Spoke
from lightning_hetero.distributed.group.peer_watch import PeerWatch, WatchTimes

LIMIT_S = 10.0


class Ranks:
    """Rank 0 and others, and the place at which rank 0 is to be found."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.announced: str | None = None
        self.hub = self.new_hub()
        self.spokes: dict[int, Spoke] = {}

    def new_hub(self) -> Hub:
        return Hub("127.0.0.1", lambda place: setattr(self, "place", place))

    def spoke(self, rank: int) -> Spoke:
        spoke = Spoke(rank, "127.0.0.1", lambda: self.place, lambda: self.announced)
        self.spokes[rank] = spoke
        self.until(lambda: spoke._was_welcome)
        return spoke

    def until(self, condition: Callable[[], Any] = lambda: False, seconds: float = LIMIT_S) -> None:
        """Let all of them work until a condition holds, or for some seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                assert seconds < LIMIT_S, "too late"
                return
            for link in (self.hub, *self.spokes.values()):
                link.step(0.01)

    def close(self) -> None:
        for link in (*self.spokes.values(), self.hub):
            with suppress(Exception):
                link.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(peer_links, "_RETURN_S", 0.3)
    monkeypatch.setattr(peer_links, "_RETRY_S", 0.05)
    monkeypatch.setattr(peer_links, "_LEFT_S", 0.3)
    its = Ranks()
    yield its
    its.close()


class Returned:
    """Whether rank 1 has another connection than before."""

    def __init__(self, hub: Hub, before: Connection) -> None:
        self.hub, self.before = hub, before

    def __call__(self) -> bool:
        return self.hub.connections().get(1) not in (None, self.before)


def die(link: Link) -> None:
    """Close all sockets, as the system does for a dead process."""
    if isinstance(link, Hub):
        link._listening.close()
    for connection in link.connections().values():
        connection.close()


def test_a_failure_reaches_all(ranks: Ranks) -> None:
    first, second = ranks.spoke(1), ranks.spoke(2)
    reason = f"rank 1 with\n{'x' * 100_000}\nValueError: last line"
    first.send_to_all("failed", reason)
    ranks.until(lambda: ranks.hub.failed and second.failed)
    assert second.failed is not None
    assert second.failed.startswith("rank 1 with\n")
    assert second.failed.endswith("ValueError: last line")
    assert len(second.failed) < 30_000
    assert first.failed is None  # it knows
    late = ranks.spoke(3)
    ranks.until(lambda: late.failed)


def test_a_rank_whose_connection_closes_has_died(ranks: Ranks) -> None:
    first, second = ranks.spoke(1), ranks.spoke(2)
    del ranks.spokes[1]
    die(first)
    ranks.until(lambda: second.failed)
    assert ranks.hub.failed == second.failed
    assert "rank 1 has died" in str(second.failed)


def test_rank_zero_has_died_where_nobody_listens_any_more(ranks: Ranks) -> None:
    spoke = ranks.spoke(1)
    die(ranks.hub)
    deadline = time.monotonic() + LIMIT_S
    while spoke.failed is None and time.monotonic() < deadline:
        spoke.step(0.01)
    assert "rank 0 has died" in str(spoke.failed)


def test_a_connection_that_is_cut_is_no_death(ranks: Ranks) -> None:
    spoke = ranks.spoke(1)
    for end in ("spoke", "hub"):
        before = ranks.hub.connections()[1]
        cut = spoke.connections()[0] if end == "spoke" else before
        cut.socket.shutdown(socket.SHUT_RDWR)
        returned = Returned(ranks.hub, before)
        ranks.until(returned)
    ranks.until(seconds=0.6)
    assert (ranks.hub.failed, spoke.failed) == (None, None)


def test_a_connection_that_is_reset_is_no_death_for_long(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a machine that has slept; the other rank is stopped just then."""
    monkeypatch.setattr(peer_links, "_RETURN_AFTER_RESET_S", 1.0)
    for returns in (True, False):
        spoke = ranks.spoke(1)
        del ranks.spokes[1]
        before = ranks.hub.connections()[1]
        its = spoke.connections()[0].socket
        its.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets when it is closed
        spoke._drop()
        ranks.until(seconds=0.5)
        assert ranks.hub.failed is None
        if returns:
            ranks.spokes[1] = spoke
            ranks.until(Returned(ranks.hub, before))
            ranks.until(seconds=1.2)
            assert ranks.hub.failed is None
        else:
            ranks.until(lambda: ranks.hub.failed)


def test_who_leaves_has_not_died_and_may_come_back(ranks: Ranks) -> None:
    """One run after another in the same processes, of which neither begins nor ends at the same time."""
    first, second = ranks.spoke(1), ranks.spoke(2)
    del ranks.spokes[1]
    first.close()
    ranks.until(lambda: 1 not in ranks.hub.connections())
    again = ranks.spoke(1)
    old, stale = ranks.hub, ranks.place
    old.close()
    ranks.hub = ranks.new_hub()
    published, ranks.place = ranks.place, stale  # they look before the new place is known
    ranks.until(seconds=0.6)
    assert not ranks.hub.connections()
    ranks.place = published
    ranks.until(lambda: len(ranks.hub.connections()) == 2)
    assert {its.failed for its in (old, ranks.hub, again, second)} == {None}


def test_the_store_is_not_asked_right_after_rank_0_has_left(ranks: Ranks) -> None:
    """It may end with the process of rank 0."""
    asked: list[None] = []
    spoke = ranks.spoke(1)
    spoke._announced = lambda: asked.append(None)
    old, ranks.hub = ranks.hub, ranks.new_hub()
    old.close()
    ranks.until(lambda: not spoke.connections())
    ranks.until(seconds=0.15)
    assert not asked
    ranks.until(lambda: asked)


def test_strangers_are_not_believed(ranks: Ranks) -> None:
    spoke = ranks.spoke(1)
    port, _ = json.loads(str(ranks.place))
    identifier = "0" * 32
    lines = [b"GET / HTTP/1.1\n", b"[1]\n", b'["failed", "so they say"]\n', f'["hello", "{identifier} 1"]\n'.encode()]
    for line in lines:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(line + b'["failed", "so they say"]\n')
            ranks.until(seconds=0.1)
    ranks.until(seconds=0.4)
    assert (ranks.hub.failed, spoke.failed) == (None, None)
    with socket.create_server(("127.0.0.1", 0)) as other:  # not rank 0
        ranks.place = json.dumps([other.getsockname()[1], identifier])
        misled = ranks.spokes[2] = Spoke(2, "127.0.0.1", lambda: ranks.place, lambda: None)
        ranks.until(lambda: misled.connections())
        accepted, _ = other.accept()
        with accepted:
            accepted.sendall(b'["failed", "so they say"]\n')
            ranks.until(seconds=0.1)
    ranks.until(seconds=0.2)
    assert misled.failed is None


def test_a_rank_that_cannot_reach_rank_zero_looks_into_the_store(ranks: Ranks) -> None:
    ranks.place = None
    spoke = ranks.spokes[1] = Spoke(1, "127.0.0.1", lambda: ranks.place, lambda: ranks.announced)
    ranks.announced = "rank 2 with an error"
    ranks.until(lambda: spoke.failed == ranks.announced)


def test_strangers_who_say_nothing_are_sent_away(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "_HELLO_S", 0.2)
    port, _ = json.loads(str(ranks.place))
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        ranks.until(lambda: ranks.hub._strangers)
        ranks.until(lambda: not ranks.hub._strangers)
        stranger.settimeout(LIMIT_S)
        assert stranger.recv(1) == b""
    with socket.create_connection(("127.0.0.1", port)) as stranger:  # or who never come to an end
        stranger.settimeout(LIMIT_S)
        ranks.until(lambda: ranks.hub._strangers)
        with suppress(OSError):
            for _ in range(40):
                stranger.sendall(b"x" * (1 << 16))
                ranks.until(seconds=0.01)
        ranks.until(lambda: not ranks.hub._strangers)
    assert ranks.hub.failed is None


def test_a_rank_that_reaches_somebody_else_tries_again(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens at the port that rank 0 has had, and says nothing."""
    monkeypatch.setattr(peer_links, "_HELLO_S", 0.2)
    right, identifier = ranks.place, "0" * 32
    with socket.create_server(("127.0.0.1", 0)) as other:
        ranks.place = json.dumps([other.getsockname()[1], identifier])
        spoke = ranks.spokes[1] = Spoke(1, "127.0.0.1", lambda: ranks.place, lambda: None)
        ranks.until(lambda: spoke.connections())
        ranks.place = right
        ranks.until(lambda: spoke._was_welcome)
    assert (spoke.failed, [*ranks.hub.connections()]) == (None, [1])


def test_a_machine_that_cannot_be_reached_for_a_while_is_no_death(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, tries = Connection.to, []

    def unreachable(host: str, port: int) -> Connection:
        tries.append(port)
        if len(tries) < 3:
            raise OSError("no route to host")
        return connect(host, port)

    monkeypatch.setattr(Connection, "to", unreachable)
    spoke = ranks.spoke(1)
    assert len(tries) == 3
    assert spoke.failed is None


def test_time_in_which_rank_zero_could_not_listen_counts_for_nobody(ranks: Ranks) -> None:
    """A rank whose connection was cut meanwhile has the whole time to come back."""
    ranks.hub._lost[1] = time.monotonic() + 0.1
    ranks.hub.forgive_silence(0.4)
    ranks.until(seconds=0.3)
    assert ranks.hub.failed is None
    ranks.until(lambda: ranks.hub.failed)


def test_nothing_that_arrives_is_no_message(ranks: Ranks) -> None:
    spoke = ranks.spoke(1)
    connection = spoke.connections()[0]
    connection.socket.settimeout(0.01)
    assert connection.receive() == []


@pytest.mark.parametrize("has_ipv6", [True, False, None])
def test_rank_zero_listens_at_all_addresses_if_others_are_elsewhere(
    monkeypatch: pytest.MonkeyPatch, has_ipv6: bool | None
) -> None:
    """Also where IPv6 is not there, or is switched off, which shows only when it is used."""
    create = socket.create_server

    def created(address: Any, **options: Any) -> socket.socket:
        if has_ipv6 is None and options.get("dualstack_ipv6"):
            raise OSError("address family not supported")
        return create(address, **options)

    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: has_ipv6 is not False)
    monkeypatch.setattr(socket, "create_server", created)
    with peer_connection.listen("node-0.cluster") as listening:
        with socket.create_connection(("127.0.0.1", listening.getsockname()[1]), timeout=LIMIT_S):
            pass
        if has_ipv6 is not True:
            assert listening.family == socket.AF_INET


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_does_not_keep_connections_open(ranks: Ranks) -> None:
    """As the workers of a loader, which live on for some seconds."""
    spoke = ranks.spoke(1)
    asleep, awake = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(asleep, 1)
        os._exit(0)
    try:
        del ranks.spokes[1]
        die(spoke)
        ranks.until(lambda: ranks.hub.failed)
    finally:
        os.write(awake, b"!")
        os.waitpid(child, 0)
        os.close(asleep)
        os.close(awake)


class Fails(Link):
    """A link that has heard of a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = "rank 1 with an error"

    def step(self, timeout_s: float) -> None:
        time.sleep(0.01)

    def connections(self) -> dict[int, Any]:
        return {}


@pytest.mark.parametrize(
    ("excused", "torn_down", "seconds"),
    [(False, False, 0.2), (True, False, 0.6), (True, True, 0.4)],
    ids=["waits", "saves", "is torn down"],
)
def test_a_rank_is_ended_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, excused: bool, torn_down: bool, seconds: float
) -> None:
    ended: list[tuple[float, str]] = []
    began = time.monotonic()

    def end(message: str) -> None:
        ended.append((time.monotonic() - began, message))
        watch._stopping.set()

    monkeypatch.setattr(peer_watch, "end_process", end)
    times = WatchTimes(heartbeat_s=0.1, patience_s=0.2, teardown_s=0.4, excuse_s=0.4)
    watch = PeerWatch(Fails(), 0, lambda: excused, times)
    if torn_down:
        watch.begin_teardown()
    watch._thread.join(5)
    ((after, message),) = ended
    assert after >= seconds
    assert message.startswith("Another rank has failed: rank 1 with an error\nRank 0 has not ended within")
    watch.stop()


def test_a_rank_that_leaves_in_time_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(peer_watch, "end_process", ended.append)
    times = WatchTimes(patience_s=0.3)
    watch = PeerWatch(Fails(), 0, lambda: False, times)
    time.sleep(0.1)
    assert watch.reason == "rank 1 with an error"
    watch.stop()
    watch.stop()
    time.sleep(0.4)
    assert not ended
    assert not watch._thread.is_alive()


class Explodes(Fails):
    def step(self, timeout_s: float) -> None:
        raise ValueError("a fault of ours")


def test_a_watch_that_fails_leaves_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(peer_watch, "end_process", ended.append)
    watch = PeerWatch(Explodes(), 0, lambda: False, WatchTimes(patience_s=0.1))
    watch._thread.join(5)
    assert not watch._thread.is_alive()
    watch.stop()
    assert not ended


def test_nothing_is_watched_without_peers() -> None:
    failure.watch_peers("127.0.0.1", lambda: False)
    assert not failure._active
    failure.begin_teardown()
    failure.pass_on("nothing")
    failure.stop_watching()
