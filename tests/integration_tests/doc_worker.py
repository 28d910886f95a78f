"""Runs what pages show, page by page, each in a folder that looks like a fresh clone; see test_docs.py.

    python -m tests.integration_tests.doc_worker JOBS.json RESULTS_FOLDER

Every step runs in a fork of this process, which has imported torch and the trainer: a command costs what it does, not
the imports. Two pages run at a time. Each step leaves `<number>.json` with its exit status and the end of its output.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torchtitan.train
from tests.finished_run import save_run
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3 import llama3_flavors

REPO = Path(__file__).parents[2]
PAGES_AT_A_TIME = 2


def run_page(page: dict[str, Any], results: Path) -> None:
    folder = Path(page["folder"])
    for name in ("torchtitan", "scripts", "tests", "docs", "run_train.sh", "pyproject.toml", "LICENSE"):
        (folder / name).symlink_to(REPO / name)
    for name, text in page["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    os.chdir(folder)
    if page["checkpoints"]:
        made = save_run(folder / "outputs")
        for path in map(Path, page["checkpoints"]):
            if not path.exists():
                path.symlink_to(made.absolute())
    for step in page["steps"]:
        log = results / f"{step['number']}.log"
        with log.open("w") as output:
            status = in_a_fork(lambda step=step: run_step(step), output.fileno())
        text = log.read_text(errors="replace")
        (results / f"{step['number']}.json").write_text(json.dumps({"status": status, "output": text[-4000:]}))


def run_step(step: dict[str, Any]) -> int:
    os.environ.update(step["env"])
    words = step["words"]
    match step["kind"]:
        case "process":
            return subprocess.run(words, check=False).returncode
        case "training":
            sys.path.insert(0, str(Path.cwd()))
            return torchtitan.train.main(words)
        case "code":
            # A page may speak of a `model`, and may name a GPU.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            code = compile(step["code"].replace('"cuda"', f'"{device}"'), step["where"], "exec")
            sys.path.insert(0, str(Path.cwd()))
            exec(code, {"__name__": "page", "model": Transformer(llama3_flavors["debugmodel"])})
            return 0
        case "script":
            sys.argv = [*words]
            sys.path[0] = str(Path(words[0]).resolve().parent)  # as Python does
            runpy.run_path(words[0], run_name="__main__")
            return 0
        case "module":
            sys.argv = [*words]
            sys.path[0] = str(Path.cwd())
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            return 0
    raise AssertionError(step["kind"])


def in_a_fork(work: Callable[[], int], output: int | None = None) -> int:
    """The exit status of `work` in a child process; its output goes to the file descriptor."""
    child = os.fork()
    if child == 0:
        status: Any = 1
        try:
            if output is not None:
                os.dup2(output, 1)
                os.dup2(output, 2)
            status = work()
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(jobs: Path, results: Path) -> None:
    torch.set_num_threads(1)
    running = 0
    for page in json.loads(jobs.read_text()):
        if running == PAGES_AT_A_TIME:
            os.wait()
            running -= 1
        if os.fork() == 0:
            status = 1
            try:
                run_page(page, results)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        running += 1
    while running:
        os.wait()
        running -= 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
