"""Log-probabilities of labels, without the (T, V) logits, for any further function: policy gradients, distillation."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.components.loss.fused_linear import check_inputs
from torchtitan.components.loss.operators import linear_logprobs as operator
from torchtitan.components.loss.terms import Terms
from torchtitan.components.loss.valid_rows import ValidRows
from torchtitan.components.loss.vocab_shard import VocabShard


class LogProbs(NamedTuple):
    """Of each token, (...) as the labels, float32 (float64 for float64 inputs); 0 where it is ignored."""

    logprobs: Tensor
    """Of the label."""
    entropies: Tensor
    """Of the whole distribution, in nats."""


def linear_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (Vp, D)
    labels: Tensor,  # (...) int64, ids of the whole vocabulary
    *,
    bias: Tensor | None = None,  # (Vp,)
    softcap: float = 0.0,
    budget_bytes: int = 1 << 30,
    accum_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> LogProbs:
    """log softmax(hidden @ weight.T)[labels] and the entropies, both differentiable.

    Backward computes the logits of each chunk again: four products instead of the three of fused_linear_cross_entropy,
    whose arguments these are. A temperature divides the hidden states. There is no second derivative.

    Raises:
        ValueError: as fused_linear_cross_entropy.
        RuntimeError: one of torch.func's transforms, create_graph.
    """
    check_inputs(hidden, weight, labels, bias)
    valid = ValidRows.of(labels, hidden.device)
    logprobs, entropies, _ = operator(
        valid.take(hidden.reshape(-1, hidden.shape[-1]).contiguous()),
        weight,
        bias,
        valid.labels,
        Terms(len(weight), softcap=softcap).numbers,
        torch.promote_types(accum_dtype or weight.dtype, weight.dtype),
        budget_bytes,
        *VocabShard.to_arguments(shard),
    )
    return LogProbs(*(valid.put_back(values, 0).view(labels.shape) for values in (logprobs, entropies)))
