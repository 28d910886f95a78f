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
    attend_to_prefix,
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


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_kernels_align_the_mask_to_the_bottom_right(head_dim: int, dtype: torch.dtype, compiled: bool) -> None:
    """Both kernels that make no mask, with grouped heads and strided keys, against a masked product in float64."""
    heads, kv_heads, length, prefix = 4, 2, 128, 384
    q = torch.randn(2, heads, length, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    kv = torch.randn(prefix + 128, 2, 2, kv_heads, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn_like(q)

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.permute(1, 2, 3, 0, 4)[..., :prefix, :].unbind()
        return attend_to_prefix(q, k, v)

    def masked(q: Tensor, kv: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in kv.permute(1, 2, 3, 0, 4)[..., :prefix, :])
        visible = torch.ones(length, prefix, dtype=torch.bool, device="cuda").tril(prefix - length)
        scores = (q @ k.transpose(2, 3) / head_dim**0.5).masked_fill(~visible, float("-inf"))
        return scores.softmax(-1) @ v

    run = torch.compile(attend, fullgraph=True) if compiled else attend
    out = run(q, kv)
    got = [out, *torch.autograd.grad(out, (q, kv), grad)]
    q64, kv64 = (x.detach().double().requires_grad_() for x in (q, kv))
    out64 = masked(q64, kv64)
    expected = [out64, *torch.autograd.grad(out64, (q64, kv64), grad.double())]
    # float32 kernels may use TF32-like splits; bf16 has 8 bits
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for name, x, y in zip(("out", "dq", "dkv"), got, expected, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.gpu
def test_gpu_memory_is_linear_in_the_sequence() -> None:
    q, k, v = (torch.randn(1, 1, 32768, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_to_prefix(q[:, :, 16384:], k, v).sum().backward()
    a_mask = 16384 * 32768
    assert torch.cuda.max_memory_allocated() - before < a_mask / 8
