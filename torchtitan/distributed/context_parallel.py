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

Tails and heads are gathered apart, into the two halves of one tensor, tails first. There the order of chunks is

    2 * C - 1, ..., C + 1, C, 0, 1, ..., C - 1

in which the chunks before any head or tail lie side by side: what is attended to without a mask may have any order, so
that nothing is moved between a collective and a kernel. A rank's two chunks are one more dimension of the batch.

It is an operation of its own, `torchtitan::context_attention`: torch.compile calls it as it is, and recomputation can
keep its results, the joined output among them and not its parts. Where documents do not see each other, K and V are
gathered first, and each chunk attends within its documents (document_attention.py).

**Collectives and bytes**, per layer and microbatch, for an element size of b bytes, counted as received by each rank
(N = 2 * B * S * K * E elements, K and V of the whole sequence):

    forward                      all-gathers of K and V packed    (C - 1) / C * N * b
    recomputed forward, if any   the same again
    backward                     reduce-scatters of dK and dV     (C - 1) / C * N * b

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

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.distributed.attention_kernels import attend, attend_backward, join_
from torchtitan.distributed.document_attention import attend_within_documents
from torchtitan.protocols.sequences import Documents, Sequences

collectives = torch.ops._c10d_functional  # the operations below torch.distributed

HEAD, TAIL = 0, 1
"""A rank's chunks, in its order."""


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
        gathered = _GatherSequence.apply(_pack(k, v).flatten(0, 1), self.degree, self.group_name)
        k, v = _keys_and_values(gathered)  # (B, K, S, E)
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
    """The output (B, H, Sl, E); for backward the log-sum-exps (B, H, Sl), and K and V of all, (2C, L, 2, B, K, E)."""
    group = _get_group(group_name)
    packed = _pack(k, v)
    gathered = packed.new_empty(2 * degree, *packed.shape[1:])
    pending = [
        group._allgather_base(of_all.flatten(0, 1), own)
        for of_all, own in zip(_heads_and_tails(gathered), packed, strict=True)
    ]
    own = attend(*(_chunks_to_batch(x) for x in (q, k, v)), causal=True)
    out, lse = _as_output(_chunks_from_batch(own[0])), _chunks_from_batch(own[1]).contiguous()
    for work in pending:
        work.wait()
    for chunk, before in _before(rank, degree):
        queries, out_part, lse_part = (x.chunk(2, dim=2)[chunk] for x in (q, out, lse))
        part = attend(queries, *_keys_and_values(gathered[before]), causal=False)
        join_((out_part, lse_part), part)
    return out, lse, gathered


