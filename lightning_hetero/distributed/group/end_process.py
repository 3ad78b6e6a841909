"""End a process whose main thread waits in a call that no exception and no signal handler of Python reaches."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lightning_hetero.exceptions import RankFailedError

__all__ = ["end_process", "where_main_thread_waits"]

_log = logging.getLogger(__name__)

# The main thread may hold the lock of a stream or of a logger.
_PATIENCE_S = 3.0


def end_process(message: str) -> NoReturn:
    """Log ``message`` and end this process with exit code 1, without any handler that could wait for the device."""
    logged = threading.Event()

    def tell() -> None:
        _log.error(message)
        logged.set()
        with suppress(Exception):
            _record_for_torchrun(message)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(_PATIENCE_S)
    if not logged.is_set():
        with suppress(OSError):
            os.write(2, f"{message}\n".encode())
    os._exit(1)


def where_main_thread_waits() -> str:
    """Return file, line and function in which the main thread is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "unknown"
    innermost = traceback.extract_stack(frame)[-1]
    return f"{innermost.filename}:{innermost.lineno}, in {innermost.name}"


def _record_for_torchrun(message: str) -> None:
    """Write torchrun's error file, as ``torch.distributed.elastic``'s ``record`` does for exceptions."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not Path(path).exists():
        # under torchrun only: nothing else imports this
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise RankFailedError(message)
        except RankFailedError as error:
            get_error_handler().record_exception(error)
