"""Write the record of a run to a file, so that a crash loses at most its last seconds."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_hetero.balance.record.run_history import RunHistory
from lightning_hetero.balance.record.run_record import Event, RunHeader, RunWindow
from lightning_hetero.balance.types import DeviceProfile

__all__ = ["RunWriter", "reason_of", "record_directory", "run_header"]

_LONGEST_REASON = 1000

# A network file system may take milliseconds, and all ranks wait for the one that writes.
_LEAST_S = 2.0


class RunWriter:
    """Writes the record of one run; used on rank zero only.

    If the disk is full or write-protected, it warns and writes no more; the training continues.

    Args:
        directory: Directory of the file: ``hetero_run.jsonl``, or ``hetero_run-1.jsonl`` if that exists, and so on.
        header: Header of the run.
    """

    def __init__(self, directory: Path, header: RunHeader) -> None:
        self.path: Path | None = None
        self._history = RunHistory(header)
        self._pending: list[str] = []
        self._written_at_s = -_LEAST_S
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.path = _new_file(directory)
            self._write_all()
        except OSError as error:
            self._give_up(error)

    def add(self, event: Event) -> None:
        """Record an event; windows are written every two seconds at most, everything else at once."""
        if self.path is None:
            return
        lines = self._history.add(event)
        try:
            if lines is None:
                self._write_all()
                return
            self._pending += lines
            if self._pending and not (isinstance(event, RunWindow) and self._is_early):
                self._append()
        except OSError as error:
            self._give_up(error)

    @property
    def _is_early(self) -> bool:
        return time.monotonic() - self._written_at_s < _LEAST_S

    def _append(self) -> None:
        assert self.path is not None
        # The file is not kept open: callbacks are pickled, copied and killed.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in self._pending))
        self._pending = []
        self._written_at_s = time.monotonic()

    def _write_all(self) -> None:
        assert self.path is not None
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in self._history.lines), encoding="utf-8")
        os.replace(new, self.path)
        self._pending = []
        self._written_at_s = time.monotonic()

    def _give_up(self, error: OSError) -> None:
        rank_zero_warn(f"lightning_hetero: the record of this run cannot be written and ends here: {error}")
        self.path = None


def _new_file(directory: Path) -> Path:
    number = 0
    while True:
        path = directory / (f"hetero_run-{number}.jsonl" if number else "hetero_run.jsonl")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def reason_of(exception: BaseException) -> str:
    """Return how a record describes the error that ended a run."""
    return f"{type(exception).__name__}: {exception}"[:_LONGEST_REASON]


def run_header(strategy: str, profiles: tuple[DeviceProfile, ...], global_batch_size: int) -> RunHeader:
    """Return the header of the record of a run that begins now."""
    from lightning_hetero import __version__  # the package imports this module

    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return RunHeader(strategy, now, global_batch_size, profiles, __version__)


def record_directory(trainer: Trainer, record: bool | str) -> Path | None:
    """Return the directory of a run's record, None for no record; every rank must call this at the same point."""
    if isinstance(record, str):
        return Path(record)
    if not record or not trainer.loggers:
        return None
    directory = trainer.log_dir  # rank zero broadcasts it
    # A logger may keep its files on a remote service, where lines cannot be appended.
    return None if directory is None or "://" in str(directory) else Path(directory)
