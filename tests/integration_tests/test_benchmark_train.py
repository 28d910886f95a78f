"""scripts/benchmark_train.py over several processes, which measure once and wait for nobody."""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.finished_run import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As one of two processes sees it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return load_script("benchmark_train")


@pytest.mark.parametrize(
    "options", ["--rows a b --batches 4", "--rows a --batches 4 8", "--rows a --batches 4 --largest"]
)
def test_a_second_measurement_is_refused(
    options: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "measure", None)
    monkeypatch.setattr(sys, "argv", ["benchmark_train.py", "--out", str(tmp_path), *options.split()])
    with pytest.raises(SystemExit):
        script.main()
    assert "several processes measure one of --rows at one of --batches" in capsys.readouterr().err


def test_out_of_memory_on_one_rank_ends_it_at_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(config: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(script, "Trainer", run_out)
    monkeypatch.setattr(script.os, "_exit", sys.exit)
    args = Namespace(model="llama3", flavor="debugmodel", seq_len=32, seed=0, out=tmp_path, compile=False)
    with pytest.raises(SystemExit):
        script.measure("standard", [], 4, args)
    assert capsys.readouterr().out.endswith("out of memory on rank 1\n")
