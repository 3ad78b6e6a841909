"""Which lines of a run's record are kept, so that it stays small however long the run is."""

from __future__ import annotations

from lightning_hetero.balance.record.run_record import Event, RunChange, RunEnd, RunHeader, RunWindow, to_line

__all__ = ["RunHistory"]


class RunHistory:
    """Keeps every event until there are too many; then every second look for drift, then every fourth, and so on.

    The tuning is kept in full. Where changes of shares are what fills the record, their older half goes.

    Args:
        header: of the run.
        most_bytes: how large the record may become, in bytes. A few lines are kept in any case.
    """

    def __init__(self, header: RunHeader, most_bytes: int = 4 << 20) -> None:
        self._most_bytes = most_bytes
        self._header = to_line(header)
        self._events: list[tuple[Event, str]] = []
        self._bytes = len(self._header)
        self._every = 1
        self._seen = 0
        self._left_out: RunWindow | None = None

    @property
    def lines(self) -> list[str]:
        """The record, without line breaks."""
        return [self._header, *(line for _, line in self._events)]

    def add(self, event: Event) -> list[str] | None:
        """Take an event.

        Returns:
            The lines to append to what is written already; None where earlier lines are gone, so that all have to be
            written anew.
        """
        if isinstance(event, RunWindow) and not event.tuning:
            self._seen += 1
            if self._seen % self._every:
                self._left_out = event
                return []
        before = len(self._events)
        if isinstance(event, RunEnd) and self._left_out is not None:
            self._append(self._left_out)  # so that the record ends with what was measured last
        self._left_out = None
        self._append(event)
        return None if self._shorten() else [line for _, line in self._events[before:]]

    def _append(self, event: Event) -> None:
        line = to_line(event)
        self._events.append((event, line))
        self._bytes += len(line)

    def _shorten(self) -> bool:
        """Leave out what is most, if there is too much; tell whether anything was."""
        if self._bytes <= self._most_bytes:
            return False
        looks = [i for i, (event, _) in enumerate(self._events) if isinstance(event, RunWindow) and not event.tuning]
        changes = [i for i, (event, _) in enumerate(self._events) if isinstance(event, RunChange)]
        if len(looks) >= max(len(changes), 4):
            gone = set(looks[-2::-2])
            self._every *= 2
        else:
            gone = set(changes[1 : len(changes) // 2])
        if not gone:
            return False
        self._events = [kept for i, kept in enumerate(self._events) if i not in gone]
        self._bytes = len(self._header) + sum(len(line) for _, line in self._events)
        return True
