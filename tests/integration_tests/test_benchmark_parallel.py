"""scripts/benchmark_parallel.py without GPUs: its processes, its report, and two of its parts for real, on tiny sizes.

The parts of parity and restart are tests themselves: test_parity_gpus.py and test_restart_gpus.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.finished_run import REPO, load_script
from tests.processes import is_running, wait_until


@pytest.fixture
def script() -> ModuleType:
    return load_script("benchmark_parallel")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two parts leave."""
    out = tmp_path_factory.mktemp("benchmark_parallel")
    command = [sys.executable, "scripts/benchmark_parallel.py", "--device", "cpu", "--nproc", "2", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([*command, "--only", "head", "profile"], cwd=REPO, env=environment, check=True, timeout=300)
    return out


def rows_of(out: Path, part: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["part"] == part]


def test_the_head_has_one_loss_and_right_gradients_whether_its_weight_is_gathered_or_not(
    out: Path, script: ModuleType
) -> None:
    in_tree, gathered = rows_of(out, "head")
    assert (in_tree["name"], gathered["name"]) == ("in-tree", "weight gathered")
    assert in_tree["loss"] == pytest.approx(gathered["loss"], rel=1e-6)
    for row in (in_tree, gathered):
        assert row["d_hidden_error"] < 1e-6 and row["d_weight_error"] < 1e-6  # against float32 autograd
        assert row["commit"] == script.get_commit()
        assert row["ms"] > 0 and row["x_floor"] == row["ms"] / row["floor_ms"]
    assert in_tree["moved_mb"] < gathered["moved_mb"]


def test_the_profiled_step_does_not_gather_the_heads_weight(out: Path) -> None:
    *collectives, note = rows_of(out, "profile")
    assert sum(row["count"] for row in collectives) > 10
    assert note["note"].endswith(
        "a rank's rows of the head's weight are 0.51 MB: none is as large, the weight was not gathered."
    )


def test_the_report_has_a_table_for_each_part(out: Path) -> None:
    report = (out / "report.md").read_text()
    head, profile = report.split("\n## ")[1:]
    assert head.startswith("head\n") and head.count("\n| 2 | 257 | ") == 2
    assert profile.startswith("profile\n") and "| gloo:all_gather | c10::BFloat16 |" in profile
    assert "Failed" not in report


@pytest.mark.parametrize(("largest", "is_fault"), [(99, False), (100, True)])
def test_a_collective_as_large_as_the_heads_rows_is_a_fault(script: ModuleType, largest: int, is_fault: bool) -> None:
    assert ("failed" in script.judge_weight([10, largest], 100)) == is_fault


def test_a_trace_without_collectives_shows_nothing(script: ModuleType) -> None:
    assert "failed" in script.judge_weight([], 100)


@pytest.fixture
def host(script: ModuleType, tmp_path: Path) -> Any:
    return script.Host("cpu", 2, script.SIZES["cpu"], out=tmp_path, limit_s=3)


def test_a_process_that_hangs_is_ended_with_those_that_it_started(host: Any, tmp_path: Path) -> None:
    # as torchrun starts its workers
    code = "import subprocess as s, sys; p = s.Popen(['sleep', '100'], start_new_session=True); print(p.pid); p.wait()"
    begin = time.monotonic()
    assert host.run("hangs", ["-ISu", "-c", code]) == "still running after 3 s; see logs/hangs.log"
    assert time.monotonic() - begin < 90  # of the 100 that it sleeps
    pid = int((tmp_path / "logs/hangs.log").read_text())
    wait_until(lambda: not is_running(pid), "the end of what was killed", 95 - (time.monotonic() - begin))


def test_a_part_that_fails_is_told_and_the_next_one_runs(
    script: ModuleType, host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(host: Any) -> Any:
        yield {"name": "two", "ms": 1.5, "tp": 2}
        yield {"name": "four", "failed": host.run("four", ["-c", "import sys; sys.exit(7)"])}

    def breaks(host: Any) -> Any:
        yield {"collective": "gather", "count": 3}
        raise KeyError("traceEvents")

    parts = {"head": fails, "profile": breaks, "train": lambda host: iter([{"name": "shard", "mfu": 0.5}])}
    monkeypatch.setattr(script, "PARTS", parts)
    monkeypatch.setattr(
        sys, "argv", ["benchmark_parallel.py", "--device", "cpu", "--out", str(tmp_path), "--only", *parts]
    )
    assert script.main() == 1
    report = (tmp_path / "report.md").read_text()
    assert "**Failed**: four: exit status 7; see logs/four.log" in report
    assert "| 2 | n/a | two | 1.50 | n/a |" in report
    assert "**Failed**: profile: KeyError: 'traceEvents'" in report and "| gather | n/a | n/a | 3 |" in report
    assert "| shard | n/a | n/a | n/a | 50.0% | n/a | n/a |" in report


def test_what_tests_recorded_is_read(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text("""<testsuites><testsuite>
        <testcase name="test_a[cuda2-tp2]"><properties><property name="x" value="1e-06"/></properties></testcase>
        <testcase name="test_a[cuda2-cp2]"><failure message="AssertionError: loss&#10;and more">...</failure></testcase>
        <testcase name="test_a[cuda4-tp2]"><skipped message="needs 4 GPUs"/></testcase>
    </testsuite></testsuites>""")
    assert list(script.read_tests(path)) == [
        {"name": "cuda2-tp2", "x": 1e-6},
        {"name": "cuda2-cp2", "failed": "AssertionError: loss"},
    ]
