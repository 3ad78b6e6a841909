"""Run a command in a terminal of 100 columns and draw its output as an SVG.

    python docs/record_terminal.py docs/images/terminal.svg python examples/digits.py

The picture shows the real output. Only what a terminal would have overwritten is left out.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console

COLUMNS = 100


def output_of(command: list[str]) -> str:
    """Run ``command`` in a pseudo-terminal and return what it wrote, with its colours.

    Raises:
        SystemExit: The command failed; its output is the message.
    """
    process, terminal = pty.fork()
    if process == 0:
        ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)})
    written = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux answers so if the other end is closed
            break
        if not part:
            break
        written += part
    text = written.decode(errors="replace").replace("\r\n", "\n")
    if os.waitpid(process, 0)[1]:
        sys.exit(text)
    return text


def drawn(command: list[str], text: str) -> str:
    """Return the SVG of a terminal in which ``command`` has written ``text``."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(f"[bold green]$[/] {shlex.join(command)}")
    for line in AnsiDecoder().decode(text.rstrip()):
        console.print(line)
    svg = console.export_svg(title="lightning_hetero")
    # the fonts would come from the network; any fixed-width one does
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main(path: str, *command: str) -> None:
    """Write the picture."""
    shown = [Path(command[0]).name, *command[1:]]
    Path(path).write_text(drawn(shown, output_of(list(command))), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
