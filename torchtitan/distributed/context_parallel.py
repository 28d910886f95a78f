"""Context parallelism: each rank holds a part of every sequence, and attention gathers keys and values.

The method is that of the Llama 3 paper (arXiv:2407.21783, section 3.3.2). All but attention works token by token, so
only attention communicates. Compared with passing K and V around a ring it needs no online softmax over arriving
pieces and no schedule, and its volume is small, because grouped-query attention has few K and V heads.

**Which rank has which tokens.** A causal query at position s attends to s + 1 keys, so equal contiguous parts would
give the last rank almost twice the mean work. Instead the sequence is cut into 2 * C chunks for C ranks, and rank r
holds a head chunk and a tail chunk, numbers r and 2 * C - 1 - r (C = 4, chunks 0 to 7):

    rank 0: 0 7      rank 1: 1 6      rank 2: 2 5      rank 3: 3 4

A chunk n attends to the n + 1 chunks 0..n, so each rank works on (r + 1) + (2 * C - r) = 2 * C + 1 chunk pairs.

**Attention.** After the gather a rank has all K and V in the order of the sequence. With L = S / (2 * C) tokens in a
chunk, its head chunk's queries see the first (r + 1) * L keys, its tail chunk's the first (2 * C - r) * L, each under
a causal mask that is aligned to the bottom right: query i of a chunk sees key j of an n-key prefix if

    j <= i + (n - L)

so the mask is empty but for the chunk's own L x L diagonal block, and no key outside the prefix is ever computed.
Two calls of an attention kernel do it. On a GPU they are FlashAttention-2, which aligns its causal mask that way
(unlike `scaled_dot_product_attention(is_causal=True)`, which aligns it to the top left), or for float32 the
memory-efficient kernel, which can do both; neither makes an (L, S) matrix. The kernels are called as aten operations,
which torch.compile(fullgraph=True) traces, as it does not trace `torch.nn.attention.bias.causal_lower_right`. On a CPU,
and for head dims that are no multiple of 8, a boolean mask of L x (prefix) is passed to SDPA.

**Collectives and bytes**, per layer and microbatch, for an element size of b bytes, counted as received by each rank
(N = 2 * B * S * K * E elements, K and V of the whole sequence):

    forward                      one all-gather of K and V packed     (C - 1) / C * N * b
    recomputed forward, if any   the same again
    backward                     one reduce-scatter of dK and dV      (C - 1) / C * N * b

Llama 3 8B, S = 131072, B = 1, bf16: N * b = 537 MB a layer. Under tensor parallelism K is this rank's K heads, and all
of it shrinks by the tensor-parallel degree. Nothing of the queries, the output or the rest of the model is sent, but
for FSDP's traffic: the context ranks hold equal weights, so FSDP shards over them too.

**Precision.** K and V travel in the dtype they have, their gradients likewise: in bf16 training each rank's dK and dV
are rounded to bf16 and summed over the ranks by the collective, as tensor parallelism does with its gradients.

**Memory.** The gathered K and V (N elements) live on every rank for the time of one layer's forward and backward, and
between them unless the block is recomputed; all other activations shrink by C. With 8 heads for K and V and 32 for
queries they take a quarter of what queries and outputs of the whole sequence would.

Shapes: B batch, S whole sequence, Sl = S / C this rank's share, H query heads, K key/value heads, E head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

aten = torch.ops.aten
collectives = torch.ops._c10d_functional  # the operations below torch.distributed: they need no tracing support

_LOWER_RIGHT = 2  # value of the memory-efficient kernel's custom_mask_type


def shard_sequence(
    tensors: Sequence[Tensor],  # each (B, S)
    *,
    cp_rank: int,
    cp_degree: int,
) -> tuple[list[Tensor], Tensor]:
    """This rank's columns of each tensor, and their positions in the sequence.

    Returns:
        The tensors' parts, each (B, S / cp_degree), and positions of that shape, int64: the head chunk's, then the
        tail chunk's.

    Raises:
        ValueError: 2 * cp_degree does not divide S.
    """
    batch_size, seq_len = tensors[0].shape
    positions = torch.arange(seq_len, device=tensors[0].device).expand(batch_size, -1)
    num_chunks = 2 * cp_degree
    if seq_len % num_chunks != 0:
        raise ValueError(
            f"Context parallel over {cp_degree} ranks cuts each sequence into {num_chunks} chunks: expected a length"
            f" that {num_chunks} divides, got {seq_len}."
        )

    def head_and_tail(x: Tensor) -> Tensor:  # (B, S) -> (B, Sl)
        chunks = x.chunk(num_chunks, dim=1)
        return torch.cat((chunks[cp_rank], chunks[-1 - cp_rank]), dim=1)

    return [head_and_tail(x) for x in tensors], head_and_tail(positions)


class ContextSharder:
    """Cuts batches for this context rank."""

    def __init__(self, cp_mesh: DeviceMesh) -> None:
        self._rank, self._degree = cp_mesh.get_local_rank(), cp_mesh.size()

    def __call__(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's part of (B, S) tokens and labels, and the part's positions; None where it is the whole."""
        if self._degree == 1:
            return tokens, labels, None
        (tokens, labels), positions = shard_sequence((tokens, labels), cp_rank=self._rank, cp_degree=self._degree)
        return tokens, labels, positions


