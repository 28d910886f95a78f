"""Attention by the kernel that scaled_dot_product_attention would take, with the log-sum-exps that join its parts.

SDPA's kernels mask nothing or align the causal mask to the top left. A query that attends to a prefix and then, under
a causal mask, to its own chunk so takes two calls, whose results are joined by what each row's softmax divides by: with
lse_i the logarithm of the sum of exponentials over the keys of part i,

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2

Backward needs no split: a kernel that is given the joined out and lse computes the gradients of its part of the keys,
since the probabilities of a pair are exp(score - lse), and they enter the row's sum of gradients as out does.

Shapes: B batch, L queries, n keys, H query heads, K key/value heads, E head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from torchtitan.tools.logging import logger

aten = torch.ops.aten

KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "no one: products and a softmax, with all scores in memory",
}
PREFERS_CUDNN = ((9, 0), (10, 0))
"""The capabilities of GPUs on which torch takes cuDNN's kernel before others."""


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> SDPBackend:
    """The kernel that scaled_dot_product_attention takes for tensors of such shapes and dtypes."""
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=causal, enable_gqa=q.size(1) != k.size(1)))


def attend(
    q: Tensor,  # (B, H, L, E)
    k: Tensor,  # (B, K, n, E)
    v: Tensor,  # (B, K, n, E)
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # (B, H, L, E), (B, H, L) float32, or float64 for that
    """Attention and the log-sum-exp of each row, without autograd; causal needs n = L."""
    assert not causal or q.size(2) == k.size(2), "kernels differ in how they align a causal mask that is not square"
    head_dim, scale = q.size(3), 1 / math.sqrt(q.size(3))
    q, k, v = pad_heads(q, k, v)
    match _choose(q, k, v, causal=causal):
        case SDPBackend.CUDNN_ATTENTION:
            out, lse = aten._scaled_dot_product_cudnn_attention(
                q, k, v, attn_bias=None, compute_log_sumexp=True, is_causal=causal, scale=scale
            )[:2]
            lse = lse.view(q.shape[:3])
        case SDPBackend.FLASH_ATTENTION if q.is_cpu:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
        case SDPBackend.FLASH_ATTENTION:
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[:2]
        case _:
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
            out, lse = aten._scaled_dot_product_efficient_attention(
                q, k, v, attn_bias=None, compute_log_sumexp=True, is_causal=causal, scale=scale
            )[:2]
    return out[..., :head_dim], lse[..., : q.size(2)]  # the last kernel's has some more rows


def attend_backward(
    grad: Tensor,  # (B, H, L, E)
    q: Tensor,  # (B, H, L, E)
    k: Tensor,  # (B, K, n, E)
    v: Tensor,  # (B, K, n, E)
    out: Tensor,  # (B, H, L, E), of all keys
    lse: Tensor,  # (B, H, L), of all keys
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients of q, k and v that comes from these keys."""
    head_dim, scale = q.size(3), 1 / math.sqrt(q.size(3))
    kv_heads = k.size(1)
    grad, q, k, v, out = pad_heads(grad, q, k, v, out)
    # Seeds have no meaning without dropout, and starts none for sequences of one length.
    seed = torch.zeros(2, dtype=torch.int64, device=q.device)
    options: dict[str, Any] = {"cum_seq_q": None, "cum_seq_k": None, "max_q": q.size(2), "max_k": k.size(2)}
    options |= {"dropout_p": 0.0, "is_causal": causal, "scale": scale}
    match _choose(q, k, v, causal=causal):
        case SDPBackend.CUDNN_ATTENTION:
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, lse.contiguous()[..., None], seed[0], seed[1], None, **options
            )
        case SDPBackend.FLASH_ATTENTION if q.is_cpu:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, causal, scale=scale
            )
        case SDPBackend.FLASH_ATTENTION:
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), **options, philox_seed=seed, philox_offset=seed
            )
        case _:
            groups = q.size(1) // kv_heads
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
            lse = F.pad(lse, (0, -lse.size(2) % 32), value=math.inf)  # as the kernel's own is
            wanted = [True, True, True, False]
            dq, *dkv, _ = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, lse, seed[0], seed[1], 0.0, wanted, causal, scale=scale
            )
            grads = (dq, *(x.unflatten(1, (kv_heads, groups)).sum(2) for x in dkv))
    dq, dk, dv = (x[..., :head_dim] for x in grads)
    return dq, dk, dv


def join_(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    """Make the first, which `attend` gave as the second, attention to the keys of both: the output and log-sum-exps."""
    (first_out, first_lse), (second_out, second_lse) = first, second
    lse = torch.logaddexp(first_lse, second_lse)
    first_weight, second_weight = ((part - lse).exp_()[..., None] for part in (first_lse, second_lse))
    weighted = first_out * first_weight  # float32, and rounded only at the end
    torch.addcmul(weighted, second_out, second_weight, out=first_out)
    first_lse.copy_(lse)


@torch.no_grad()
def attend_to_prefix(
    q: Tensor,  # (B, H, L, E), the last L positions
    k: Tensor,  # (B, K, n, E), n >= L
    v: Tensor,  # (B, K, n, E)
) -> Tensor:  # (B, H, L, E)
    """Attention under a causal mask aligned to the bottom right, without gradients."""
    length, before = q.size(2), k.size(2) - q.size(2)
    if length == 1:  # sees all
        return attend(q, k, v, causal=False)[0]
    own = attend(q, k[:, :, before:], v[:, :, before:], causal=True)
    if before > 0:
        join_(own, attend(q, k[:, :, :before], v[:, :, :before], causal=False))
    return own[0]


def _choose(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> SDPBackend:
    return SDPBackend.FLASH_ATTENTION if q.is_cpu else choose_kernel(q, k, v, causal=causal)


def pad_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With zeros, which change no product: kernels on a GPU take head dims that 8 divides."""
    missing = 0 if tensors[0].is_cpu else -tensors[0].size(3) % 8
    return tensors if missing == 0 else tuple(F.pad(x, (0, missing)) for x in tensors)


def report_kernel(
    *, num_heads: int, num_kv_heads: int, head_dim: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Log which kernel SDPA takes on a GPU, and warn where it is not the fast one that such GPUs have."""
    shapes = ((1, seq_len, heads, head_dim) for heads in (num_heads, num_kv_heads))
    q, k = (torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for shape in shapes)
    kernel, capability = choose_kernel(q, k, k, causal=True), torch.cuda.get_device_capability(device)
    logger.info(f"Attention runs on the kernel of {KERNELS.get(kernel, kernel.name)}")
    fast = SDPBackend.CUDNN_ATTENTION if capability in PREFERS_CUDNN else SDPBackend.FLASH_ATTENTION
    if dtype == torch.float32 or capability < (8, 0) or kernel in (fast, SDPBackend.CUDNN_ATTENTION):
        return
    deterministic = ", deterministic algorithms only" * torch.are_deterministic_algorithms_enabled()
    logger.warning(
        f"Attention is slower than it could be: this GPU runs it fastest on the kernel of {KERNELS[fast]}, which torch"
        f" does not take here (torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, heads of {head_dim}"
        f"{deterministic}); the cuDNN that torch was built with, or a newer torch, may"
    )
