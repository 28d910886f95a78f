"""The two operators that walk over chunks of logits, registered with torch, so that it can compile and capture them.

| operator | products | what backward does |
|---|---|---|
| torchtitan::linear_cross_entropy | 3, all in forward | hands out the gradients, times what comes from above |
| torchtitan::linear_logprobs | 1, and 3 in backward | computes the logits again, for any gradients from above |

They take what torch's schemas know: tensors, numbers and text. `terms` are those of terms.py, and `shard` and `group`
what VocabShard.to_arguments gives. fused_linear.py and logprobs.py are what users call.

Shapes: T tokens, D model dim, V vocabulary, Vp this rank's rows of it, K statistics a token.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchtitan.components.loss.chunked_logits import ChunkedLogits, GradientProducts
from torchtitan.components.loss.gradients import multiply_
from torchtitan.components.loss.softmax_gradient import (
    MAX,
    cross_entropies,
    entropies,
    log_probability_coefficients,
    log_sum_exps,
    loss_coefficients,
    statistics_and_gradient_,
    write_gradient_,
)
from torchtitan.components.loss.terms import Terms, get_loss_dtype
from torchtitan.components.loss.vocab_shard import VocabShard


@torch.library.custom_op("torchtitan::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (Vp, D)
    bias: Tensor | None,  # (Vp,)
    labels: Tensor,  # (T,)
    factors: Tensor,  # () or (T,): scale, times token weights
    class_weights: Tensor | None,  # (V,)
    terms: Sequence[float],
    outputs: bool,
    needs: Sequence[bool],  # the gradients of hidden, weight and bias
    accum_dtype: torch.dtype,
    budget_bytes: int,
    shard: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the statistics (K, T), and the gradients, empty where they are not needed. No logits outlive it."""
    all_terms = _terms(weight, bias, class_weights, terms, outputs, shard)
    with _on_device_of(hidden):
        statistics = factors.new_empty(all_terms.num_statistics, len(hidden))
        gradients = GradientProducts(hidden, weight, bias, accum_dtype=accum_dtype, needs=needs)
        chunks = _chunks(hidden, weight, budget_bytes, shard, group)
        factors = factors.expand(len(hidden))
        _walk(chunks, labels, factors, all_terms, statistics, gradients if any(needs) else None)
        del chunks  # before the sum over chunks is cast
        losses = cross_entropies(statistics, labels, all_terms)
        if all_terms.z_loss:
            losses = losses + all_terms.z_loss * log_sum_exps(statistics, labels) ** 2
        return (losses * factors).sum(), statistics, *gradients.finish()


