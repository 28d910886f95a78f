"""One run to an output folder: the living are left alone, the dead make room, and who was taken for dead stops."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.processes import FORKED
from torchtitan.config.errors import ConfigError
from torchtitan.tools import owner
from torchtitan.tools.owner import FILE, own_folder, read_owner

QUICK = {"heartbeat_s": 0.2, "stale_s": 1.5}


def own_and_wait(folder: Path, kind: str) -> None:
    own_folder(folder, job="first", **QUICK)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    time.sleep(60 if kind == "living" else 0.01)


@pytest.fixture
def elsewhere(monkeypatch):
    """This process sees others as on another machine, of which only the heartbeat tells."""
    monkeypatch.setattr(owner.socket, "gethostname", lambda: "here")


def start_owner(folder: Path) -> FORKED.Process:
    process = FORKED.Process(target=own_and_wait, args=(folder, "living"))
    process.start()
    while not (folder / FILE).exists():
        time.sleep(0.01)
    return process


def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_when_it_has_died(tmp_path, caplog):
    first = start_owner(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by another run, job first, process {first.pid} on .*; end that"):
        own_folder(tmp_path, **QUICK)
    os.kill(first.pid, signal.SIGKILL)  # a kill that is not waited for yet counts
    time.sleep(0.2)
    caplog.set_level("INFO")
    began = time.monotonic()
    own_folder(tmp_path, **QUICK)
    assert time.monotonic() - began < 1
    assert f"was left by a run that has died, job first, process {first.pid}" in caplog.text
    assert read_owner(tmp_path)["process"] == os.getpid()
    own_folder(tmp_path, **QUICK)  # this process again
    first.join()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.usefixtures("elsewhere")
def test_of_another_machine_the_heartbeat_tells(tmp_path):
    first = start_owner(tmp_path)
    with pytest.raises(ConfigError, match="in use by another run"):
        own_folder(tmp_path, **QUICK)
    os.kill(first.pid, signal.SIGSTOP)  # as one that hangs
    time.sleep(0.5)  # until it has stopped
    own_folder(tmp_path, **QUICK)
    assert read_owner(tmp_path)["host"] == "here"
    os.kill(first.pid, signal.SIGCONT)
    first.join(30)
    assert first.exitcode == 143  # it has found another in its place, and stops
    assert read_owner(tmp_path)["host"] == "here"


def test_a_folder_is_left_free_and_another_s_file_is_left_alone(tmp_path):
    process = FORKED.Process(target=own_and_wait, args=(tmp_path, "short"))
    process.start()
    process.join()
    stop = threading.Event()
    own_folder(tmp_path, **QUICK)
    me = json.loads((tmp_path / FILE).read_text())
    owner._release(tmp_path, {**me, "process": 0}, stop.set)
    assert read_owner(tmp_path) == me
    owner._release(tmp_path, me, stop.set)
    assert read_owner(tmp_path) is None
    assert stop.is_set()
