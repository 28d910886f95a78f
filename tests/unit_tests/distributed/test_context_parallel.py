"""The sequence cut over context ranks, and the attention over it; whole models are in test_parallelize.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.distributed.context_parallel import (
    ContextParallelAttention,
    ContextSharder,
    shard_sequence,
)


def test_shards_partition_the_sequence() -> None:
    tokens = torch.randint(100, (3, 24))
    seen = torch.full_like(tokens, -1)
    for rank in range(4):
        (local,), positions = shard_sequence([tokens], cp_rank=rank, cp_degree=4)
        assert local.shape == positions.shape == (3, 6)
        seen.scatter_(1, positions, local)
    torch.testing.assert_close(seen, tokens)


def test_ranks_have_equal_work() -> None:
    positions = [shard_sequence([torch.zeros(1, 24)], cp_rank=rank, cp_degree=3)[1] for rank in range(3)]
    assert len({int((p + 1).sum()) for p in positions}) == 1  # a query at position p attends to p + 1 keys


def test_a_length_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="4 divides, got 30"):
        shard_sequence([torch.zeros(1, 30)], cp_rank=0, cp_degree=2)


def whole() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, S, E), k and v (B, K, S, E), and the gradient of what they give."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, heads, 24, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v, grad


def attend_on_ranks(backend: str) -> tuple[Tensor, list[Tensor]]:
    """This rank's positions, the output there and the gradients of q, k and v."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    attention = ContextParallelAttention(mesh)
    _, positions, _ = ContextSharder(mesh)(torch.zeros(1, 24), torch.arange(24)[None])
    q, k, v, grad = (x.detach()[:, :, positions[0]].requires_grad_() for x in whole())
    out = torch.compile(attention, fullgraph=True, backend=backend)(q, k, v)
    return positions[0], [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize(("degree", "backend"), [(2, "aot_eager"), (3, "eager")])
def test_attention_of_ranks_is_that_of_the_whole_sequence(degree: int, backend: str) -> None:
    q, k, v, grad = whole()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = [out, *torch.autograd.grad(out, (q, k, v), grad)]
    for positions, got in run_processes(attend_on_ranks, degree, backend):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y[:, :, positions], rtol=1e-5, atol=1e-6)
