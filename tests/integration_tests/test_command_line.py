"""Commands as a user types them train as one process does: the loss and the gradient norm of the last step, in float32.

Each rank reads documents of its own, so layouts agree only on what all of them have read: here a step is an epoch,
of a data set whose documents have the length of a sequence.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.components.tokenizer import build_tokenizer

REPO = Path(__file__).parents[2]
SEQ_LEN, SEQUENCES = 64, 8
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
ONE_PROCESS = "./run_train.sh --training.local_batch_size 8"
COMMANDS = [
    f"NGPU=2 ./run_train.sh --parallelism.tensor_parallel_degree 2 --training.local_batch_size 8 {FUSED}",
    "NGPU=2 ./run_train.sh --parallelism.context_parallel_degree 2 --training.local_batch_size 4"
    " --activation_checkpoint.mode full",
    "NGPU=2 ./run_train.sh --parallelism.pipeline_parallel_degree=2 --training.local_batch_size=8"
    " --parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
    f"NGPU=4 ./run_train.sh --parallelism.tensor_parallel_degree 2 --training.local_batch_size 2 {FUSED}",
    "NGPU=4 ./run_train.sh --parallelism.data_parallel_replicate_degree 2 --training.local_batch_size 2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of SEQ_LEN tokens each, between the ones of begin and end."""
    tokenizer = build_tokenizer(str(REPO / "tests/assets/tokenizer"))
    words = (REPO / "LICENSE").read_text().split()
    draw = random.Random(0)
    documents: list[str] = []
    while len(documents) < SEQUENCES:
        document = " ".join(draw.choices(words, k=SEQ_LEN // 3))
        while len(ids := tokenizer.encode(document, add_bos=True, add_eos=True)) < SEQ_LEN:
            document += " " + draw.choice(words)
        if len(ids) == SEQ_LEN:
            documents.append(document)
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def last_step(command: str, data: Path, folder: Path) -> dict[str, float]:
    """Type the command, with what makes the run a small one behind it, and read what it says of its last step."""
    small = (
        f"--job.dump_folder {folder} --training.dataset_path {data} --training.seq_len {SEQ_LEN}"
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
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return last_step(ONE_PROCESS, data, tmp_path_factory.mktemp("one_process"))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(" ", "_"))
def test_a_command_trains_as_one_process_does(
    command: str, data: Path, tmp_path: Path, expected: dict[str, float]
) -> None:
    last = last_step(command, data, tmp_path)
    assert (last["step"], last["n_tokens_seen"]) == (3, 3 * SEQUENCES * SEQ_LEN)
    for name in ("loss_metrics/global_avg_loss", "grad_norm"):
        assert last[name] == pytest.approx(expected[name], rel=1e-5), name
