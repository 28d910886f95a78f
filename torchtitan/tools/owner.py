"""One run to an output folder: two would delete each other's checkpoints and mix their metrics.

The first rank's process writes who it is to `.owner.json`, and its heartbeat by the file's time; it takes over from one
that has died, and refuses to start beside one that lives. A run that finds another in its place stops itself.
"""

import atexit
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError
from torchtitan.tools.logging import logger

FILE = ".owner.json"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Without a heartbeat for so long, an owner on another machine has died."""


def own_folder(folder: Path, *, job: str = "", heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
    """Make this process the owner until it ends, or raise ConfigError where another one lives.

    Waits up to `stale_s` for the heartbeat of an owner on another machine.
    """
    me = {**_identify(os.getpid()), "job": job}
    try:
        _take(folder, me, heartbeat_s, stale_s)
    except OSError as error:  # a full disk, for one, which ends no run
        logger.warning(f"{folder} cannot be marked as this run's ({error}): nothing keeps another run from it")
        return
    stopped = threading.Event()
    threading.Thread(target=_beat, args=(folder, me, heartbeat_s, stopped), daemon=True, name="owner").start()
    atexit.register(_release, folder, me, stopped.set)


def _take(folder: Path, me: dict[str, Any], heartbeat_s: float, stale_s: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    while (other := read_owner(folder)) is not None and not _has_died(other):
        age, beat = _get_age(file)
        if age > stale_s:
            break
        time.sleep(min(heartbeat_s, max(0.1, stale_s - age)))
        if read_owner(folder) != other or _get_age(file)[1] == beat:
            continue  # it has gone, or not stirred since
        raise ConfigError(
            f"job.dump_folder={folder} is in use by another run, {_describe(other)}; end that one, or give this one"
            f" another job.dump_folder. (Should it have ended: {file} tells of it and can be removed.)"
        )
    if other is not None and other != me:
        logger.info(f"{folder} was left by a run that has died, {_describe(other)}; this one takes it over")
    mine = file.with_name(f"{FILE}.{me['host']}.{me['process']}")
    mine.write_text(json.dumps(me))
    mine.replace(file)


def read_owner(folder: Path) -> dict[str, Any] | None:
    """Who owns a folder; None where nobody does."""
    try:
        owner = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _beat(folder: Path, me: dict[str, Any], heartbeat_s: float, stopped: threading.Event) -> None:
    while not stopped.wait(heartbeat_s):
        owner = read_owner(folder)
        if owner and owner != me:
            logger.error(
                f"{folder} is now another run's, {_describe(owner)}, which took this one for dead; this one stops and"
                " leaves the folder alone"
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with suppress(OSError):
            os.utime(folder / FILE)


def _release(folder: Path, me: dict[str, Any], stop_beating: Callable[[], None]) -> None:
    stop_beating()
    if read_owner(folder) == me:
        with suppress(OSError):
            (folder / FILE).unlink()


def _identify(process: int) -> dict[str, Any]:
    """Unlike a number alone, also the time of its start (in ticks since the machine's) is no other process's."""
    return {"host": socket.gethostname(), "process": process, "started": _get_start(process), "boot": _get_boot()}


def _get_boot() -> str:
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def _get_start(process: int) -> int | None:
    """None where there is no such process, or one that has ended and is not waited for yet."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _has_died(owner: dict[str, Any]) -> bool:
    """As far as can be seen from here: of this machine's processes only."""
    here = _identify(owner.get("process", 0))
    if any(owner.get(key) != here[key] for key in ("host", "boot")):
        return False
    return owner["process"] == os.getpid() or owner.get("started") != here["started"]


def _get_age(file: Path) -> tuple[float, float]:
    """Seconds since the last heartbeat, and when that was, by the file system's own clock."""
    now = file.with_name(f"{FILE}.now.{socket.gethostname()}.{os.getpid()}")
    now.write_text("")
    try:
        beat = file.stat().st_mtime
        return now.stat().st_mtime - beat, beat
    except FileNotFoundError:
        return 0.0, 0.0  # it has been released
    finally:
        now.unlink()


def _describe(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner.get("job") else ""
    return f"{job}process {owner.get('process', '?')} on {owner.get('host', '?')}"


__all__ = ["own_folder", "read_owner"]