def _walk(
    chunks: ChunkedLogits,
    labels: Tensor,
    factors: Tensor,
    terms: Terms,
    statistics: Tensor,
    gradients: GradientProducts | None,
) -> None:
    """Fill the statistics, and add to the gradients."""
    if gradients is not None and not chunks.is_sharded:
        for i, rows in enumerate(chunks.rows):
            logits = chunks[i]
            statistics_and_gradient_(logits, labels[rows], factors[rows], statistics[:, rows], terms)
            gradients.add(rows, logits)
        return
    for rows, logits, found in chunks.with_statistics(labels, terms):
        statistics[:, rows] = found
        if gradients is not None:
            coefficients = loss_coefficients(found, labels[rows], factors[rows], terms)
            write_gradient_(logits, labels[rows], found[MAX], coefficients, terms)
            gradients.add(rows, logits)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor,
    class_weights: Tensor | None,
    terms: Sequence[float],
    outputs: bool,
    needs: Sequence[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    num_statistics = _terms(weight, bias, class_weights, terms, outputs, []).num_statistics
    return (
        factors.new_empty(()),
        factors.new_empty(num_statistics, len(hidden)),
        *_fake_gradients(hidden, weight, bias, needs),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.num_inputs = inputs[8], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _hand_out_gradients(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = [
        _times(g, d_loss) if is_needed else None for g, is_needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *gradients, *[None] * (ctx.num_inputs - 3)


linear_cross_entropy.register_autograd(_hand_out_gradients, setup_context=_save_gradients)


class EagerLinearCrossEntropy(torch.autograd.Function):
    """The same, (loss, statistics), without torch's way to an operator: a gradient that is an operator's output would
    be copied when it becomes that of a parameter."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, statistics, *gradients = linear_cross_entropy._init_fn(*inputs)
        ctx.needs, ctx.num_inputs = inputs[8], len(inputs)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(*gradients)
        return loss, statistics

    backward = staticmethod(_hand_out_gradients)


@torch.library.custom_op("torchtitan::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (Vp, D)
    bias: Tensor | None,  # (Vp,)
    labels: Tensor,  # (T,)
    terms: Sequence[float],
    accum_dtype: torch.dtype,
    budget_bytes: int,
    shard: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels and entropies, (T,) each, and the statistics (K, T)."""
    all_terms = _terms(weight, bias, None, terms, True, shard)
    with _on_device_of(hidden):
        chunks = _chunks(hidden, weight, budget_bytes, shard, group)
        statistics = hidden.new_empty(all_terms.num_statistics, len(hidden), dtype=get_loss_dtype(hidden))
        for rows, _, found in chunks.with_statistics(labels, all_terms):
            statistics[:, rows] = found
        return -cross_entropies(statistics, labels, all_terms), entropies(statistics, labels), statistics


@linear_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_token = hidden.new_empty(len(hidden), dtype=get_loss_dtype(hidden))
    return (
        of_token,
        torch.empty_like(of_token),
        of_token.new_empty(Terms(len(weight), outputs=True).num_statistics, len(hidden)),
    )


@torch.library.custom_op("torchtitan::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    d_logprobs: Tensor,  # (T,)
    d_entropies: Tensor,  # (T,)
    statistics: Tensor,  # (K, T)
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    terms: Sequence[float],
    accum_dtype: torch.dtype,
    budget_bytes: int,
    shard: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, empty where they are not needed."""
    all_terms = _terms(weight, bias, None, terms, True, shard)
    with _on_device_of(hidden):
        chunks = _chunks(hidden, weight, budget_bytes, shard, group)
        gradients = GradientProducts(hidden, weight, bias, accum_dtype=accum_dtype, needs=needs)
        for i, rows in enumerate(chunks.rows):
            coefficients = log_probability_coefficients(statistics[:, rows], d_logprobs[rows], d_entropies[rows])
            gradient = chunks[i]
            write_gradient_(gradient, labels[rows], statistics[MAX, rows], coefficients, all_terms)
            gradients.add(rows, gradient)
            del gradient
        del chunks  # before the sum over chunks is cast
        return gradients.finish()


@linear_logprobs_backward.register_fake
def _(
    d_logprobs: Tensor,
    d_entropies: Tensor,
    statistics: Tensor,
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, bias, needs)


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    if type(gradient) is not Tensor:  # traced: the compiler decides where the product goes
        return torch.where(gradient == 0, 0, gradient * factor.to(gradient.dtype))
    multiply_(gradient, factor)  # in memory of ours: OneBackward refuses to come here twice
    return gradient


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.options = inputs[4:]


def _compute_gradients(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, statistics = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_logprobs_backward(d_logprobs, d_entropies, statistics, needs, *inputs, *ctx.options)
    wanted = [g if is_needed else None for g, is_needed in zip(gradients, needs, strict=True)]
    return *wanted, None, *[None] * len(ctx.options)


linear_logprobs.register_autograd(_compute_gradients, setup_context=_save_inputs)


def _chunks(hidden: Tensor, weight: Tensor, budget_bytes: int, shard: Sequence[int], group: str) -> ChunkedLogits:
    return ChunkedLogits(hidden, weight, budget_bytes=budget_bytes, shard=VocabShard.from_arguments(shard, group))


def _terms(
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    numbers: Sequence[float],
    outputs: bool,
    shard: Sequence[int],
) -> Terms:
    start, vocab_size = (shard[0], shard[2]) if shard else (0, len(weight))
    softcap, z_loss, label_smoothing = numbers
    return Terms(vocab_size, start, bias, class_weights, softcap, z_loss, label_smoothing, outputs)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    d_hidden, d_weight, d_bias = (
        torch.empty_like(tensor) if is_needed and tensor is not None else hidden.new_empty(0)
        for tensor, is_needed in zip((hidden, weight, bias), needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