def apply_context_parallel(model: nn.Module, cp_mesh: DeviceMesh) -> None:
    """Replace the attention kernel of each block of `model`, whose inputs are then cut by `shard_sequence`."""
    for block in model.get_submodule("layers").children():
        block.get_submodule("attention").sdpa = ContextParallelAttention(cp_mesh)


class ContextParallelAttention(nn.Module):
    """Causal attention of this rank's tokens to those of the whole sequence."""

    def __init__(self, cp_mesh: DeviceMesh):
        super().__init__()
        self.rank, self.degree = cp_mesh.get_local_rank(), cp_mesh.size()
        self.group_name = cp_mesh.get_group().group_name  # a string: traceable, and modules that hold it can be copied

    def forward(
        self,
        q: Tensor,  # (B, H, Sl, E)
        k: Tensor,  # (B, K, Sl, E)
        v: Tensor,  # (B, K, Sl, E)
    ) -> Tensor:  # (B, H, Sl, E)
        # The sequence goes outermost: the gather then needs no transposition, and attention kernels read any strides.
        packed = torch.stack((k, v)).permute(3, 0, 1, 2, 4).contiguous()  # (Sl, 2, B, K, E)
        gathered = _GatherSequence.apply(packed, self.degree, self.group_name)  # (S, 2, B, K, E)
        k, v = gathered.permute(1, 2, 3, 0, 4).unbind()  # (B, K, S, E)

        chunk_len = q.size(2) // 2
        outputs = []
        for number, queries in zip(
            (self.rank, 2 * self.degree - 1 - self.rank), q.split(chunk_len, dim=2), strict=True
        ):
            end = (number + 1) * chunk_len
            outputs.append(attend_to_prefix(queries, k[:, :, :end], v[:, :, :end]))
        return torch.cat(outputs, dim=2)


def attend_to_prefix(
    q: Tensor,  # (B, H, L, E), the last L positions
    k: Tensor,  # (B, K, n, E), n >= L
    v: Tensor,  # (B, K, n, E)
) -> Tensor:  # (B, H, L, E)
    """Attention under a causal mask aligned to the bottom right."""
    head_dim = q.size(3)
    if not q.is_cpu and head_dim % 8 == 0:  # shapes alone, on the meta device, go a GPU's way
        if head_dim <= 256 and q.dtype in (torch.bfloat16, torch.float16) and _has_flash_attention(q.device):
            return aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
        groups = q.size(1) // k.size(1)
        out = aten._efficient_attention_forward(
            q.transpose(1, 2).contiguous(),  # (B, L, H, E): inductor expects gradients laid out like the inputs
            *(x.transpose(1, 2).repeat_interleave(groups, dim=2) for x in (k, v)),
            bias=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            dropout_p=0.0,
            custom_mask_type=_LOWER_RIGHT,
            compute_log_sumexp=True,  # backward reads it
        )[0]
        return out.transpose(1, 2)
    length, prefix = q.size(2), k.size(2)
    mask = torch.ones(length, prefix, dtype=torch.bool, device=q.device).tril(prefix - length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


def _has_flash_attention(device: torch.device) -> bool:
    return device.type == "meta" or torch.cuda.get_device_capability(device) >= (8, 0)


class _GatherSequence(torch.autograd.Function):
    """All-gather over dim 0, with the ranks' head and tail chunks put in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, degree: int, group_name: str) -> Tensor:  # (Sl, ...) -> (S, ...)
        ctx.degree, ctx.group_name = degree, group_name
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(local, degree, group_name))
        chunks = gathered.chunk(2 * degree)  # head of rank 0, tail of rank 0, head of rank 1, ...
        return torch.cat(chunks[0::2] + chunks[1::2][::-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # (S, ...) -> (Sl, ...)
        chunks = grad.chunk(2 * ctx.degree)
        by_rank = torch.cat([chunks[i] for r in range(ctx.degree) for i in (r, 2 * ctx.degree - 1 - r)])
        local = collectives.reduce_scatter_tensor(by_rank, "sum", ctx.degree, ctx.group_name)
        return collectives.wait_tensor(local), None, None
