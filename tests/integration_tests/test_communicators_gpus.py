"""How many communicators NCCL makes for a run: of all ranks, and of an axis; none for axes of one rank, nor twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration_tests.lives import OPTIONS, REPO, TIMEOUT_S, write_data


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("axis", ["data_parallel_shard", "data_parallel_replicate", "tensor_parallel"])
def test_a_rank_is_in_one_of_all_ranks_and_one_of_its_axis(tmp_path: Path, axis: str) -> None:
    write_data(tmp_path / "data.jsonl")
    options = f"{OPTIONS} --training.steps 2 --training.dataset_path {tmp_path}/data.jsonl"
    options += f" --job.dump_folder {tmp_path}/run --parallelism.{axis}_degree 2"
    told = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT", "NCCL_DEBUG_FILE": f"{tmp_path}/nccl.%p"}
    command = [sys.executable, "-m", "torchtitan.launch", "--nproc_per_node", "2", *options.split()]
    subprocess.run(command, cwd=REPO, env=os.environ | told, check=True, timeout=TIMEOUT_S)
    counts = [file.read_text().count("Init COMPLETE") for file in tmp_path.glob("nccl.*")]
    assert len(counts) == 2
    assert all(1 <= count <= 2 for count in counts), counts
