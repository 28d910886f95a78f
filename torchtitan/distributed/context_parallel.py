"""Context parallelism: each rank holds a part of every sequence, and attention gathers keys and values.

The method is that of the Llama 3 paper (arXiv:2407.21783, section 3.3.2). All but attention works token by token, so
only attention communicates. Compared with passing K and V around a ring it needs no online softmax over arriving
pieces and no schedule, and its volume is small, because grouped-query attention has few K and V heads.

**Which rank has which tokens.** A causal query at position s attends to s + 1 keys, so equal contiguous parts would
give the last rank almost twice the mean work. Instead the sequence is cut into 2 * C chunks for C ranks, and rank r
holds a head chunk and a tail chunk, numbers r and 2 * C - 1 - r (C = 4, chunks 0 to 7):

    rank 0: 0 7      rank 1: 1 6      rank 2: 2 5      rank 3: 3 4

A chunk n attends to the n + 1 chunks 0..n, so each rank works on (r + 1) + (2 * C - r) = 2 * C + 1 chunk pairs.

**Attention.** With L = S / (2 * C) tokens in a chunk, the queries of chunk n see the n * L keys before it without a
mask, and their own L keys under a causal mask. These are two calls of the kernel that whole sequences take too
(attention_kernels.py joins them; no kernel makes a mask or a matrix of queries by keys). The second needs only what the
rank has already. So forward starts the gather of K and V, attends within both chunks, waits, and attends to what comes
before them; backward does what comes before first, and reduces the gradients of K and V while it does the chunks.

It is an operation of its own, `torchtitan::context_attention`: torch.compile calls it as it is, and recomputation can
keep its results, the joined output among them and not its parts. Where documents do not see each other, K and V are
gathered first, and each chunk attends within its documents (document_attention.py).

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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.distributed.attention_kernels import attend, attend_backward, join_
from torchtitan.distributed.document_attention import attend_within_documents
from torchtitan.protocols.sequences import Documents, Sequences

collectives = torch.ops._c10d_functional  # the operations below torch.distributed


def shard_sequence(
    tensors: Sequence[Tensor],  # each (B, S)
    *,
    cp_rank: int,
    cp_degree: int,
) -> list[Tensor]:
    """This rank's columns of each tensor, (B, S / cp_degree): its head chunk, then its tail chunk.

    Raises:
        ValueError: 2 * cp_degree does not divide S.
    """
    seq_len, num_chunks = tensors[0].size(1), 2 * cp_degree
    if seq_len % num_chunks != 0:
        raise ValueError(
            f"Context parallel over {cp_degree} ranks cuts each sequence into {num_chunks} chunks: expected a length"
            f" that {num_chunks} divides, got {seq_len}."
        )

    def head_and_tail(x: Tensor) -> Tensor:  # (B, S) -> (B, Sl)
        chunks = x.chunk(num_chunks, dim=1)
        return torch.cat((chunks[cp_rank], chunks[-1 - cp_rank]), dim=1)

    return [head_and_tail(x) for x in tensors]


class ContextSharder:
    """Cuts batches for this context rank."""

    def __init__(self, cp_mesh: DeviceMesh) -> None:
        self._rank, self._degree = cp_mesh.get_local_rank(), cp_mesh.size()

    def __call__(
        self, tokens: Tensor, labels: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Sequences | None]:
        """This rank's part of (B, S) tokens and labels, and what the part is of; None where it is whole sequences."""
        seq_len = tokens.size(1)
        if documents is not None:
            positions = documents.get_positions(seq_len)
            for tensor in documents:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        elif self._degree == 1:
            return tokens, labels, None
        else:
            positions = torch.arange(seq_len, device=tokens.device).expand_as(tokens)
        whole = (tokens, labels, positions)
        tokens, labels, positions = shard_sequence(whole, cp_rank=self._rank, cp_degree=self._degree)
        return tokens, labels, Sequences(positions, documents)


