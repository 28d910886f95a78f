"""Functional collectives over NCCL, two under way at a time, whose inputs are dropped at once, give the right results.

With gloo two gathers under way break memory. Over NCCL an input that is dropped stays allocated: the work that
wait_tensor looks up by its output holds inputs and outputs (ProcessGroupNCCL's shelf) until the stream that waits has
been told to wait for the collective, or until the watchdog has seen it end. So the caching allocator gives their memory
only to kernels that run later. torch.distributed._functional_collectives itself keeps no input.

Where this package waits late, it holds the input all the same: the rows' statistics of the sharded loss
(components/loss/chunked_logits.py, `OverRanks._mine`), context attention's packed K and V and their gradients
(distributed/context_parallel.py, `packed` and `by_rank`, until the operator returns). DTensor's own redistribution, as
of the hidden states, drops its input and relies on the shelf.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integration_tests.test_restart_gpus import REHEARSAL, needs
from tests.integration_tests.tiny_runs import join_group, serve_store, start

collectives = torch.ops._c10d_functional
RANKS = 2
SIZES = (1, 7, 1_001, 65_537, 262_143, 1_048_577)
"""Elements of a rank's part."""
DTYPES = (torch.bfloat16, torch.float32)


def draw(i: int, rank: int, parts: int, device: torch.device) -> Tensor:
    """(parts * n,): small whole numbers, so that also bfloat16 adds them exactly."""
    size, dtype = SIZES[i % len(SIZES)], DTYPES[i // len(SIZES) % 2]
    return ((torch.arange(parts * size, device=device) + 13 * rank + 7 * i) % 61).to(dtype)


def begin(i: int, local: Tensor, group: str) -> Tensor:
    if i % 2:
        return collectives.reduce_scatter_tensor(local, "sum", RANKS, group)
    return collectives.all_gather_into_tensor(local, RANKS, group)


def expect(i: int, rank: int, device: torch.device) -> Tensor:
    if i % 2:
        return sum(draw(i, other, RANKS, device) for other in range(RANKS)).chunk(RANKS)[rank]  # type: ignore[union-attr]
    return torch.cat([draw(i, other, 1, device) for other in range(RANKS)])


def stress(rank: int, port: int, on_gpus: bool, count: int, depth: int, folder: Path) -> None:
    """Leave in `folder` what two stresses found; in the first, inputs are written to while they may be under way."""
    device = join_group(rank, RANKS, port, on_gpus=on_gpus)
    noticed = send_all(rank, device, 60, depth, overwrites=True)[0]
    found = send_all(rank, device, count, depth, overwrites=False)
    (folder / f"rank{rank}").write_text(" ".join(map(str, (noticed, *found))))
    dist.destroy_process_group()


def send_all(rank: int, device: torch.device, count: int, depth: int, *, overwrites: bool) -> tuple[int, int, int]:
    """How many results were wrong, and how often the memory of an input was given to a new tensor: before its
    collective was waited for, which is right only where that has ended, and after.
    """
    group = dist.group.WORLD.group_name
    wrong, early, later = torch.zeros((), dtype=torch.int64, device=device), 0, 0
    under_way: deque[tuple[int, int, Tensor]] = deque()
    ended: set[int] = set()
    for i in range(count + depth):
        if i >= depth:  # the oldest
            number, address, pending = under_way.popleft()
            wrong += (collectives.wait_tensor(pending) != expect(number, rank, device)).any()
            ended.add(address)
            del pending
        if i < count:
            local = draw(i, rank, RANKS if i % 2 else 1, device)
            if i % RANKS == rank:  # the other rank's collective waits, and what it does meanwhile goes on
                torch.cuda._sleep(100_000) if device.type == "cuda" else time.sleep(0.002)
            under_way.append((i, local.data_ptr(), begin(i, local, group)))
            if overwrites:
                local.fill_(99)
            size, dtype = local.shape, local.dtype
            del local  # its memory is asked for at once
            garbage = [torch.full(size, 99, dtype=dtype, device=device) for _ in range(4)]
            addresses = {tensor.data_ptr() for tensor in garbage}
            early += len(addresses & {address for _, address, _ in under_way})
            later += len(addresses & ended)
            del garbage
    return int(wrong.item()), early, later


@pytest.mark.parametrize(
    ("on_gpus", "count", "depth"),
    [
        pytest.param(False, 60, 1, id="cpu2", marks=REHEARSAL),  # gloo can have but one under way
        *(pytest.param(True, 6000, depth, id=f"cuda2-{depth}", marks=needs(2)) for depth in (2, 3)),
    ],
)
def test_results_are_right_though_the_memory_of_inputs_is_asked_for_at_once(
    tmp_path: Path, on_gpus: bool, count: int, depth: int, record_property: Callable[[str, object], None]
) -> None:
    store = serve_store()
    start(stress, RANKS, store.port, on_gpus, count, depth, tmp_path)
    for rank in range(RANKS):
        noticed, wrong, early, later = map(int, (tmp_path / f"rank{rank}").read_text().split())
        told = {"collectives": count, "wrong": wrong, "reused_early": early, "reused_later": later, "noticed": noticed}
        for name, value in told.items():
            record_property(name, value)
        assert wrong == 0, told
        assert later > 0, f"{told}: no memory was used again"
        assert noticed > 0, f"{told}: inputs that were written to gave right results too"
