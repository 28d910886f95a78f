"""One run to an output folder: the living are left alone, the dead make room, and who was taken for dead stops."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.processes import FORKED, is_running, wait_until
from torchtitan.config.errors import ConfigError
from torchtitan.tools import owner
from torchtitan.tools.owner import FILE, own_folder, read_owner

QUICK = {"heartbeat_s": 0.2, "stale_s": 60.0}


def own_and_wait(folder: Path, kind: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    own_folder(folder, job="first", **QUICK)
    time.sleep(300 if kind == "living" else 0.01)


@pytest.fixture
def elsewhere(monkeypatch):
    """This process sees others as on another machine, of which only the heartbeat tells."""
    monkeypatch.setattr(owner.socket, "gethostname", lambda: "here")


def start_owner(folder: Path) -> FORKED.Process:
    process = FORKED.Process(target=own_and_wait, args=(folder, "living"))
    process.start()
    wait_until((folder / FILE).exists, "the owner")
    return process


def test_a_second_run_is_refused_while_the_first_lives_and_takes_over_when_it_has_died(tmp_path, caplog):
    first = start_owner(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by another run, job first, process {first.pid} on .*; end that"):
        own_folder(tmp_path, **QUICK)
    os.kill(first.pid, signal.SIGKILL)  # a kill that is not waited for yet counts
    wait_until(lambda: not is_running(first.pid), "its end")
    caplog.set_level("INFO")
    began = time.monotonic()
    own_folder(tmp_path, **QUICK)
    assert time.monotonic() - began < QUICK["stale_s"]
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
    stat = Path(f"/proc/{first.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it to stop")
    own_folder(tmp_path, heartbeat_s=0.2, stale_s=0.5)
    assert read_owner(tmp_path)["host"] == "here"
    os.kill(first.pid, signal.SIGCONT)
    first.join(120)
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
