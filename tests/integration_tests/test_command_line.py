"""A command as a user types it trains as one process does: loss and gradient norm of the last step, in float32.

One process by ./run_train.sh is README's first command, which test_docs.py runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchtitan.train
from tests.processes import FORKED

REPO = Path(__file__).parents[2]
SEQ_LEN, SEQUENCES = 64, 8
COMMAND = (
    "NGPU=2 ./run_train.sh --parallelism.tensor_parallel_degree=2 --training.local_batch_size=2"
    " --liger_kernel.enable_fused_linear_cross_entropy --activation_checkpoint.mode full"
)
ONE_PROCESS = "--job.config_file debug_model --training.local_batch_size 8"


def small(folder: Path) -> str:
    """What is put behind the options of a run."""
    return (
        f"--job.dump_folder {folder} --training.dataset_path {REPO}/LICENSE --training.seq_len {SEQ_LEN}"
        f" --training.global_batch_size {SEQUENCES} --training.steps 3 --training.seed 3"
    )


def read_last_step(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def train(options: list[str]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    sys.exit(torchtitan.train.main(options))


def test_a_command_trains_as_one_process_does(tmp_path: Path) -> None:
    removed = ("NGPU", "CONFIG_FILE", "LOG_RANK", "PYTHONPATH", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        ["bash", "-c", f"{COMMAND} {small(tmp_path / 'typed')}"],
        cwd=REPO,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "fused linear cross entropy" in result.stdout

    one = FORKED.Process(target=train, args=(f"{ONE_PROCESS} {small(tmp_path / 'one')}".split(),))
    one.start()
    one.join(300)
    assert one.exitcode == 0
    last, expected = read_last_step(tmp_path / "typed"), read_last_step(tmp_path / "one")
    assert (last["step"], last["n_tokens_seen"]) == (3, 3 * SEQUENCES * SEQ_LEN)
    for name in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert last[name] == pytest.approx(expected[name], rel=1e-5), name
