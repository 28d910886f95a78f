"""Attention that stops at the boundaries of documents.

On a GPU that has FlashAttention-2 the documents of all sequences are laid end to end, and its kernel for sequences of
many lengths computes each by itself: no pair of tokens of two documents costs anything. It is an operation of its own,
because the number of documents and the longest one differ from batch to batch: torch.compile sees tensors only, and
nothing waits for the device. Elsewhere, and in float32, a mask is made.

Shapes: B batch, L queries, n keys, H query heads, K key/value heads, E head dim, M documents.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.distributed.attention_kernels import pad_heads
from torchtitan.protocols.sequences import Documents

aten = torch.ops.aten


def attend_within_documents(
    q: Tensor,  # (B, H, L, E), of the last L of the n tokens
    k: Tensor,  # (B, K, n, E)
    v: Tensor,  # (B, K, n, E)
    documents: Documents,
) -> Tensor:  # (B, H, L, E)
    """Each query sees the keys of its own document up to its own place."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    # on the meta device a GPU's memory is traced (memory/trace.py)
    if is_half and (q.is_meta or (q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0))):
        return document_attention(q, k, v, *documents)[0]
    length, num_keys = q.size(2), k.size(2)
    numbers = documents.get_numbers(num_keys)
    visible = numbers[:, -length:, None] == numbers[:, None, :]
    visible = visible.tril(num_keys - length)[:, None]  # (B, 1, L, n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.size(1) != k.size(1))


@torch.library.custom_op("torchtitan::document_attention", mutates_args=())
def document_attention(
    q: Tensor,  # (B, H, L, E)
    k: Tensor,  # (B, K, n, E)
    v: Tensor,  # (B, K, n, E)
    bounds: Tensor,  # (B, M + 1) int32
    longest: Tensor,  # (B, length of the longest, 0)
) -> tuple[Tensor, Tensor]:
    """By FlashAttention-2: (B, H, L, E), and the log-sum-exps (H, B * L)."""
    starts, sizes = _lay_out(bounds, longest, q.size(2), k.size(2))
    scale = 1 / math.sqrt(q.size(3))
    packed = [_pack(x) for x in pad_heads(q, k, v)]
    out, lse = aten._flash_attention_forward(*packed, *starts, *sizes, 0.0, True, False, scale=scale)[:2]
    return _unpack(out, q), lse


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.size(1), q.size(0) * q.size(2), dtype=torch.float32)
    return _empty_like(q), lse


@torch.library.custom_op("torchtitan::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor,  # (B, H, L, E)
    q: Tensor,  # (B, H, L, E)
    k: Tensor,  # (B, K, n, E)
    v: Tensor,  # (B, K, n, E)
    out: Tensor,  # (B, H, L, E)
    lse: Tensor,  # (H, B * L)
    bounds: Tensor,  # (B, M + 1) int32
    longest: Tensor,  # (B, length of the longest, 0)
) -> tuple[Tensor, Tensor, Tensor]:
    starts, sizes = _lay_out(bounds, longest, q.size(2), k.size(2))
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    packed = [_pack(x) for x in pad_heads(grad, q, k, v, out)]
    grads = aten._flash_attention_backward(
        *packed, lse, *starts, *sizes, 0.0, True, *no_dropout, scale=1 / math.sqrt(q.size(3))
    )
    d_q, d_k, d_v = (_unpack(x, like) for x, like in zip(grads, (q, k, v), strict=True))
    return d_q, d_k, d_v


@document_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, longest = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, longest)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *document_attention_backward(grad, *ctx.saved_tensors), None, None


document_attention.register_autograd(_backward, setup_context=_setup_context)


def _lay_out(bounds: Tensor, longest: Tensor, length: int, num_keys: int) -> tuple[list[Tensor], list[int]]:
    """Where documents begin among all queries laid end to end, and among all keys; bounds of their lengths.

    A document that ends before the first query has keys and no queries, and one that begins after the last neither.
    So do the gaps between two rows, which have a beginning and an end of their own.
    """
    rows = torch.arange(len(bounds), dtype=torch.int32, device=bounds.device)[:, None]
    before = num_keys - length
    starts = [
        (bounds.clamp(before, num_keys) - before + rows * length).flatten(),
        (bounds.clamp(max=num_keys) + rows * num_keys).flatten(),
    ]
    return starts, [longest.size(1)] * 2


def _pack(x: Tensor) -> Tensor:  # (B, H, L, E) -> (B * L, H, E)
    return x.transpose(1, 2).flatten(0, 1)


def _unpack(x: Tensor, like: Tensor) -> Tensor:  # (B * L, H, E) -> (B, H, L, E), without what was padded
    return x.unflatten(0, (like.size(0), like.size(2))).transpose(1, 2)[..., : like.size(3)]


def _empty_like(x: Tensor) -> Tensor:
    """Laid out as _unpack leaves it."""
    batch_size, num_heads, length, head_dim = x.shape
    padded = head_dim + -head_dim % 8
    return x.new_empty(batch_size, length, num_heads, padded).transpose(1, 2)[..., :head_dim]
