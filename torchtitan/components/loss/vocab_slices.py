"""The fused loss under a very tight budget: slices of the vocabulary, with the logits computed twice.

Shapes: T tokens, A of a group of them, D model dim, V vocabulary, W words of a slice, n slices.

Each chunk of tokens reads and writes the whole weight gradient, however few rows it has. Here many tokens share that,
because only a slice of their logits is held at a time. A slice's gradient needs the softmax over all slices, so that
the logits are computed once for the statistics and once more for the gradient. For each group of tokens:

    for each slice:  Z = H W_s^T   (A, W)  its rows' maximum, sum and target logit
    over the n slices              (A,)    logsumexp and loss
    for each slice:  Z = H W_s^T   again; of the slice that came last, the logits are still there
                     G = scale * (softmax(Z) - Y)  in place
                     dH   = dH + G W_s    (A, D)   in float32, rounded once at the end
                     dW_s = dW_s + G^T H  (W, D)   read and written once for each group

That is almost four matrix products instead of three. The budget B holds A (b W + 4 D) bytes, with b bytes a logit. A
token's share of the traffic is 2 b V D / A bytes for dW and 8 V D / W for dH, together least at W = 2 sqrt(B) / b. For
Llama 3 8B in bf16, 31 MiB and 4096 tokens: A = 1024 and W = 7552 make 3 MB a token, where chunks of 112 tokens make
19 MB. The fourth product takes the time of 4 MB on an H100, which does 250 operations while it moves a byte. The two
ways were measured to be even at chunks of some 330 rows.
"""

import torch
from torch import Tensor

from torchtitan.components.loss.chunking import plan_slices
from torchtitan.components.loss.gradient_sum import WeightGradient, add_product_
from torchtitan.components.loss.softmax_gradient import combine_statistics, row_statistics, write_gradient_


def fill_by_vocab_slices(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,) int64
    scale: Tensor,  # () float32
    *,
    losses: Tensor,  # (T,) float32, written
    d_hidden: Tensor | None,  # (T, D), written
    d_weight: WeightGradient | None,  # (V, D), added to
    budget_bytes: int,
) -> None:
    """Losses and both gradients of `scale * sum(losses)`."""
    (num_tokens, dim), vocab_size = hidden.shape, weight.shape[0]
    group, num_words = plan_slices(
        num_tokens,
        vocab_size=vocab_size,
        dim=dim,
        bytes_per_logit=hidden.element_size(),
        budget_bytes=budget_bytes,
    )
    slices = [slice(first, min(first + num_words, vocab_size)) for first in range(0, vocab_size, num_words)]
    buffer = hidden.new_empty(group * num_words)
    accum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    d_group = hidden.new_empty(group, dim, dtype=accum_dtype) if d_hidden is not None else None
    for first in range(0, num_tokens, group):
        tokens = slice(first, min(first + group, num_tokens))
        h, y = hidden[tokens], labels[tokens]

        def logits_of(words: slice, h: Tensor = h) -> Tensor:  # (A, W)
            logits = buffer[: len(h) * (words.stop - words.start)].view(len(h), -1)
            return torch.mm(h, weight[words].t(), out=logits)

        statistics = []
        for words in reversed(slices):
            logits = logits_of(words)
            statistics.append(row_statistics(logits, y, start=words.start))
        lse, losses[tokens] = combine_statistics(torch.stack(statistics), y)
        for words in slices:
            is_first = words.start == 0
            gradient = logits if is_first else logits_of(words)
            write_gradient_(gradient, lse, y, scale, start=words.start)
            if d_group is not None:
                add_product_(d_group[: len(h)], gradient, weight[words], is_first=is_first)
            if d_weight is not None:
                d_weight.add(gradient, h, words.start)
        if d_hidden is not None and d_group is not None:
            d_hidden[tokens] = d_group[: len(h)]
