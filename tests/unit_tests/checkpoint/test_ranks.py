"""How ranks come to one answer, in more of them than one has below it in the tree."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.checkpoint.ranks import FAN_OUT, Ranks
from torchtitan.config.errors import CheckpointError

NUM_RANKS = FAN_OUT + 4  # three of them below rank 1


def test_all_come_to_one_answer_over_few_sockets() -> None:
    results = run_processes(_come_to_answers, NUM_RANKS)
    everyone = [f"of {rank}" for rank in range(NUM_RANKS)]
    for rank, answers in enumerate(results):
        num_sockets = answers.pop("sockets")
        assert answers == {
            "gather": everyone,
            "gather_first": everyone if rank == 0 else None,
            "ask_first": "of 0",
            "together": "torn",
        }
        assert num_sockets <= FAN_OUT + 2, f"rank {rank} of {NUM_RANKS}"  # one of them listens


def _come_to_answers() -> dict[str, Any]:
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as init_distributed says
    before, rank = _count_sockets(), dist.get_rank()
    ranks = Ranks()
    assert _count_sockets() == before, "nothing is asked yet"

    def tear() -> None:
        if rank == NUM_RANKS - 1:
            raise CheckpointError("torn")

    with pytest.raises(CheckpointError) as together:
        ranks.together(tear)
    answers = {
        "gather": ranks.gather(f"of {rank}"),
        "gather_first": ranks.gather_first(f"of {rank}"),
        "ask_first": ranks.ask_first(lambda: f"of {rank}"),
        "together": str(together.value),
    }
    return answers | {"sockets": _count_sockets() - before}


def _count_sockets() -> int:
    num_sockets = 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since, as the folder itself is
            num_sockets += str(file.readlink()).startswith("socket:")
    return num_sockets
