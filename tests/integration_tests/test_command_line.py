"""Commands as a user types them train as one process does: loss and gradient norm of the last step, in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
SEQ_LEN, SEQUENCES = 64, 8
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
ONE_PROCESS = "./run_train.sh --training.local_batch_size 8"
COMMANDS = [
    "NGPU=2 ./run_train.sh --parallelism.pipeline_parallel_degree=2 --training.local_batch_size=8"
    " --parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
    f"NGPU=4 ./run_train.sh --parallelism.tensor_parallel_degree 2 --training.local_batch_size 2 {FUSED}"
    " --activation_checkpoint.mode full",
]


def last_step(command: str, folder: Path) -> dict[str, float]:
    """Type the command, with what makes the run a small one behind it, and read what it says of its last step."""
    small = (
        f"--job.dump_folder {folder} --training.dataset_path {REPO}/LICENSE --training.seq_len {SEQ_LEN}"
        f" --training.global_batch_size {SEQUENCES} --training.steps 3 --training.seed 3"
    )
    removed = ("NGPU", "CONFIG_FILE", "LOG_RANK", "PYTHONPATH", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        ["bash", "-c", f"{command} {small}"],
        cwd=REPO,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert ("fused linear cross entropy" in result.stdout) == (FUSED in command)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return last_step(ONE_PROCESS, tmp_path_factory.mktemp("one_process"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(" ", "_"))
def test_a_command_trains_as_one_process_does(command: str, tmp_path: Path, expected: dict[str, float]) -> None:
    last = last_step(command, tmp_path)
    assert (last["step"], last["n_tokens_seen"]) == (3, 3 * SEQUENCES * SEQ_LEN)
    for name in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert last[name] == pytest.approx(expected[name], rel=1e-5), name
