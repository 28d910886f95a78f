"""--dry_run tells what a run will be, for any number of ranks, and starts nothing."""

import json
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.config.degrees import ParallelDims
from torchtitan.distributed.mesh import AXES, build_mesh
from torchtitan.launch import dry_run, launcher
from torchtitan.models.qwen3 import hf_config, qwen3_flavors

SMALL = ["--training.seq_len", "32", "--training.local_batch_size", "2"]


def test_a_run_of_many_ranks_is_told_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = ["--parallelism.pipeline_parallel_degree", "2", "--parallelism.tensor_parallel_degree", "2"]
    assert launcher.main(["--dry_run", "--nproc", "512", *layout, *SMALL]) == 0
    said = capsys.readouterr().out
    for part in (
        "Layout: 512 ranks, pp 2 x dp_shard 128 x tp 2",
        "  ranks  258 to  259: pp 1, dp_shard 1, tp 0 to 1",
        "  pp 0 holds tok_embeddings, layers 0 to 2",
        "  pp 1 holds layers 3 to 5, norm, output",
        "A step: 256 sequences of 32 tokens, 8,192 in all; 128 rank(s) read 2 at a time, 1 time(s)",
        "Using the standard cross entropy loss",
        "Estimated peak memory per device: ",
        "the first batch of rank 0 has 64 tokens to learn from in 64:",
        "All is there for the first step. Nothing was started.",
    ):
        assert part in said
    assert list(tmp_path.iterdir()) == []


def test_every_rank_stands_where_the_mesh_has_it() -> None:
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=3, cp=1, tp=2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=dims.world_size)
    try:
        places = build_mesh(dims, "cpu")["hsdp"]._get_root_mesh().mesh.tolist()
    finally:
        dist.destroy_process_group()
    lines = list(dry_run.layout(dims))[1:]
    assert len(lines) == 12
    for line in lines:
        first, last = map(int, re.findall(r"\d+", line.partition(":")[0]))
        at = {name: int(place) for name, place in re.findall(r"(\w+) (\d+)", line.partition(":")[2]) if name in AXES}
        row = places[at["pp"]][at["dp_replicate"]][at["dp_shard"]][0]
        assert (row[0], row[-1]) == (first, last)


def test_what_is_missing_does_not_hide_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--model.tokenizer_path", str(tmp_path / "none"), "--training.dataset_path", str(tmp_path / "nothing")]
    fused = "--liger_kernel.enable_fused_linear_cross_entropy"
    assert launcher.main(["--dry_run", "--nproc", "4", *missing, *SMALL, fused]) == 1
    said = capsys.readouterr().out
    assert "Layout: 4 ranks, dp_shard 4\n  ranks    0 to    3: dp_shard 0 to 3\n" in said
    assert "Using Liger-Kernel fused" in said and "Estimated peak memory" in said
    assert said.count("Missing here: ") == 2 and said.endswith("Nothing was started.\n")


def test_a_model_of_hugging_face_is_the_one_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config.write(qwen3_flavors["debugmodel"])))
    assert launcher.main(["--dry_run", "--model.hf_folder", str(tmp_path), *SMALL]) == 1  # it has no tokenizer
    assert f"Model: {tmp_path}, 5,234,688 parameters\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "4"], "--nproc 4 is for --dry_run"),
        (["--dry_run", "--nproc", "6", "--parallelism.tensor_parallel_degree", "4"], "tensor_parallel_degree"),
    ],
)
def test_mistakes_are_told_as_for_a_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(arguments) != 0
    assert message in capsys.readouterr().err
