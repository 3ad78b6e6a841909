"""Turn the record of a run into one self-contained HTML page.

A run with the strategy hetero_ddp writes its record into the directory of the Trainer's first logger; with
hetero_pipeline the callback PipelineRecorder writes it. The page shows how long each rank worked and waited, how shares
changed and why, and the speed-up. It can be made while the run is still going.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from lightning_hetero.balance.record.run_record import RunRecord
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.exceptions import ConfigurationError

__all__ = ["add_arguments", "find_record", "run"]

_PATTERN = "hetero_run*.jsonl"
_LOGS = "lightning_logs"
_HOW = (
    f"`LoadBalancer`, which `hetero_ddp` adds, writes {_PATTERN} into the directory of the Trainer's first logger, for"
    " example lightning_logs/version_0 with `Trainer(logger=True)`; without a logger it writes no record. With"
    " `hetero_pipeline` the callback `PipelineRecorder` writes it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``report``."""
    parser.add_argument(
        "record",
        metavar="RUN",
        nargs="?",
        type=Path,
        help=f"Record of a run, or a directory, which stands for the newest {_PATTERN} directly in it or else anywhere"
        f" below it. By default, the newest record below ./{_LOGS}, or else below the current directory, is used.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="Write the page to this file (default: hetero_report.html next to the record).",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="Keep updating the page until the run ends or you press Ctrl-C. An open page reloads itself.",
    )
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=float,
        default=5.0,
        help="With --follow, check for new entries in the record every so many seconds (default: 5).",
    )


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path.

    Args:
        options: Parsed options, with the attributes ``record``, ``output``, ``follow`` and ``interval``.

    Raises:
        ConfigurationError: There is no record, it is damaged, the page cannot be written, or an extra is missing.
    """
    if not 0.1 <= options.interval <= 3600:
        raise ConfigurationError(f"`--interval` must be from 0.1 to 3600 seconds, got {options.interval:g}.")
    path = find_record(options.record)
    output = (options.output or path.with_name(_page_name(path))).resolve()
    if output == path.resolve():
        raise ConfigurationError(f"`--output` must not be the record itself, got {options.output}.")
    record = _read(path)
    follows = options.follow and record.end is None
    _write(record, path, output, options.interval if follows else None)
    print(output, flush=True)  # noqa: T201  # a command prints
    if follows:
        _follow(path, output, options.interval)


def find_record(run: Path | None) -> Path:
    """Return the record that ``RUN`` stands for.

    Args:
        run: File, directory, or None for the newest record below the current directory.

    Raises:
        ConfigurationError: There is no record; the message says what writes one.
    """
    if run is None:
        found = _newest(_below(Path(_LOGS))) or _newest(_below(Path()))
        if found is None:
            raise ConfigurationError(
                f"found no {_PATTERN} below {Path.cwd()}. {_HOW} If the record is elsewhere, give its path as RUN."
            )
        return found
    # unlike the methods of `Path`, these functions raise for no name, however odd
    if os.path.isfile(run):
        return run
    if not os.path.exists(run):
        raise ConfigurationError(f"`RUN` must be a file or a directory, got {run}, which does not exist.")
    if not os.path.isdir(run):
        raise ConfigurationError(f"`RUN` must be a file or a directory, got {run}, which is neither.")
    found = _newest(file for file in _files(run) if file.parent == run) or _newest(_below(run))
    if found is None:
        raise ConfigurationError(f"`RUN` must contain the record of a run, got {run} without a {_PATTERN}. {_HOW}")
    return found


def _files(directory: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (file for file in directory.iterdir() if fnmatch(file.name, _PATTERN))


def _below(directory: Path) -> Iterator[Path]:
    # unreadable directories are skipped, and hidden ones too, because environments and caches are large
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if fnmatch(name, _PATTERN))


def _newest(paths: Iterator[Path]) -> Path | None:
    found = []
    for path in paths:
        with suppress(OSError):
            if path.is_file():
                found.append((path.stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def _page_name(path: Path) -> str:
    # hetero_run-1.jsonl is another run in the same directory, so it gets a page of its own
    suffix = path.stem.removeprefix("hetero_run") if path.stem.startswith("hetero_run") else ""
    return f"hetero_report{suffix}.html"


def _read(path: Path) -> RunRecord:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return parse_record(lines, name=str(path))
    except OSError as error:
        raise ConfigurationError(f"`RUN` must be a file that can be read, got {path}: {error.strerror}.") from error


def _write(record: RunRecord, path: Path, output: Path, refresh_s: float | None) -> None:
    """Write the page atomically, so that a browser never sees half of it."""
    try:
        from lightning_hetero.command.report.page import build
    except ImportError as error:
        raise ConfigurationError(
            f"`report` needs jinja2 and matplotlib ({error}): pip install 'lightning-hetero[report]'"
        ) from error
    page = build(record, refresh_s, name=str(path))
    if os.path.exists(output) and not os.path.isfile(output):
        raise ConfigurationError(f"`--output` must be a file, got {output}, which is not one.")
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        try:
            part.write_text(page, encoding="utf-8")
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"`--output` must be a file that can be written, got {output}: {error.strerror}. Choose another file."
        ) from error


def _follow(path: Path, output: Path, interval_s: float) -> None:
    size = None
    try:
        while True:
            time.sleep(interval_s)
            with suppress(OSError):
                if path.stat().st_size == size:
                    continue
                size = path.stat().st_size
            record = _read(path)
            _write(record, path, output, interval_s if record.end is None else None)
            if record.end is not None:
                return
    except KeyboardInterrupt:
        # this version of the page no longer reloads itself
        _write(_read(path), path, output, None)
        raise
