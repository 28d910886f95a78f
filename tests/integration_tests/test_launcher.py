"""run_train.sh as a user starts it, in a copy of the repository whose train.py is a stand-in: nothing is trained."""

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.processes import is_running, wait_until
from torchtitan.config.errors import EXIT_MISTAKE
from torchtitan.launch import launcher

REPO = Path(__file__).parents[2]

# The behaviour comes in the environment; every worker leaves its process id and its arguments.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from torchtitan.tools.terminal import send_progress

rank = os.environ["RANK"]
names = ["WORLD_SIZE", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"]
names += [f"TORCHTITAN_{name}" for name in ("PROGRESS_RANK", "NUM_GPUS", "LOG_RANK")]
seen = {name: os.environ.get(name) for name in names}
Path(f"worker{rank}.json").write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], **seen}))
mode = os.environ["WORKER_MODE"]
if mode == f"mute{rank}":
    sys.exit(3)
print(f"hello from {rank}", flush=True)
while mode == f"fail{rank}" and len(list(Path().glob("worker*.json"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)  # or the others are stopped before they have left their file
if mode == f"fail{rank}":
    others = [Path(f"worker{other}.json") for other in range(int(os.environ["WORLD_SIZE"]))]
    while not all(file.exists() and file.stat().st_size for file in others):  # they are stopped when this one ends
        time.sleep(0.01)
    print("ConfigError: the worker's own words", file=sys.stderr)
    sys.exit(3)
if mode == f"mistake{rank}":
    sys.exit(78)
if mode == "memory" and os.environ["TORCHTITAN_OUT_OF_MEMORY_COUNT"] != "2":
    sys.exit(79)
if mode == "progress":
    send_progress("step 1 of 2")
    print("a log line", flush=True)
elif mode not in ("succeed", "memory"):
    from torchtitan.tools.process import end_with_launcher

    # all of torch that it needs, and says no more; torch itself takes seconds
    dist = SimpleNamespace(is_torchelastic_launched=lambda: "TORCHELASTIC_RUN_ID" in os.environ)
    sys.modules |= {"torch": SimpleNamespace(distributed=dist), "torch.distributed": dist}
    end_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN if mode == "stubborn" else signal.SIG_DFL)
    Path(f"ready{rank}").touch()
    time.sleep(1000)
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy with what the launcher needs, and the running interpreter as its active python3."""
    copy = tmp_path / "repo"
    for name in ("scripts", "torchtitan"):
        shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_train.sh", "pyproject.toml"):
        shutil.copy(REPO / name, copy)
    for name, content in {
        "torchtitan/train.py": WORKER,
        "torchtitan/models/llama3/train_configs/debug_model.toml": "[training]\nseq_len = 128",
        "torchtitan/assets/tokenizer/tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    }.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(content)
    write_executable(copy / "bin/python3", f'exec "{sys.executable}" "$@"')
    return copy


def write_executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}\n")
    path.chmod(0o755)


def environment(repo: Path, mode: str, **variables: str) -> dict[str, str]:
    removed = (
        "PYTHONUNBUFFERED",
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NGPU",
        "LOG_RANK",
        "CONFIG_FILE",
        "RANK",
        "WORLD_SIZE",
    )
    inherited = {name: value for name, value in os.environ.items() if name not in removed}
    path = f"{repo / 'bin'}:{os.environ['PATH']}"
    return inherited | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "WORKER_MODE": mode} | variables


def run(repo: Path, mode: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["./run_train.sh", *arguments],
        cwd=repo,
        env=environment(repo, mode, **variables),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def time_of_children() -> float:
    """Seconds of a core that processes of this test, which have ended, have taken: not longer where others wait."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def worker(repo: Path, rank: int) -> dict[str, object]:
    return json.loads((repo / f"worker{rank}.json").read_text())


def test_workers_get_the_options_and_nothing_of_the_launchers(repo: Path) -> None:
    options = ["--training.steps", "3", "--training.compile", "False"]
    flags = ["--nnodes=1", "--max-restarts", "2", "--standalone"]
    result = run(repo, "succeed", *flags, "--", *options, NGPU="2", LOG_RANK="1")
    assert result.returncode == 0, result.stderr
    config_file = repo / "torchtitan/models/llama3/train_configs/debug_model.toml"
    assert worker(repo, 0)["argv"] == ["--job.config_file", str(config_file), *options]
    assert worker(repo, 0)["WORLD_SIZE"] == "2"
    assert worker(repo, 0)["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert worker(repo, 0)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    # not a terminal: the output has neither a progress line nor any escape sequence
    assert worker(repo, 0)["TORCHTITAN_PROGRESS_RANK"] is None
    assert worker(repo, 0)["TORCHTITAN_NUM_GPUS"] == "0"
    assert worker(repo, 0)["TORCHTITAN_LOG_RANK"] == "1"
    assert not (repo / "outputs/worker_logs").exists()
    assert result.stdout == "[rank1]:hello from 1\n"


def test_a_mistake_costs_one_message_and_no_start(repo: Path) -> None:
    start = time_of_children()
    result = run(repo, "succeed", "--training.seqlen", "128")
    assert time_of_children() - start < 3
    assert result.returncode == EXIT_MISTAKE
    assert "--training.seq_len" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (repo / "worker0.json").exists()


def test_it_runs_from_any_folder_by_sh_through_a_link_and_with_cdpath(repo: Path, tmp_path: Path) -> None:
    """Also from another checkout, whose code is not what was started."""
    folder = tmp_path / "elsewhere"
    (folder / "torchtitan").mkdir(parents=True)
    for module in ("__init__", "launch", "train"):
        (folder / f"torchtitan/{module}.py").write_text('raise SystemExit("the wrong one")')
    (folder / "link_to_it").symlink_to(repo / "run_train.sh")
    (tmp_path / "cdpath" / repo.name).mkdir(parents=True)
    result = subprocess.run(
        ["sh", "./link_to_it"],
        cwd=folder,
        env=environment(repo, "succeed", CDPATH=f"{tmp_path / 'cdpath'}:{repo.parent}"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert worker(folder, 0)["WORLD_SIZE"] == "1"


def test_bytes_that_are_not_utf8_are_a_mistake_too(repo: Path) -> None:
    result = run(repo, "succeed", "--job.description", "bad\udcff")
    assert (result.returncode, result.stdout) == (EXIT_MISTAKE, "")
    assert result.stderr == "ConfigError: --job.description bad\\xff: must be text; these bytes are not UTF-8\n"


def test_ngpu_must_be_a_number(repo: Path) -> None:
    result = run(repo, "succeed", NGPU="two")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "NGPU=two" in result.stderr


@pytest.mark.parametrize("log_rank", ["abc", "0,2"])
def test_log_rank_must_be_ranks_of_this_machine(repo: Path, log_rank: str) -> None:
    result = run(repo, "succeed", NGPU="2", LOG_RANK=log_rank)
    assert result.returncode == EXIT_MISTAKE
    assert result.stderr == (
        f"ConfigError: LOG_RANK={log_rank} (the flag --local_ranks_filter): must be ranks of this machine,"
        " separated by commas, each of them 0 or 1\n"
    )


def test_a_log_dir_must_be_writable(repo: Path) -> None:
    (repo / "file").touch()
    result = run(repo, "succeed", "--log_dir", "file/logs")
    assert result.returncode == EXIT_MISTAKE
    assert result.stderr == "ConfigError: --log_dir file/logs cannot be written: Not a directory; name another folder\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--max_restarts abc", "--max_restarts abc: must be an integer >= 0"),
        ("--max-restarts", "--max_restarts: needs a value, an integer >= 0"),
        ("--master_port 70000", "--master_port 70000: must be an integer >= 0 and <= 65535"),
        ("--monitor_interval abc", "--monitor_interval abc: must be a number > 0 and <= 1000000000"),
        ("--node-rank=-1", "--node_rank -1: must be an integer >= 0"),
        ("--numa_binding sockets", "must be node, socket, exclusive or core-complex; did you mean socket?"),
        ("--numa_binding node", "--numa_binding binds processes to the cores near their GPUs; leave it out on CPU"),
        ("--local_addr no.such.host.invalid", "--local_addr no.such.host.invalid: not a host or address that is known"),
        ("--nproc_pernode 2", "--nproc_pernode: no such flag; did you mean --nproc_per_node?"),
        ("--nproc-per-nod=2", "--nproc-per-nod=2: no such flag; did you mean --nproc_per_node?"),
        ("--nnodes 0", "--nnodes 0: must be a number of machines, or a range of it such as 2:4"),
        ("--nnodes 4:2", "--nnodes 4:2: must be a number of machines, or a range of it such as 2:4"),
        ("--nnodes 2", "--nnodes 2: the machines need a place to meet; add --rdzv_endpoint HOST:PORT"),
        ("--nnodes 2 --rdzv_endpoint a:1 --node_rank 0", "--rdzv_endpoint a:1 says where the machines meet, and so do"),
        (
            "--standalone --nnodes 2 --rdzv_endpoint a:1",
            "--standalone is for one machine, and --nnodes is 2; leave one of them out",
        ),
        ("--nnodes 100 --nproc_per_node 8 --rdzv_endpoint a:1", "a process may open 1024 files here (`ulimit -Hn`)"),
        ("--max_restarts abc --node_rank abc", "2 mistakes:"),
    ],
)
def test_a_mistake_in_torchruns_flags_is_one_of_the_options(
    flags: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launcher, "run_workers", lambda *_: pytest.fail("workers were started"))
    monkeypatch.setattr(launcher, "raise_file_limit", lambda: 1024)
    assert launcher.main(["--num_gpus", "0", "--job.dump_folder", str(tmp_path), *flags.split()]) == EXIT_MISTAKE
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith("ConfigError: ")
    assert told in errors.splitlines()[0]


def test_what_torchrun_refuses_is_said_in_one_line(repo: Path) -> None:
    result = run(repo, "succeed", "--redirects", "abc")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("torchrun could not start the workers: abc does not match")


@pytest.mark.parametrize("way", ["--rdzv_id a-run --rdzv-endpoint=localhost:PORT", "--master_port PORT --node_rank"])
def test_several_machines_meet_at_the_rendezvous(repo: Path, way: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["./run_train.sh", "--nnodes", "2", *way.replace("PORT", str(port)).split()]
    commands = [[*command, str(rank)] if way.endswith("node_rank") else command for rank in (0, 1)]
    started = [subprocess.Popen(each, cwd=repo, env=environment(repo, "succeed")) for each in commands]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    assert [worker(repo, rank)["WORLD_SIZE"] for rank in (0, 1)] == ["2", "2"]
    logs = (repo / "outputs/worker_logs" / socket.gethostname()).glob("*/attempt_0/0/stdout.log")
    assert sorted(log.read_text() for log in logs) == ["hello from 0\n", "hello from 1\n"]


def test_slurm_starts_every_machine_at_the_first_one(repo: Path) -> None:
    """Of many: their names fill more than a pipe holds, and the first is all that is read."""
    write_executable(repo / "bin/scontrol", "seq -f host%g 20000")
    write_executable(repo / "bin/srun", 'echo "$SRUN_CPUS_PER_TASK $*" >>srun.log')
    job = {"SUBMIT_DIR": str(repo), "JOB_NODELIST": "host[1-20000]", "JOB_NUM_NODES": "20000", "JOB_ID": "7"}
    variables = {f"SLURM_{name}": value for name, value in {**job, "CPUS_PER_TASK": "96"}.items()}
    script = ["bash", "scripts/multinode_trainer.slurm", "--training.steps", "3"]
    subprocess.run(script, cwd=repo, env=environment(repo, "succeed", **variables), check=True, timeout=240)
    set_up, train = (repo / "srun.log").read_text().splitlines()
    assert set_up == "96 --nodes=1 --ntasks=1 --nodelist=host1 ./run_train.sh --help"
    assert train == (
        "96 ./run_train.sh --nnodes 20000 --rdzv_id 7 --rdzv_endpoint host1:29500 --max_restarts 3 --training.steps 3"
    )


def test_help_starts_nothing(repo: Path) -> None:
    result = run(repo, "succeed", "--help")
    assert result.returncode == 0
    assert "--liger_kernel.enable_fused_linear_cross_entropy" in result.stdout
    assert not (repo / "worker0.json").exists()


def test_a_failed_workers_status_is_the_launchers_and_its_words_come_first(repo: Path) -> None:
    """Where all is written to one file; test_errors_that_are_redirected has what goes where."""
    result = subprocess.run(
        ["./run_train.sh"],
        cwd=repo,
        env=environment(repo, "fail0", NGPU="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 3
    lines = result.stdout.splitlines()
    assert lines[-1] == "Rank 0 exited with status 3; its messages are above."
    assert {"[rank0]:hello from 0", "[rank0]:ConfigError: the worker's own words"} <= set(lines)
    assert "Traceback" not in result.stdout
    assert not is_running(worker(repo, 1)["pid"])


def test_the_last_words_of_a_hidden_rank_are_shown(repo: Path) -> None:
    result = run(repo, "fail1", "--max_restarts", "1", NGPU="2")
    assert result.returncode == 3
    assert "will restart worker group" in result.stderr
    shown = result.stderr.splitlines()
    assert shown[-3] == "Rank 1 exited with status 3. The end of its output:"
    assert set(shown[-2:]) == {"hello from 1", "ConfigError: the worker's own words"}


def test_a_mistake_that_no_restart_heals_ends_the_run_whatever_max_restarts_says(repo: Path) -> None:
    result = run(repo, "mistake0", "--max_restarts", "3", NGPU="2")
    assert result.returncode == EXIT_MISTAKE == 78
    assert result.stderr == "Rank 0 exited with status 78 (which no restart heals); its messages are above.\n"
    assert result.stdout.count("hello from 0") == 1


def test_memory_that_ran_out_is_counted_and_starts_all_again_beside_max_restarts(repo: Path) -> None:
    result = run(repo, "memory", NGPU="2")
    assert result.returncode == 0, result.stderr
    assert "hello from 0" in result.stdout  # in the last life; before, it may be stopped as soon as it is there
    assert re.findall(r"(\d)/(\d) attempts left; will restart", result.stderr) == [("1", "1"), ("1", "2")]


def test_another_run_s_words_are_not_shown_for_a_rank_that_said_nothing(repo: Path) -> None:
    other = repo / "logs/z_other_run/attempt_9/1"
    other.mkdir(parents=True)
    (other / "stderr.log").write_text("another run's words\n")
    result = run(repo, "mute1", "--log_dir", "logs", NGPU="2")
    assert result.returncode == 3
    assert result.stderr.splitlines()[-1] == "Rank 1 exited with status 3; there is no output in its log."
    assert "another run's words" not in result.stderr


def test_a_hangup_that_is_ignored_stays_ignored(repo: Path) -> None:
    launcher = subprocess.Popen(
        ["nohup", "./run_train.sh"],
        cwd=repo,
        env=environment(repo, "sleep"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((repo / "ready0").exists, "the worker")
    launcher.send_signal(signal.SIGHUP)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 143
    assert "SIGHUP" not in errors


@pytest.mark.parametrize(
    ("signals", "mode", "status"),
    [
        ([signal.SIGINT], "sleep", 130),
        ([signal.SIGTERM], "sleep", 143),
        ([signal.SIGINT, signal.SIGINT], "stubborn", 130),
        ([signal.SIGKILL], "stubborn", -signal.SIGKILL),
    ],
    ids=["ctrl-c", "sigterm", "ctrl-c twice", "sigkill"],
)
def test_stopping_the_launcher_leaves_no_worker(
    repo: Path, signals: list[signal.Signals], mode: str, status: int
) -> None:
    launcher = subprocess.Popen(
        ["./run_train.sh"],
        cwd=repo,
        env=environment(repo, mode, NGPU="2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "[rank0]:hello from 0\n"  # lines are passed on as they come
    wait_until(lambda: all((repo / f"ready{rank}").exists() for rank in (0, 1)), "the workers")
    launcher.send_signal(signals[0])
    for second in signals[1:]:
        # the first is answered once it has been passed on
        assert "Once more kills them" in launcher.stderr.readline()
        launcher.send_signal(second)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == status
    assert "Traceback" not in errors
    wait_until(lambda: not any(is_running(worker(repo, rank)["pid"]) for rank in (0, 1)), "the end of the workers")


def run_on_terminal(repo: Path, mode: str, *, stderr: int | None = None) -> tuple[int, str, str]:
    """Status, what the terminal shows, and what went to stderr if that is elsewhere."""
    ours, launchers = pty.openpty()
    launcher = subprocess.Popen(
        ["./run_train.sh"],
        cwd=repo,
        env=environment(repo, mode, COLUMNS="80"),
        stdin=subprocess.DEVNULL,
        stdout=launchers,
        stderr=launchers if stderr is None else stderr,
    )
    os.close(launchers)
    shown = b""
    with contextlib.suppress(OSError):  # that is how the end of a terminal reads
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    _, errors = launcher.communicate(timeout=240)
    return launcher.returncode, shown.decode(), (errors or b"").decode()


def test_the_progress_line_is_redrawn_below_the_log_on_a_terminal(repo: Path) -> None:
    status, shown, _ = run_on_terminal(repo, "progress")
    assert status == 0
    clear = "\r\x1b[K"
    assert shown == f"[rank0]:hello from 0\r\nstep 1 of 2{clear}[rank0]:a log line\r\nstep 1 of 2{clear}"
    assert worker(repo, 0)["TORCHTITAN_PROGRESS_RANK"] == "0"


def test_errors_that_are_redirected_leave_the_terminal(repo: Path) -> None:
    status, shown, errors = run_on_terminal(repo, "fail0", stderr=subprocess.PIPE)
    assert status == 3
    assert shown == "[rank0]:hello from 0\r\n"
    assert errors.splitlines() == [
        "[rank0]:ConfigError: the worker's own words",
        "Rank 0 exited with status 3; its messages are above.",
    ]


class TestEnvironment:
    """scripts/setup_env.sh, with a stand-in for pip that only notes what it was asked to install."""

    @pytest.fixture
    def bare(self, repo: Path) -> Path:
        """The active python3 lacks the packages; its venvs hold a python that notes and has them."""
        write_executable(
            repo / "venv_python",
            f"""
            case "$*" in
                *"-m pip"*) echo "$@" >>"{repo}/pip.log"; cat "{repo}/pip_says"; exit "$(cat "{repo}/pip_status")" ;;
            esac
            exec "{sys.executable}" "$@"
            """,
        )
        write_executable(
            repo / "bin/python3",
            f"""
            case "$*" in
                *check_env.py*) exit 1 ;;
                "-m venv "*) mkdir -p "$3/bin" && cp "{repo}/venv_python" "$3/bin/python"; exit ;;
            esac
            exec "{sys.executable}" "$@"
            """,
        )
        (repo / "pip_status").write_text("0")
        (repo / "pip_says").write_text("")
        return repo

    def set_up(self, repo: Path) -> tuple[int, list[str]]:
        """Start once; the status, and what pip was asked."""
        (repo / "pip.log").write_text("")
        result = run(repo, "succeed", "--help")
        return result.returncode, (repo / "pip.log").read_text().splitlines()

    def test_installs_once_with_everything_pinned(self, bare: Path) -> None:
        status, installs = self.set_up(bare)
        assert status == 0
        assert len(installs) == 1
        for wanted in ("scripts/constraints.txt", "torch>=2.11", "liger-kernel>=0.8.5", "pytest>="):
            assert wanted in installs[0]
        assert self.set_up(bare) == (0, [])

    def test_tells_what_is_fetched_and_leaves_the_rest_to_a_log(self, bare: Path) -> None:
        names = [f"name{i}" for i in range(21)]
        wheels = [f"  Downloading {name}-1.0-py3-none-any.whl (900.5 kB)" for name in names]
        said = [f"Collecting {name}" for name in names] + ["  Downloading name0-1.0-py3-none-any.whl.metadata (9 MB)"]
        said += ["Collecting torch", *wheels, "Downloading torch-2.13.0-cp311-cp311-linux.whl (532.1 MB)"]
        (bare / "pip_says").write_text(
            "\n".join([*said, f"Installing collected packages: {', '.join(names)}, torch\n"])
        )
        result = run(bare, "succeed", "--help")
        lines = result.stderr.splitlines()
        assert lines[0].startswith(f"Setting up {bare}/.venv with Python 3.")
        assert lines[1].startswith("Fetching torch numpy tokenizers")
        assert lines[1].endswith(f"pip's own words go to {bare}/.venv/pip.log")
        assert lines[2:5] == [
            "20 of 22 packages, 18 MB: name19",
            "22 of 22 packages, 550 MB: torch",
            "Installing 22 packages, of which 22 were fetched: 550 MB",
        ]
        assert (bare / ".venv/pip.log").read_text() == (bare / "pip_says").read_text()

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (
                "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\nERROR: none found",
                "the package index cannot be reached: no network, or a proxy is needed; set HTTPS_PROXY to your proxy,"
                " or PIP_INDEX_URL to a mirror that this machine reaches",
            ),
            (
                "SSLError('certificate verify failed') in HTTPSConnectionPool",
                "the package index has a certificate that is not known here; set PIP_CERT to your proxy's",
            ),
            ("ERROR: [Errno 28] No space left on device", "the disk is full; make room, here or where TMPDIR is"),
            ("ERROR: No matching distribution found for x", "ERROR: No matching distribution found for x; see the log"),
        ],
        ids=["no network", "certificate", "full disk", "other"],
    )
    def test_a_failure_is_one_line_with_what_to_do(self, bare: Path, said: str, why: str) -> None:
        (bare / "pip_status").write_text("1")
        (bare / "pip_says").write_text(said + "\n")
        result = run(bare, "succeed", "--help")
        assert result.returncode == 1
        assert result.stderr.splitlines()[2:] == [
            f"Setting up {bare}/.venv failed: {why}. Then run the same command again. pip's log: {bare}/.venv/pip.log"
        ]

    @pytest.mark.parametrize("listed", ["GPU 0: one", ""])
    def test_takes_the_torch_that_was_tested_on_such_a_device(self, bare: Path, listed: str) -> None:
        write_executable(bare / "bin/nvidia-smi", f"echo {listed}")
        has_gpu = bool(listed) or any(Path("/dev").glob("nvidia[0-9]*"))
        _, installs = self.set_up(bare)
        assert ("scripts/constraints-gpu.txt" in installs[0]) == has_gpu
        assert ("scripts/constraints-cpu.txt" in installs[0]) != has_gpu

    def test_installs_again_when_what_is_pinned_changes(self, bare: Path) -> None:
        self.set_up(bare)
        with (bare / "scripts/constraints.txt").open("a") as constraints:
            constraints.write("numpy==2.0\n")
        assert len(self.set_up(bare)[1]) == 1
        assert self.set_up(bare) == (0, [])

    def test_starts_afresh_after_an_interruption(self, bare: Path) -> None:
        (bare / "pip_status").write_text("1")
        assert self.set_up(bare)[0] == 1
        half_installed = bare / ".venv/lib"
        half_installed.mkdir()
        (bare / "pip_status").write_text("0")
        status, installs = self.set_up(bare)
        assert (status, len(installs)) == (0, 1)
        assert not half_installed.exists()

    def test_replaces_an_environment_whose_python_is_gone(self, bare: Path) -> None:
        self.set_up(bare)
        (bare / ".venv/bin/python").unlink()
        assert len(self.set_up(bare)[1]) == 1
        assert (bare / ".venv/bin/python").exists()

    def test_fills_an_environment_that_the_user_made(self, bare: Path) -> None:
        write_executable(bare / ".venv/bin/python", (bare / "venv_python").read_text())
        own = bare / ".venv/own"
        own.touch()
        (bare / "pip_status").write_text("1")
        assert self.set_up(bare)[0] == 1
        (bare / "pip_status").write_text("0")
        status, installs = self.set_up(bare)
        assert (status, len(installs)) == (0, 1)
        assert own.exists()

    def test_requirements_that_cannot_be_read_are_told_and_nothing_is_installed(self, bare: Path) -> None:
        (bare / "pyproject.toml").write_text("[project")
        (bare / "pip.log").touch()
        result = run(bare, "succeed", "--help")
        assert result.returncode == 1
        assert f"{bare}/pyproject.toml does not say what to install." in result.stderr
        assert (bare / "pip.log").read_text() == ""

    def test_an_active_python_with_the_packages_is_used(self, repo: Path) -> None:
        assert run(repo, "succeed", "--help").returncode == 0
        assert not (repo / ".venv").exists()

    def test_every_python_that_is_looked_for_is_tested_and_named_by_the_package(self) -> None:
        places = {
            "scripts/setup_env.sh": r"python(3\.\d+)",
            "pyproject.toml": r"Python :: (3\.\d+)",
            ".github/workflows/test.yml": r'"(3\.\d+)"',
        }
        found = [sorted(re.findall(pattern, (REPO / place).read_text())) for place, pattern in places.items()]
        assert found == [["3.11", "3.12", "3.13", "3.14"]] * 3

    def test_missing_and_old_packages_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "scripts").mkdir()
        check = shutil.copy(REPO / "scripts/check_env.py", tmp_path / "scripts")
        (tmp_path / "pyproject.toml").write_text(
            '[project]\ndependencies = ["pytest>=1.0", "no-such-package>=1", "torch>=99.1"]\n'
            '[project.optional-dependencies]\nextra = ["numpy>=9999"]\n'
        )
        result = subprocess.run([sys.executable, check, "extra"], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        missing, torch, numpy = result.stderr.splitlines()
        assert missing == "no-such-package is not installed"
        assert torch.endswith("is older than 99.1")
        assert numpy.startswith("numpy ")
