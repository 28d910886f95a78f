import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import pytest

from torchtitan.tools import terminal as module
from torchtitan.tools.terminal import Progress, ProgressTerminal, send_progress

CLEAR = "\r\x1b[K"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """A terminal 40 columns wide, with the launcher's stand-in for sys.stdout in front."""
    monkeypatch.setenv("COLUMNS", "40")
    screen = io.StringIO()
    with redirect_stdout(ProgressTerminal(screen)):
        yield screen


def test_log_lines_pass_unchanged_without_a_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        print("one\ntwo")
    assert screen.getvalue() == "one\ntwo\n"


def test_the_progress_line_stays_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        send_progress("step 1")
        print("a log line")  # written in two parts, the line and its end: the progress line waits for the end
        send_progress("step 2")
        send_progress("")
    assert screen.getvalue() == f"step 1{CLEAR}a log line\nstep 1{CLEAR}step 2{CLEAR}"


def test_a_long_progress_line_does_not_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        send_progress("x" * 100)
    assert screen.getvalue() == "x" * 39


def test_torchruns_prefix_is_not_part_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = io.StringIO()
    with redirect_stdout(sent):
        send_progress("step 7")
    with terminal(monkeypatch) as screen:
        sys.stdout.write(f"[rank0]:{sent.getvalue()}")
    assert screen.getvalue() == "step 7"


def test_threads_do_not_mix_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str) -> None:
        for i in range(200):
            sys.stdout.write(f"{name} {i}\n")
            send_progress(f"{name} {i}")

    with terminal(monkeypatch) as screen:
        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [line.rpartition(CLEAR)[2] for line in screen.getvalue().split("\n")[:-1]]
    for name in "ab":
        assert [line for line in lines if line[0] == name] == [f"{name} {i}" for i in range(200)]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> str:
    """Ten parts of 4 seconds each, on a screen 40 columns wide; what was written."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "40")
    with Progress("Reading " + "x" * 10, total=10) as progress:
        for done in range(1, 11):
            progress.show(done)
    return stderr.getvalue()


def test_progress_is_a_line_that_is_redrawn_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = work(monkeypatch, Screen()).split(CLEAR)
    assert lines[0] == lines[-1] == ""
    assert lines[1] == "Reading xxxxxxxxxx: 10%, 0:00:36 left"
    assert len(lines) == 12 and max(map(len, lines)) < 40


def test_progress_elsewhere_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [f"Reading xxxxxxxxxx: {done}0%, 0:00:{4 * (10 - done):02} left" for done in (3, 6, 9)]
    work(monkeypatch, io.StringIO())
    assert caplog.messages == expected  # of a run, in its log
    logging.getLogger("torchtitan").setLevel(logging.WARNING)  # a command's
    assert work(monkeypatch, io.StringIO()).splitlines() == expected
