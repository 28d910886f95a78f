import gzip
import json
from pathlib import Path

import pytest
import torch

from torchtitan.config.sections import Profiling
from torchtitan.tools.profiling import maybe_profile

CPU = torch.device("cpu")


def run_steps(profiling: Profiling, folder: Path, *, steps: int, start_step: int = 0) -> None:
    with maybe_profile(profiling, str(folder), device=CPU, rank=0, start_step=start_step) as step_done:
        for _ in range(steps):
            torch.ones(8, 8) @ torch.ones(8, 8)
            step_done()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("freq", "start_step", "traced"),
    [(4, 0, [4, 8]), (2, 0, [2, 4, 6, 8]), (1, 0, list(range(1, 10))), (6, 20, [24]), (4, 3, [4, 8, 12]), (10, 0, [])],
)
def test_one_step_of_every_profile_freq_is_traced(
    tmp_path: Path, freq: int, start_step: int, traced: list[int]
) -> None:
    profiling = Profiling(enable_profiling=True, profile_freq=freq, save_traces_folder="traces")
    run_steps(profiling, tmp_path, steps=9, start_step=start_step)
    assert names(tmp_path) == sorted(f"traces/step_{step}/rank0_trace.json.gz" for step in traced)
    for path in tmp_path.rglob("*.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any("aten::mm" in event.get("name", "") for event in events)


def test_nothing_is_written_unless_asked_for_of_this_rank(tmp_path: Path) -> None:
    run_steps(Profiling(profile_freq=1), tmp_path, steps=3)
    run_steps(Profiling(enable_profiling=True, profile_freq=1, ranks=[1, 2]), tmp_path, steps=3)
    assert names(tmp_path) == []


@pytest.mark.parametrize("left", [None, "", '{"traceEvents": [{"ph"'])
def test_a_trace_that_a_full_disk_lacks_or_cuts_is_not_called_written(
    tmp_path: Path, left: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The profiler itself says nothing, as here."""
    caplog.set_level("INFO")
    monkeypatch.setattr(
        torch.profiler.profile, "export_chrome_trace", lambda _, path: left is not None and Path(path).write_text(left)
    )
    run_steps(Profiling(enable_profiling=True, profile_freq=1), tmp_path, steps=1)
    assert "rank0_trace.json.gz was not written: it is missing or cut; is the disk full?" in caplog.text
    assert "Wrote" not in caplog.text


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    run_steps(Profiling(enable_profiling=True, profile_freq=1, save_traces_folder="file/in"), tmp_path, steps=1)
    assert "rank0_trace.json.gz was not written: Not a directory" in caplog.text


def test_memory_snapshots_without_a_gpu_say_that_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_steps(Profiling(enable_memory_snapshot=True, profile_freq=1), tmp_path, steps=2)
    assert "no snapshot is written" in caplog.text
    assert names(tmp_path) == []


@pytest.mark.gpu
def test_memory_snapshots_at_the_frequency_and_out_of_memory(tmp_path: Path) -> None:
    profiling = Profiling(enable_memory_snapshot=True, profile_freq=2, save_memory_snapshot_folder="memory")
    device = torch.device("cuda", torch.cuda.current_device())

    def run_out_of_memory() -> None:
        with maybe_profile(profiling, str(tmp_path), device=device, rank=0, start_step=0) as step_done:
            for _ in range(3):
                torch.ones(8, device=device)
                step_done()
            torch.empty(2**60, dtype=torch.int8, device=device)

    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory()
    assert names(tmp_path) == [
        "memory/step_2/rank0_memory_snapshot.pickle",
        "memory/step_4_out_of_memory/rank0_memory_snapshot.pickle",
    ]
