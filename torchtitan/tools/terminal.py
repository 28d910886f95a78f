"""A live progress line below a scrolling log.

Workers do not write to the terminal: torchrun reads their output from files, line by line, and prints it. So the
worker that logs sends its progress as marked lines (`send_progress`), and the launcher, which owns the terminal,
takes those out of the stream and redraws them in place (`ProgressTerminal`).
"""

import shutil
import sys
import threading
from typing import TextIO

_MARK = "\x1e"  # ASCII's record separator: no log line holds it
_CLEAR_LINE = "\r\x1b[K"


def send_progress(text: str) -> None:
    """Make `text` the progress line; an empty one removes it."""
    sys.stdout.write(f"{_MARK}{text}\n")  # one write, so that the line arrives whole
    sys.stdout.flush()


class ProgressTerminal:
    """Stands in for sys.stdout and sys.stderr of the launcher; several threads write to it."""

    encoding = "utf-8"

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._lock = threading.Lock()
        self._progress = ""
        self._at_line_start = True
        self._drawn = False

    def write(self, text: str) -> int:
        with self._lock:
            if self._drawn:
                self._terminal.write(_CLEAR_LINE)
            if _MARK in text:
                self._progress = text.partition(_MARK)[2].rstrip("\n")
            elif text:
                self._terminal.write(text)
                self._at_line_start = text.endswith("\n")
            self._drawn = bool(self._progress) and self._at_line_start
            if self._drawn:
                # A full row would wrap, and a wrapped line cannot be cleared.
                self._terminal.write(self._progress[: shutil.get_terminal_size().columns - 1])
            self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._terminal.fileno()
