"""scripts/benchmark_train.py: over several processes, which measure once and wait for nobody; the largest batch."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.finished_run import load_script
from torchtitan.config.job_config import JobConfig

CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As one of two processes sees it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return load_script("benchmark_train")


@pytest.mark.parametrize(
    "options", ["--rows a b --batches 4", "--rows a --batches 4 8", "--rows a --batches 4 --largest"]
)
@pytest.mark.parametrize(
    ("world_size", "more", "who"), [("2", [], "several processes measure"), ("1", ["--trace"], "--trace is for")]
)
def test_a_second_measurement_is_refused(
    options: str,
    world_size: str,
    more: list[str],
    who: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "measure", None)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(sys, "argv", ["benchmark_train.py", "--out", str(tmp_path), *options.split(), *more])
    with pytest.raises(SystemExit):
        script.main()
    assert f"{who} one of --rows at one of --batches" in capsys.readouterr().err


def test_out_of_memory_on_one_rank_ends_it_at_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(config: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(script, "Trainer", run_out)
    monkeypatch.setattr(script.os, "_exit", sys.exit)
    args = Namespace(seq_len=32, seed=0, out=tmp_path, compile=False)
    with pytest.raises(SystemExit):
        script.measure("standard", [], 4, args)
    assert capsys.readouterr().out.endswith("out of memory on rank 1\n")


def test_the_largest_batch_is_searched_from_the_estimate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both directions; what was measured is in the file already when a later row is given up."""
    script = load_script("benchmark_train")
    tried: dict[str, list[int]] = {"standard": [], "fused": []}

    def measure(name: str, options: list[str], batch: int, args: Namespace) -> dict[str, Any] | None:
        assert options[:4] == ["--model.name", "qwen3", "--model.flavor", "debugmodel"]
        tried[name].append(batch)
        if len(tried["fused"]) == 4:
            raise KeyboardInterrupt
        fits = batch == 1 or batch <= tried[name][1] + (2 if name == "standard" else -2)
        row = {"row": name, "batch": batch, "tokens_per_second": 1.0, "mfu": None, **script.peak_memory(CPU)}
        return row if fits else None

    def find_largest(name: str, config: JobConfig, world_size: int, budget: float) -> None:
        assert (name, config.model.flavor, config.training.seq_len, world_size) == (
            "local_batch_size",
            "debugmodel",
            64,
            1,
        )
        is_auto = config.liger_kernel.enable_fused_linear_cross_entropy
        assert budget == (950 if is_auto else 1000)
        config.training.local_batch_size = 9 if is_auto else 5

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "get_capacity", lambda: 1000)
    monkeypatch.setattr(script, "find_largest", find_largest)
    options = ["--flavor", "qwen3/debugmodel", "--seq_len", "64", "--batches", "1", "--largest"]
    auto = "--activation_checkpoint.mode auto --activation_checkpoint.memory_share 0.95"
    options += ["--rows", "standard", f"fused --liger_kernel.enable_fused_linear_cross_entropy {auto}"]
    monkeypatch.setattr(sys, "argv", ["benchmark_train.py", "--out", str(tmp_path), *options])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert tried == {"standard": [1, 5, 6, 7, 8], "fused": [1, 9, 8, 7]}
    assert "largest batch: 7" in capsys.readouterr().out
    rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert [(row["row"], row["batch"]) for row in rows] == [
        *(("standard", batch) for batch in (1, 5, 6, 7)),
        ("fused", 1),
    ]
