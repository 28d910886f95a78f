"""`torchtitan compare` on finished runs, and with a stand-in for run_train.sh; test_docs.py runs it for real."""

import json
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

from torchtitan.cli import compare
from torchtitan.cli.main import main

# Writes a loss that depends on the options, as a run would.
RUN = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1:], [*sys.argv[2:], ""]))
print("ran with", *sys.argv[1:])
if options.get("--fail"):
    sys.exit(7)
folder = Path(options["--job.dump_folder"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(1, int(options["--training.steps"]) + 1):
        values = {"step": step, "loss_metrics/global_avg_loss": 1 / step + float(options.get("--add", 0))}
        values |= {"grad_norm": 1.0, "throughput(tps)": 100.0, "memory/max_reserved(GiB)": 2.0}
        file.write(json.dumps(values) + chr(10))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    run_train = tmp_path / "run_train.sh"
    (tmp_path / "run.py").write_text(RUN)
    run_train.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/run.py" "$@"\n')
    run_train.chmod(run_train.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(compare, "RUN_TRAIN", run_train)
    monkeypatch.chdir(tmp_path)
    return compare


def test_new_runs_start_anew_whatever_an_earlier_comparison_left(
    script: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--steps", "2", "--checkpoint.enable_checkpoint"]) == 0
    started = [line for line in capfd.readouterr().out.splitlines() if line.startswith("ran with")]
    assert len(started) == 2
    for line in started:
        assert line.index("--checkpoint.enable_checkpoint") < line.index("--checkpoint.no-enable_checkpoint")
        assert "--metrics.no-save_for_all_ranks" in line


def write_run(folder: Path, losses: dict[int, float], grad_norms: dict[int, float] | None = None) -> str:
    folder.mkdir(parents=True)
    lines = []
    for step, loss in losses.items():
        values = {"step": step, "loss_metrics/global_avg_loss": loss, "grad_norm": (grad_norms or {}).get(step, 1.0)}
        lines.append(values | {"throughput(tps)": 1000.0 * step, "memory/max_reserved(GiB)": 3.0 - step / 10})
    validation = {"step": 2, "validation_metrics/loss": 9.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, validation]))
    return str(folder)


def test_finished_runs_are_compared_where_both_have_steps(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run(tmp_path / "a", {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    b = write_run(tmp_path / "b", {2: 4.25, 3: 3.125, 4: 2.0, 5: 1.0}, grad_norms={4: 1.5})
    assert main(["compare", "--baseline", a, "--candidate", b, "--out", str(tmp_path / "out")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "first loss 5.0000 4.2500",
        "validation loss 9.0000 9.0000",
        "last loss 2.0000 1.0000",
        "tokens/s a device 4,000 5,000",
        "peak memory, GiB 2.90 2.80",
        "largest difference over 3 steps",
        "loss 0.25 at step 2",
        "gradient norm 0.5 at step 4",
    ):
        assert line in lines
    assert "<td>loss</td><td>0.25</td><td>2</td><td>3</td>" in (tmp_path / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--baseline", "a", "--candidate", "a", "--tolerence", "0.1"],
            "no run is started that would take --tolerence",
        ),
        (["--candidate", "--add '1"], 'argument --candidate: No closing quotation in "--add \'1"; expected options'),
    ],
)
def test_mistakes_in_the_arguments_are_said_before_any_run(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message in error


@pytest.mark.parametrize(("tolerance", "status"), [("0.1", 1), ("0.3", 0)])
@pytest.mark.parametrize("differs", ["loss", "grad_norm"])
def test_tolerance_decides_the_exit_status(
    script: ModuleType, tmp_path: Path, tolerance: str, status: int, differs: str
) -> None:
    a = write_run(tmp_path / "a", {1: 5.0, 2: 4.0})
    b = write_run(
        tmp_path / "b", {1: 5.0, 2: 4.2 if differs == "loss" else 4.0}, {2: 1.2} if differs != "loss" else None
    )
    assert main(["compare", "--baseline", a, "--candidate", b, "--tolerance", tolerance]) == status


def test_equal_runs_can_be_drawn(script: ModuleType, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {1: 5.0, 2: 4.0})
    assert main(["compare", "--baseline", a, "--candidate", a, "--tolerance", "0", "--out", str(tmp_path / "out")]) == 0


def test_two_configurations_are_run_with_one_seed(script: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "4", "--model.flavor", "1B", "--candidate", "--add 0.5", "--out", "out"]
    assert main(["compare", *arguments]) == 0
    assert main(["compare", *arguments]) == 0  # the second time the old metrics do not count
    out = capfd.readouterr().out
    shared = "ran with --training.steps 4 --training.seed 42 --metrics.log_freq 1 --model.flavor 1B"
    assert f"{shared} --job.dump_folder out/baseline " in out
    assert f"{shared} --add 0.5 --job.dump_folder out/candidate " in out
    assert "loss                           0.5   at step" in out
    assert len(Path("out/baseline/metrics.jsonl").read_text().splitlines()) == 4


def test_without_options_the_fused_loss_is_compared(script: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 0
    baseline, candidate = (line for line in capfd.readouterr().out.splitlines() if line.startswith("ran with"))
    assert "--liger_kernel.enable_fused_linear_cross_entropy" not in baseline
    assert "--liger_kernel.enable_fused_linear_cross_entropy" in candidate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidate", "--fail yes"], "candidate ended with exit status 7"),
        (["--baseline", "nowhere"], "nowhere/metrics.jsonl does not exist"),
        (["--baseline", "a", "--candidate", "b"], "no logged step in common"),
        (["--baseline", "a", "--candidate", "empty"], "holds no training step"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_run(tmp_path / "a", {1: 5.0})
    write_run(tmp_path / "b", {2: 5.0})
    write_run(tmp_path / "empty", {})
    assert main(["compare", *arguments]) == 1
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1