def apply_context_parallel(model: nn.Module, cp_mesh: DeviceMesh) -> None:
    """Replace the attention kernel of each block of `model`, whose inputs are then cut by `shard_sequence`."""
    for block in model.get_submodule("layers").children():
        block.get_submodule("attention").sdpa = ContextParallelAttention(cp_mesh)


class ContextParallelAttention(nn.Module):
    """Causal attention of this rank's tokens to those of the whole sequence, or of their documents in it."""

    def __init__(self, cp_mesh: DeviceMesh):
        super().__init__()
        self.rank, self.degree = cp_mesh.get_local_rank(), cp_mesh.size()
        self.group_name = cp_mesh.get_group().group_name  # a string: traceable, and modules that hold it can be copied

    def forward(
        self,
        q: Tensor,  # (B, H, Sl, E)
        k: Tensor,  # (B, K, Sl, E)
        v: Tensor,  # (B, K, Sl, E)
        documents: Documents | None = None,
    ) -> Tensor:  # (B, H, Sl, E)
        if documents is None:
            return context_attention(q, k, v, self.rank, self.degree, self.group_name)[0]
        gathered = _GatherSequence.apply(_pack(k, v), self.degree, self.group_name)
        k, v = gathered.permute(1, 2, 3, 0, 4).unbind()  # (B, K, S, E)
        chunk_len = q.size(2) // 2
        ends = [(number + 1) * chunk_len for number in _get_chunks(self.rank, self.degree)]
        parts = [
            attend_within_documents(queries, k[:, :, :end], v[:, :, :end], documents)
            for queries, end in zip(q.split(chunk_len, dim=2), ends, strict=True)
        ]
        return torch.cat(parts, dim=2)


