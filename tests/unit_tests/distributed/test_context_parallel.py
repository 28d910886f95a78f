"""The sequence cut over context ranks, and the attention over it; whole models are in test_parallelize.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.document_mask import get_documents
from torchtitan.distributed.context_parallel import (
    ContextParallelAttention,
    ContextSharder,
    shard_sequence,
)
from torchtitan.protocols.sequences import Documents


def test_shards_partition_the_sequence() -> None:
    tokens = torch.randint(100, (3, 24))
    seen = torch.full_like(tokens, -1)
    for rank in range(4):
        local, positions = shard_sequence([tokens, torch.arange(24).expand(3, -1)], cp_rank=rank, cp_degree=4)
        assert local.shape == positions.shape == (3, 6)
        seen.scatter_(1, positions, local)
    torch.testing.assert_close(seen, tokens)


def test_ranks_have_equal_work() -> None:
    positions = [shard_sequence([torch.arange(24)[None]], cp_rank=rank, cp_degree=3)[0] for rank in range(3)]
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


def some_documents() -> tuple[Tensor, Documents]:
    """The number of each token's document, (B, S), and where they are: some in one chunk, some over many."""
    begins = torch.zeros(2, 24, dtype=torch.bool)
    begins[0, [0, 2, 9, 10, 23]] = begins[1, [0, 17]] = True
    return begins.cumsum(1), get_documents(begins)


def attend_on_ranks(backend: str) -> tuple[Tensor, list[list[Tensor]]]:
    """This rank's positions; without and with documents, the output there and the gradients of q, k and v."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    attention = torch.compile(ContextParallelAttention(mesh), fullgraph=True, backend=backend)
    _, positions, _ = ContextSharder(mesh)(torch.zeros(1, 24), torch.arange(24)[None])
    results = []
    for documents in (None, some_documents()[1]):
        q, k, v, grad = (x.detach()[:, :, positions[0]].requires_grad_() for x in whole())
        out = attention(q, k, v, documents)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    return positions[0], results


@pytest.mark.parametrize(("degree", "backend"), [(2, "aot_eager"), (3, "eager")])
def test_attention_of_ranks_is_that_of_the_whole_sequence(degree: int, backend: str) -> None:
    q, k, v, grad = whole()
    numbers, _ = some_documents()
    same_document = numbers[:, None, :, None] == numbers[:, None, None, :]
    expected = []
    for visible in (torch.ones(2, 1, 24, 24, dtype=torch.bool), same_document):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.tril(), enable_gqa=True)
        expected.append([out, *torch.autograd.grad(out, (q, k, v), grad)])
    for positions, got in run_processes(attend_on_ranks, degree, backend):
        for x, y in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(x, y[:, :, positions], rtol=1e-5, atol=1e-6)
