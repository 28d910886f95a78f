"""Async tensor parallel's operators give what collectives and products give, however late the other ranks are."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integration_tests.test_restart_gpus import needs
from tests.integration_tests.tiny_runs import join_group, serve_store, start
from torchtitan.distributed.async_tensor_parallel import Half, gather_and_multiply, multiply_and_exchange

WIDTH = 64
SHAPES = ((2, 8), (1, 64), (3, 200), (4, 512), (2, 8))
"""Of a rank's part (B, S): the workspace grows with them, and is used in part again."""
DTYPES = (torch.bfloat16, torch.float32)


def draw(*shape: int, seed: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros and ones, so that their products are whole numbers which bfloat16 has."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(2, shape, generator=generator).to(device, dtype)


def check(i: int, rank: int, ranks: int, device: torch.device) -> bool:
    """Whether both operators gave this rank what they should."""
    (batch, length), dtype, dim = SHAPES[i // 2 % len(SHAPES)], DTYPES[i % 2], i // 3 % 2
    group = dist.group.WORLD.group_name

    def mine(*shape: int, of: int = rank, salt: int = 0) -> Tensor:
        return draw(*shape, seed=10 * i + salt, rank=of, dtype=dtype, device=device)

    weights = [mine(WIDTH, 24, salt=1), mine(WIDTH, 40, salt=2).t().contiguous().t()]
    whole, *products = gather_and_multiply(mine(batch, length, WIDTH), weights, dim, ranks, group)
    expected = torch.cat([mine(batch, length, WIDTH, of=of) for of in range(ranks)], dim)
    right = torch.equal(whole, expected)
    for product, weight in zip(products, weights, strict=True):
        right &= torch.equal(product, (expected.flatten(0, 1).float() @ weight.float()).to(dtype))

    sizes = (24, 40)
    rows = batch * length * ranks

    def of_rank(other: int) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [mine(rows, size, of=other, salt=3 + j) for j, size in enumerate(sizes)]
        return inputs, [mine(size, WIDTH, of=other, salt=5 + j) for j, size in enumerate(sizes)]

    sequences = batch * ranks if dim == 0 else batch
    results = multiply_and_exchange(*of_rank(rank), sequences, dim, ranks, group)
    for other in range(ranks):
        total = sum(x.float() @ weight.float() for x, weight in zip(*of_rank(other), strict=True)).to(dtype)  # type: ignore[union-attr]
        right &= torch.equal(results[other], total.unflatten(0, (sequences, -1)).chunk(ranks, dim)[rank])
    return right


def stress(rank: int, ranks: int, port: int, on_gpus: bool, count: int, folder: Path) -> None:
    """Leave in `folder` how many rounds were wrong: without barriers, and with them."""
    device = join_group(rank, ranks, port, on_gpus=on_gpus)

    def count_wrong() -> int:
        wrong = 0
        for i in range(count):
            if i % ranks == rank:  # the others are early
                torch.cuda._sleep(5_000_000) if on_gpus else time.sleep(0.002)
            wrong += not check(i, rank, ranks, device)
        return wrong

    found = count_wrong()
    become: Any = Half.__init__

    def without_barrier(self: Half, *args: Any, **kwargs: Any) -> None:
        become(self, *args, **kwargs)
        self.barrier = lambda: None

    Half.__init__ = without_barrier  # type: ignore[method-assign]
    noticed = count_wrong()
    (folder / f"rank{rank}").write_text(f"{found} {noticed}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("on_gpus", "ranks", "count"),
    [
        pytest.param(False, 2, 20, id="cpu2"),
        *(pytest.param(True, ranks, 100, id=f"cuda{ranks}", marks=needs(ranks)) for ranks in (2, 4)),
    ],
)
def test_operators_give_what_collectives_and_products_give(
    tmp_path: Path, on_gpus: bool, ranks: int, count: int, record_property: Callable[[str, object], None]
) -> None:
    store = serve_store()
    start(stress, ranks, ranks, store.port, on_gpus, count, tmp_path)
    found = [tuple(map(int, (tmp_path / f"rank{rank}").read_text().split())) for rank in range(ranks)]
    record_property("wrong", sum(wrong for wrong, _ in found))
    record_property("wrong_without_barriers", sum(noticed for _, noticed in found))
    assert all(wrong == 0 for wrong, _ in found), found
    if on_gpus:
        assert any(noticed > 0 for _, noticed in found), f"{found}: without barriers nothing was wrong either"
