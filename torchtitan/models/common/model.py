"""A dense decoder: embedding, blocks of attention and feed-forward, norm, output.

Parallelism is applied from outside (parallelize.py), so nothing here knows of it, save for three courtesies:
head counts are read from the tensors (tensor parallel leaves each rank some of the heads), the parts that a pipeline
stage lacks are None, and attention's kernel is a module that context parallel and generation replace.

Shapes: B batch, S sequence, D model dim, H query heads, K key/value heads, E head dim, F feed-forward dim, V vocab.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config.block_modes import BlockMode
from torchtitan.distributed.document_attention import attend_within_documents
from torchtitan.distributed.sequence_pieces import run_in_pieces
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs
from torchtitan.protocols.model import Decoder, Initializer, OutputHead, TiedOutputHead
from torchtitan.protocols.sequences import Documents, Sequences


def precompute_freqs_cis(
    head_dim: int,
    max_seq_len: int,
    theta: float,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosine and sine of position * frequency, (max_seq_len, head_dim / 2, 2) in float32.

    Real pairs rather than complex numbers: inductor fuses them with what surrounds the rotation.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    freqs = 1.0 / theta**exponents
    if scaling is not None:
        freqs = _scale_freqs(freqs, scaling)
    positions = torch.arange(max_seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, freqs)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def _scale_freqs(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    turns = scaling.original_max_seq_len * freqs / (2 * math.pi)  # of each frequency, in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share_kept = ((turns - low) / (high - low)).clamp(0, 1)
    return share_kept * freqs + (1 - share_kept) * freqs / scaling.factor


def apply_rotary_emb(
    x: Tensor,  # (B, S, H, E)
    freqs_cis: Tensor,  # (1 or B, S, E / 2, 2), float32
) -> Tensor:
    """Rotate neighbouring pairs of each head, in float32."""
    cos, sin = freqs_cis.unsqueeze(2).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


class ScaledDotProductAttention(nn.Module):
    """Causal attention over whole sequences, or their documents; what replaces it takes and gives the same shapes."""

    def forward(
        self,
        q: Tensor,  # (B, H, S, E)
        k: Tensor,  # (B, K, S, E)
        v: Tensor,  # (B, K, S, E)
        documents: Documents | None = None,
    ) -> Tensor:  # (B, H, S, E)
        if documents is not None:
            return attend_within_documents(q, k, v, documents)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))


class Attention(nn.Module):
    def __init__(self, args: TransformerModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.q_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps) if args.qk_norm else None
        self.k_norm = nn.RMSNorm(args.head_dim, eps=args.norm_eps) if args.qk_norm else None
        self.sdpa: nn.Module = ScaledDotProductAttention()

    def forward(
        self,
        x: Tensor,  # (B, S, D)
        freqs_cis: Tensor,  # (1 or B, at least S, E / 2, 2)
        documents: Documents | None = None,
    ) -> Tensor:  # (B, S, D)
        # -1: the number of heads on this rank. x holds the whole sequence here, also under sequence parallel.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, S, H or K, E)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        freqs_cis = freqs_cis[:, : q.size(1)]
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        out = self.sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), documents)  # (B, H, S, E)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, D) -> (B, S, D), through (B, S, F)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    block_mode: BlockMode = "none"
    feed_forward_pieces = 1

    def __init__(self, args: TransformerModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_hidden_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, documents: Documents | None = None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, documents)
        is_recomputed = self.block_mode != "none"
        return h + run_in_pieces(
            self.feed_forward, self.ffn_norm(h), self.feed_forward_pieces, is_recomputed=is_recomputed
        )


class Transformer(Decoder):
    """The model, or a pipeline stage: its `tok_embeddings`, `norm` or `output` is None if another stage has it."""

    keeps_documents_apart = True
    freqs_cis: Tensor

    def __init__(self, args: TransformerModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        tied = TiedOutputHead(self.tok_embeddings) if args.tie_embeddings else None
        self.output = tied or OutputHead(args.dim, args.vocab_size)
        self.init_buffers(None)

    def forward(
        self,
        tokens: Tensor,  # (B, S) int64; on a later pipeline stage the hidden states (B, S, D)
        return_hidden_states: bool = False,
        *,
        sequences: Sequences | None = None,  # None: whole ones, every token of which sees all before it
    ) -> Tensor:  # logits (B, S, V); the hidden states (B, S, D) if asked for, or on a stage without output
        freqs_cis = self.freqs_cis[None] if sequences is None else self.freqs_cis[sequences.positions]
        documents = None if sequences is None else sequences.documents
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for block in self.layers.values():
            h = block(h, freqs_cis, documents)
        if self.norm is not None:
            h = self.norm(h)
        if return_hidden_states or self.output is None:
            return h
        return self.output(h)

    def init_buffers(self, device: torch.device | str | None) -> None:
        """Compute the rotary table on `device`: for a model that was built on the meta device."""
        args = self.args
        table = precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling, device)
        self.register_buffer("freqs_cis", table, persistent=False)

    def weight_initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by its name.

        | tok_embeddings          | N(0, 1); N(0, 0.02) where the output is tied to it                   |
        | wq, wk, wv, w1          | N(0, 0.02)                                                           |
        | wo, w2, w3              | N(0, 0.02 / sqrt(2 * (layer + 1))): deeper layers add less           |
        | norms                   | 1                                                                    |
        | output                  | N(0, D ** -0.5) cut at three deviations: logits start near N(0, 1)   |
        """
        table: dict[str, Initializer] = {}
        for name, _ in self.named_parameters():
            *path, module, _ = name.split(".")
            match module:
                case "tok_embeddings":
                    table[name] = _normal(0.02 if self.args.tie_embeddings else 1.0)
                case "wq" | "wk" | "wv" | "w1":
                    table[name] = _truncated_normal(0.02)
                case "wo" | "w2" | "w3":
                    table[name] = _truncated_normal(0.02 / math.sqrt(2 * (int(path[1]) + 1)))
                case "attention_norm" | "q_norm" | "k_norm" | "ffn_norm" | "norm":
                    table[name] = _ones
                case "output":
                    std = self.args.dim**-0.5
                    table[name] = _truncated_normal(std, cut=3 * std)
        return table


def _normal(std: float) -> Initializer:
    return lambda weight, generator: nn.init.normal_(weight, std=std, generator=generator)


def _truncated_normal(std: float, cut: float = 2.0) -> Initializer:
    # upstream's cut, of 100 deviations, cuts nothing; normal_ would draw other weights from the same seed
    return lambda weight, generator: nn.init.trunc_normal_(weight, std=std, a=-cut, b=cut, generator=generator)


def _ones(weight: Tensor, generator: torch.Generator) -> Tensor:
    return nn.init.ones_(weight)