@context_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rank: int, degree: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, kv_heads, local_len, head_dim = k.shape
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    gathered = k.new_empty(2 * degree, local_len // 2, 2, batch_size, kv_heads, head_dim)
    return _as_output(torch.empty_like(q)), lse, gathered


@torch.library.custom_op("torchtitan::context_attention_backward", mutates_args=())
def context_attention_backward(
    grad: Tensor,  # (B, H, Sl, E)
    q: Tensor,  # (B, H, Sl, E)
    out: Tensor,  # (B, H, Sl, E)
    lse: Tensor,  # (B, H, Sl)
    gathered: Tensor,  # (2C, L, 2, B, K, E)
    rank: int,
    degree: int,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """The gradients of q (B, H, Sl, E), and of this rank's k and v, (2, L, 2, B, K, E)."""
    group = _get_group(group_name)
    d_gathered = torch.empty_like(gathered)
    d_gathered[: rank + 1] = 0  # nothing of this rank comes after these tails
    d_q_before = {}
    for chunk, before in _before(rank, degree):
        d_out, queries, out_part, lse_part = (x.chunk(2, dim=2)[chunk] for x in (grad, q, out, lse))
        keys, values = _keys_and_values(gathered[before])
        d_q_before[chunk], *d_kv = attend_backward(d_out, queries, keys, values, out_part, lse_part, causal=False)
        for number, d in enumerate(d_kv):
            target = d_gathered[before, :, number]
            d = _by_chunk(d, len(target))
            target.copy_(d) if chunk == TAIL else target.add_(d)
    d_own = gathered.new_empty(2, *gathered.shape[1:])
    pending = [
        group._reduce_scatter_base(own, of_all.flatten(0, 1), dist.ReduceScatterOptions())
        for own, of_all in zip(d_own, _heads_and_tails(d_gathered), strict=True)
    ]
    own = torch.stack([chunks[rank].permute(1, 2, 0, 3, 4) for chunks in _heads_and_tails(gathered)], dim=2)
    keys, values = own.flatten(1, 2).transpose(2, 3)  # (2B, K, L, E)
    d_out, queries, out, lse = (_chunks_to_batch(x) for x in (grad, q, out, lse))
    d_q, *d_kv = attend_backward(d_out, queries, keys, values, out, lse, causal=True)
    d_q = _as_output(_chunks_from_batch(d_q))
    for chunk, d in d_q_before.items():
        d_q.chunk(2, dim=2)[chunk].add_(d)
    for work in pending:
        work.wait()
    for number, d in enumerate(d_kv):
        d_own[:, :, number] += _by_chunk(_chunks_from_batch(d), 2)
    return d_q, d_own


@context_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, rank: int, degree: int, group_name: str
) -> tuple[Tensor, Tensor]:
    return _as_output(torch.empty_like(q)), gathered.new_empty(2, *gathered.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, _, _, *ctx.where = inputs
    ctx.save_for_backward(q, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    d_q, d_packed = context_attention_backward(grad, *ctx.saved_tensors, *ctx.where)
    d_k, d_v = _keys_and_values(d_packed)
    return d_q, d_k, d_v, None, None, None


context_attention.register_autograd(_backward, setup_context=_setup_context)


def _get_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type,no-any-return]


def _get_chunks(rank: int, degree: int) -> tuple[int, int]:
    """The numbers of a rank's head chunk and its tail chunk."""
    return rank, 2 * degree - 1 - rank


def _before(rank: int, degree: int) -> Iterator[tuple[int, slice]]:
    """Of a rank's tail, and of its head if anything is: where the chunks before it are in what was gathered."""
    yield TAIL, slice(rank + 1, 2 * degree)
    if rank > 0:
        yield HEAD, slice(degree, degree + rank)


def _heads_and_tails(gathered: Tensor) -> tuple[Tensor, Tensor]:  # (2C, ...) -> twice (C, ...), by rank
    tails, heads = gathered.chunk(2)
    return heads, tails


def _by_chunk(x: Tensor, num_chunks: int) -> Tensor:  # (B, K, num_chunks * L, E) -> (num_chunks, L, B, K, E)
    return x.unflatten(2, (num_chunks, -1)).permute(2, 3, 0, 1, 4)


def _pack(k: Tensor, v: Tensor) -> Tensor:  # (B, K, Sl, E) each -> (2, L, 2, B, K, E): a head and a tail
    return torch.stack((_by_chunk(k, 2), _by_chunk(v, 2)), dim=2)


def _keys_and_values(packed: Tensor) -> tuple[Tensor, ...]:  # (..., 2, B, K, E) of n keys -> (B, K, n, E) each
    return packed.flatten(0, -5).permute(1, 2, 3, 0, 4).unbind()


def _chunks_to_batch(x: Tensor) -> Tensor:  # (B, N, Sl, ...) -> (2B, N, L, ...)
    return x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


def _chunks_from_batch(x: Tensor) -> Tensor:  # (2B, N, L, ...) -> (B, N, Sl, ...)
    return x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)


def _as_output(x: Tensor) -> Tensor:  # (B, H, Sl, E)
    """With the heads of a token side by side, as the output projection reads them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


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
