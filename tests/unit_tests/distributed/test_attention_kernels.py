"""Attention in parts, by every kernel, against the whole in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan.distributed import attention_kernels
from torchtitan.distributed.attention_kernels import (
    attend,
    attend_backward,
    attend_to_prefix,
    choose_kernel,
    join_,
    report_kernel,
)

H, K, L = 4, 2, 128  # heads of queries, of keys; queries

Tensors = list[Tensor]


def draw(device: str, dtype: torch.dtype, head_dim: int, prefix: int) -> Tensors:
    """q, k, v and the gradient of the output, laid out as a model's: heads inside, keys strided."""
    q, grad = (torch.randn(2, L, H, head_dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = torch.randn(prefix + 32, 2, 2, K, head_dim, device=device, dtype=dtype)[:prefix].permute(1, 2, 3, 0, 4)
    return [q, k, v, grad]


def joined(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensors:
    """The output and the gradients of queries that see `before` keys and, causally, their own."""
    before = k.size(2) - L
    parts = [(slice(before), False), (slice(before, None), True)]
    joint, other = (attend(q, k[:, :, part], v[:, :, part], causal=causal) for part, causal in parts)
    join_(joint, other)
    out, lse = joint
    grads = [attend_backward(grad, q, k[:, :, part], v[:, :, part], out, lse, causal=causal) for part, causal in parts]
    (dq1, dk1, dv1), (dq2, dk2, dv2) = grads
    return [out, dq1 + dq2, torch.cat((dk1, dk2), dim=2), torch.cat((dv1, dv2), dim=2)]


def in_float64(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensors:
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    hidden = torch.ones(L, k.size(2), dtype=torch.bool, device=q.device).tril(k.size(2) - L).logical_not()
    scores = (q @ keys.transpose(2, 3) / q.size(3) ** 0.5).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ values
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def assert_close(got: Tensors, expected: Tensors, tolerance: float) -> None:
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_joined_parts_are_the_whole(dtype: torch.dtype, tolerance: float) -> None:
    tensors = draw("cpu", dtype, 20, prefix=3 * L)
    assert_close(joined(*tensors), in_float64(*tensors), tolerance)


@pytest.mark.parametrize("queries", [1, 40, L])
def test_attention_to_a_prefix_is_aligned_to_its_end(queries: int) -> None:
    q, k, v, grad = draw("cpu", torch.float32, 16, prefix=L + 9)
    expected = in_float64(q, k, v, grad)[0][:, :, -queries:]
    torch.testing.assert_close(attend_to_prefix(q[:, :, -queries:], k, v).double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_to_a_prefix_that_is_the_queries_own() -> None:
    q, k, v, grad = draw("cpu", torch.float32, 16, prefix=L)
    torch.testing.assert_close(attend_to_prefix(q, k, v).double(), in_float64(q, k, v, grad)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "warns"),
    [
        (SDPBackend.CUDNN_ATTENTION, (9, 0), torch.bfloat16, False),
        (SDPBackend.FLASH_ATTENTION, (9, 0), torch.bfloat16, True),
        (SDPBackend.FLASH_ATTENTION, (8, 0), torch.bfloat16, False),
        (SDPBackend.MATH, (8, 0), torch.bfloat16, True),
        (SDPBackend.MATH, (9, 0), torch.float32, False),
    ],
)
def test_the_log_names_the_kernel_and_warns_of_a_slow_one(
    kernel: SDPBackend,
    capability: tuple[int, int],
    dtype: torch.dtype,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(attention_kernels, "choose_kernel", lambda *_, **__: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "seq_len": 8}
    with caplog.at_level("INFO"):
        report_kernel(**sizes, dtype=dtype, device=torch.device("cpu"))
    assert attention_kernels.KERNELS[kernel] in caplog.text
    assert ("slower than it could be" in caplog.text) == warns


BACKENDS = [
    (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, 64, 1e-2),
    (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, 128, 1e-2),
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 64, 1e-2),
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 20, 1e-2),  # no kernel takes it as it is
    (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16, 64, 1e-2),
    (SDPBackend.EFFICIENT_ATTENTION, torch.float32, 128, 1e-5),  # which may split products as TF32 does
]


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype", "head_dim", "tolerance"), BACKENDS, ids=str)
def test_each_gpu_kernel_gives_parts_that_join(
    backend: SDPBackend, dtype: torch.dtype, head_dim: int, tolerance: float
) -> None:
    tensors = draw("cuda", dtype, head_dim, prefix=3 * L)
    with sdpa_kernel([backend, SDPBackend.MATH]):  # the second where the first does not take grouped heads
        if head_dim % 8 == 0:
            chosen = choose_kernel(tensors[0], *(x[:, :, :L] for x in tensors[1:3]), causal=True)
            assert chosen == (SDPBackend.MATH if backend == SDPBackend.EFFICIENT_ATTENTION else backend)
        assert_close(joined(*tensors), in_float64(*tensors), tolerance)


@pytest.mark.gpu
def test_gpu_memory_is_linear_in_the_sequence() -> None:
    q, k, v, grad = (
        torch.randn(1, 1, n, 64, device="cuda", dtype=torch.bfloat16) for n in (2**14, 2**15, 2**15, 2**14)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = attend(q, k, v, causal=False)
    attend_backward(grad, q, k, v, out, lse, causal=False)
    a_mask = 2**14 * 2**15
    assert torch.cuda.max_memory_allocated() - before < a_mask / 8
