"""Runs what pages show, page by page, each in a folder that looks like a fresh clone; see test_docs.py.

    python -m tests.integration_tests.doc_worker JOBS.json RESULTS_FOLDER

Every step runs in a fork of this process, which has imported torch and the trainer: a command costs what it does, not
the imports. So do the processes of a step that has several, and the runs that are compared. What is compiled is traced,
and no code is made of it. Two pages run at a time. Each step leaves `<number>.json` with its exit status and the end of
its output.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torchtitan.cli.compare
import torchtitan.train
from tests.finished_run import save_run
from tests.processes import find_free_port, get_worker_environment
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
            status = wait(fork(lambda step=step: run_step(step), output.fileno()))
        text = log.read_text(errors="replace")
        (results / f"{step['number']}.json").write_text(json.dumps({"status": status, "output": text[-4000:]}))


def run_step(step: dict[str, Any]) -> int:
    os.environ.update(step["env"])
    if step["ranks"] > 1:
        port = find_free_port()
        return max(map(wait, [fork(lambda rank=rank: run_rank(rank, port, step)) for rank in range(step["ranks"])]))
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


def run_rank(rank: int, port: int, step: dict[str, Any]) -> int:
    os.environ.update(get_worker_environment(rank, step["ranks"], port))
    return run_step(step | {"ranks": 1})


def train_in_a_fork(run_train: Sequence[str]) -> int:
    config = os.environ.get("CONFIG_FILE", "debug_model")
    return wait(fork(lambda: torchtitan.train.main(["--job.config_file", config, *run_train[1:]])))


def fork(work: Callable[[], int], output: int | None = None) -> int:
    """The id of a child process that ends with the exit status of `work`; its output goes to the file descriptor."""
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
    return child


def wait(child: int) -> int:
    """Its exit status, 1 where a signal ended it."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 1 if status < 0 else status


def main(jobs: Path, results: Path) -> None:
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")
    torchtitan.cli.compare.run_to_its_end = train_in_a_fork
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
