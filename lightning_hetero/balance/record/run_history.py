"""Choose which lines of a run's record to keep, so that it stays small however long the run is."""

from __future__ import annotations

from lightning_hetero.balance.record.run_record import Event, RunChange, RunEnd, RunHeader, RunWindow, to_line

__all__ = ["RunHistory"]


class RunHistory:
    """The lines of a record, thinned out when there are too many.

    Every event is kept until the record is full; then every second window of watching, later every fourth, and so on.
    All windows of the tuning are kept. If mostly changes of shares fill the record, their older half is dropped.

    Args:
        header: Header of the run.
        most_bytes: Largest size of the record in bytes. A few lines are kept in any case.
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
        """The lines of the record, without line breaks."""
        return [self._header, *(line for _, line in self._events)]

    def add(self, event: Event) -> list[str] | None:
        """Add an event.

        Returns:
            The lines to append to the file; None if earlier lines were dropped, so that all lines must be written
            again.
        """
        if isinstance(event, RunWindow) and not event.tuning:
            self._seen += 1
            if self._seen % self._every:
                self._left_out = event
                return []
        before = len(self._events)
        if isinstance(event, RunEnd) and self._left_out is not None:
            self._append(self._left_out)  # so that the record ends with the latest measurement
        self._left_out = None
        self._append(event)
        return None if self._shorten() else [line for _, line in self._events[before:]]

    def _append(self, event: Event) -> None:
        line = to_line(event)
        self._events.append((event, line))
        self._bytes += len(line)

    def _shorten(self) -> bool:
        """Drop events of the most frequent kind if the record is too large; return whether any were dropped."""
        if self._bytes <= self._most_bytes:
            return False
        watched = [i for i, (event, _) in enumerate(self._events) if isinstance(event, RunWindow) and not event.tuning]
        changes = [i for i, (event, _) in enumerate(self._events) if isinstance(event, RunChange)]
        if len(watched) >= max(len(changes), 4):
            dropped = set(watched[-2::-2])
            self._every *= 2
        else:
            dropped = set(changes[1 : len(changes) // 2])
        if not dropped:
            return False
        self._events = [kept for i, kept in enumerate(self._events) if i not in dropped]
        self._bytes = len(self._header) + sum(len(line) for _, line in self._events)
        return True
