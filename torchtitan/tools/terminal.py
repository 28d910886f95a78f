"""A live progress line below a scrolling log, and how far a command is with long work.

Workers do not write to the terminal: torchrun reads their output from files, line by line, and prints it. So the
worker that logs sends its progress as marked lines (`send_progress`), and the launcher, which owns the terminal,
takes those out of the stream and redraws them in place (`ProgressTerminal`).
"""

import logging
import shutil
import sys
import threading
import time
from typing import Self, TextIO

from torchtitan.tools.logging import logger

_MARK = "\x1e"  # ASCII's record separator: no log line holds it
_CLEAR_LINE = "\r\x1b[K"
REDRAWN_EVERY_S = 0.2
SAID_EVERY_S = 10.0


class Progress:
    """How far long work is, of `total` of whatever it is counted in.

    On a terminal it is a line on stderr that is redrawn, and gone at the end. Elsewhere it is a line every SAID_EVERY_S
    seconds, in the log of a run or else on stderr: work that is done sooner says nothing.
    """

    def __init__(self, what: str, total: float) -> None:
        self._what, self._total = what, total
        self._is_drawn = False

    def __enter__(self) -> Self:
        self._on_terminal = sys.stderr.isatty()
        self._begin = self._last = time.monotonic()
        return self

    def show(self, done: float) -> None:
        """Call it as often as it is convenient: `done` is all that is done by now."""
        now = time.monotonic()
        if done <= 0 or now - self._last < (REDRAWN_EVERY_S if self._on_terminal else SAID_EVERY_S):
            return
        self._last = now
        left = clock_time((now - self._begin) * (self._total - done) / done)
        text = f"{self._what}: {100 * done / self._total:.0f}%, {left} left"
        if self._on_terminal:
            sys.stderr.write(_CLEAR_LINE + _cut(text))
            sys.stderr.flush()
            self._is_drawn = True
        elif logger.isEnabledFor(logging.INFO):
            logger.info(text)
        else:
            print(text, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._is_drawn:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()


def clock_time(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


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
                self._terminal.write(_cut(self._progress))
            self._terminal.flush()
        return len(text)

    def flush(self) -> None:
        self._terminal.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._terminal.fileno()


def _cut(line: str) -> str:
    """To the terminal's width: a full row would wrap, and a wrapped line cannot be cleared."""
    return line[: shutil.get_terminal_size().columns - 1]
