"""The arithmetic of the head: the numbers of the design, the buffers that the loss really makes, the page's table."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from scripts.head_cost_table import get_head_cost, get_table
from torchtitan.components.loss import VocabShard, fused_linear_cross_entropy
from torchtitan.memory.trace import MemoryTrace

LLAMA_8B = {"vocab_size": 128256, "dim": 4096, "num_tokens": 8192}


def test_bytes_moved_at_tp_8() -> None:
    """117 MB where gathering the weight would move 1839 MB."""
    sharded, gathered = (
        get_head_cost(**LLAMA_8B, tp_degree=8),
        get_head_cost(**LLAMA_8B, tp_degree=8, gather_weight=True),
    )
    statistics = 12 * 8192 * 7
    assert round((sharded.moved - statistics) / 1e6) == 117
    assert round(gathered.moved / 1e6) == 1839
    assert statistics < 0.01 * sharded.moved


def test_one_rank_moves_nothing() -> None:
    cost = get_head_cost(**LLAMA_8B)
    assert (cost.moved, cost.weight) == (0, 128256 * 4096 * 2)
    assert cost == get_head_cost(**LLAMA_8B, gather_weight=True)


def test_tensor_parallel_divides_memory_and_gathering_does_not() -> None:
    alone = get_head_cost(**LLAMA_8B)
    sharded, gathered = (
        get_head_cost(**LLAMA_8B, tp_degree=8),
        get_head_cost(**LLAMA_8B, tp_degree=8, gather_weight=True),
    )
    assert 8 * sharded.weight == alone.weight
    assert 8 * sharded.all_logits == alone.all_logits
    assert gathered.weight == alone.weight
    assert get_head_cost(vocab_size=101, dim=8, num_tokens=4, tp_degree=2).weight == 51 * 8 * 2


@pytest.mark.parametrize("budget_rows", [1000, 256, 130, 40, 7])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_are_the_buffers_that_the_loss_makes(budget_rows: int, num_ranks: int) -> None:
    num_tokens, dim, rows = 300, 8, 1001
    budget = budget_rows * rows * 4
    hidden = torch.empty(num_tokens, dim, device="meta", requires_grad=True)
    weight = torch.empty(rows, dim, device="meta", requires_grad=True)
    labels = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    trace = MemoryTrace()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        shard = (
            VocabShard(0, dist.group.WORLD, rows_per_rank=rows, vocab_size=num_ranks * rows) if num_ranks > 1 else None
        )
        with trace:
            fused_linear_cross_entropy(hidden, weight, labels, budget_bytes=budget, shard=shard)
    finally:
        dist.destroy_process_group()
    logits = get_head_cost(
        vocab_size=num_ranks * rows,
        dim=dim,
        num_tokens=num_tokens,
        tp_degree=num_ranks,
        bytes_per_element=4,
        budget_bytes=budget,
    ).logits
    assert logits in [storage.nbytes for storage in trace._made]
    assert logits <= max(budget, num_ranks * rows * 4)


def test_the_page_shows_this_table() -> None:
    page = Path(__file__).parents[3] / "docs" / "parallelism.md"
    assert get_table() in page.read_text(), "python scripts/head_cost_table.py prints the table"