@torch.library.custom_op("torchtitan::context_attention", mutates_args=())
def context_attention(
    q: Tensor,  # (B, H, Sl, E)
    k: Tensor,  # (B, K, Sl, E)
    v: Tensor,  # (B, K, Sl, E)
    rank: int,
    degree: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, Sl, E), and for backward the log-sum-exps (B, H, Sl) and K and V of all, (S, 2, B, K, E)."""
    packed = _pack(k, v)
    pending = collectives.all_gather_into_tensor(packed, degree, group_name)
    chunk_len = q.size(2) // 2
    chunks = list(zip(*(x.split(chunk_len, dim=2) for x in (q, k, v)), strict=True))
    own = [attend(*chunk, causal=True) for chunk in chunks]
    gathered = _to_sequence_order(collectives.wait_tensor(pending), degree)
    keys, values = gathered.permute(1, 2, 3, 0, 4)  # (B, K, S, E)

    out = _empty_output(q)
    lse = own[0][1].new_empty(q.shape[:3])
    parts = zip(*(x.split(chunk_len, dim=2) for x in (q, out, lse)), own, strict=True)
    for number, (queries, out_part, lse_part, own_part) in zip(_get_chunks(rank, degree), parts, strict=True):
        before = slice(number * chunk_len)
        if number == 0:  # nothing comes before it
            out_part.copy_(own_part[0])
            lse_part.copy_(own_part[1])
        else:
            part = attend(queries, keys[:, :, before], values[:, :, before], causal=False)
            lse_part.copy_(join_(out_part, own_part, part))
    return out, lse, gathered


@context_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rank: int, degree: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, kv_heads, local_len, head_dim = k.shape
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return _empty_output(q), lse, k.new_empty(local_len * degree, 2, batch_size, kv_heads, head_dim)


@torch.library.custom_op("torchtitan::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad: Tensor,  # (B, H, Sl, E)
    q: Tensor,  # (B, H, Sl, E)
    out: Tensor,  # (B, H, Sl, E)
    lse: Tensor,  # (B, H, Sl)
    gathered: Tensor,  # (S, 2, B, K, E)
    rank: int,
    degree: int,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of q (B, H, Sl, E), and of this rank's k and v, (Sl, 2, B, K, E)."""
    chunk_len = q.size(2) // 2
    keys, values = gathered.permute(1, 2, 3, 0, 4)  # (B, K, S, E)
    d_q, d_gathered = _empty_output(q), torch.zeros_like(gathered)
    by_chunk = zip(*(x.split(chunk_len, dim=2) for x in (grad, q, out, lse, d_q)), strict=True)
    chunks = list(zip(_get_chunks(rank, degree), by_chunk, strict=True))

    def backward(
        part: slice, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """From a part of the keys: the gradient of q, and of k and v, (n, 2, B, K, E)."""
        d_q, *d_kv = attend_backward(grad, q, keys[:, :, part], values[:, :, part], out, lse, causal=causal)
        return d_q, torch.stack(d_kv).permute(3, 0, 1, 2, 4)

    for number, (*tensors, d_q_part) in chunks:
        before = slice(number * chunk_len)
        if number == 0:
            d_q_part.zero_()
        else:
            d_queries, d_kv = backward(before, *tensors, causal=False)
            d_q_part.copy_(d_queries)
            d_gathered[before] += d_kv
    by_rank = _to_rank_order(d_gathered, degree)
    pending = collectives.reduce_scatter_tensor(by_rank, "sum", degree, group_name)
    own = []
    for number, (*tensors, d_q_part) in chunks:
        d_queries, d_kv = backward(slice(number * chunk_len, (number + 1) * chunk_len), *tensors, causal=True)
        d_q_part += d_queries
        own.append(d_kv)
    return d_q, collectives.wait_tensor(pending) + torch.cat(own)


@context_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, rank: int, degree: int, group_name: str
) -> tuple[Tensor, Tensor]:
    return _empty_output(q), gathered.new_empty(gathered.size(0) // degree, *gathered.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, _, _, *ctx.where = inputs
    ctx.save_for_backward(q, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    d_q, d_packed = context_attention_backward(grad, *ctx.saved_tensors, *ctx.where)
    d_k, d_v = d_packed.permute(1, 2, 3, 0, 4).unbind()  # (B, K, Sl, E)
    return d_q, d_k, d_v, None, None, None


context_attention.register_autograd(_backward, setup_context=_setup_context)


def _get_chunks(rank: int, degree: int) -> tuple[int, int]:
    """The numbers of a rank's head chunk and its tail chunk."""
    return rank, 2 * degree - 1 - rank


def _empty_output(q: Tensor) -> Tensor:
    """Room for (B, H, Sl, E), with the heads of a token side by side, as the output projection reads them."""
    batch_size, num_heads, local_len, head_dim = q.shape
    return q.new_empty(batch_size, local_len, num_heads, head_dim).transpose(1, 2)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    """(Sl, 2, B, K, E). With the sequence outermost the gather needs no transposition; kernels read any strides."""
    return torch.stack((k, v)).permute(3, 0, 1, 2, 4).contiguous()


class _GatherSequence(torch.autograd.Function):
    """All-gather over dim 0, into the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, degree: int, group_name: str) -> Tensor:  # (Sl, ...) -> (S, ...)
        ctx.degree, ctx.group_name = degree, group_name
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(local, degree, group_name))
        return _to_sequence_order(gathered, degree)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # (S, ...) -> (Sl, ...)
        by_rank = _to_rank_order(grad, ctx.degree)
        local = collectives.reduce_scatter_tensor(by_rank, "sum", ctx.degree, ctx.group_name)
        return collectives.wait_tensor(local), None, None


def _to_sequence_order(gathered: Tensor, degree: int) -> Tensor:
    """(S, ...): from the ranks' head and tail chunks, rank by rank, to the order of the sequence."""
    chunks = gathered.chunk(2 * degree)  # head of rank 0, tail of rank 0, head of rank 1, ...
    return torch.cat(chunks[0::2] + chunks[1::2][::-1])


def _to_rank_order(sequence: Tensor, degree: int) -> Tensor:
    """(S, ...): the way back."""
    chunks = sequence.chunk(2 * degree)
    return torch.cat([chunks[i] for rank in range(degree) for i in _get_chunks(rank, degree)])
