"""The table of docs/parallelism.md is what the script counts, and what ranks that write really do."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scripts.simulate_scale import DOCUMENTED, PER_ENTRY, get_row, get_scale
from torchtitan.checkpoint.plan import Planner
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.write import CheckpointWriter


def test_the_page_shows_what_is_counted() -> None:
    page = (Path(__file__).parents[3] / "docs/parallelism.md").read_text()
    model, num_ranks = DOCUMENTED[0]
    assert get_row(model, num_ranks) in page, "python scripts/simulate_scale.py prints the table"
    assert all(f"| {model.upper()} | {num_ranks} | 10 |" in page for model, num_ranks in DOCUMENTED[1:])
    assert not dist.is_initialized()


def test_a_rank_s_bytes_are_its_share_of_the_states() -> None:
    scale = get_scale("8b", 8)
    num_params, num_entries = 8_030_261_248, 3 * 291
    assert scale.bytes_written == scale.bytes_read == 12 * num_params // 8 + PER_ENTRY * num_entries


@pytest.mark.parametrize("shape", [(100,), (7, 11)])
def test_an_entry_takes_as_much_beside_its_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {"weight": torch.zeros(shape)}
    written = CheckpointWriter().write_file(tmp_path, 0, Planner(Ranks(alone=True)).plan(state), state)
    assert written.digest.num_bytes - state["weight"].nbytes == pytest.approx(PER_ENTRY, abs=100)
