"""In-tree fused linear cross entropy: the loss of hidden states without the (T, V) logits.

Shapes: T tokens, D model dim, V vocabulary, Vp this rank's rows of it, C tokens of one chunk, n ranks.

For each chunk of tokens, all in the forward pass:

    Z  = H W^T                     (C, Vp)  one buffer, reused, in the dtype of H; float32 inside the product
    G  = scale * (softmax(Z) - Y)  in place over Z (softmax_gradient.py), float32 inside
    dH = G W                       (C, D)   written once
    dW = dW + G^T H                (Vp, D)  the first chunk writes, the others add, in W's dtype or float32

Three matrix products, 6 T Vp D operations, none recomputed. Backward hands out dH and dW, times the upstream
gradient: on a GPU a kernel that returns at once when that is 1, so nothing waits for the host.

Memory beside dH and dW, in bytes of bf16: standard cross entropy, run eagerly, holds 2 T V of logits and 8 T V or more
of float32 softmax and gradient; this holds 2 C Vp, where C comes from a memory budget (chunking.py). For Llama 3 8B and
8192 tokens that is 1002 MiB of one chunk instead of 10958 (docs/performance.md). Each further chunk costs a read and a
write of dW.

Vocabulary sharded over n ranks (tensor parallel): H is gathered by the caller (vocab_shard.py), each rank computes
its own columns, and per chunk one small all-gather combines the statistics of the rows (chunked_logits.py).
dH is then a partial sum, which the caller's DTensor reduce-scatters once; dW needs no communication.

Liger's implementation differs in its chunk size (see liger.py), in its host syncs, and in knowing no sharded
vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from torchtitan.components.loss.gradients import OneBackward
from torchtitan.components.loss.operators import EagerLinearCrossEntropy, linear_cross_entropy
from torchtitan.components.loss.softmax_gradient import ARG_MAX, cross_entropies, entropies, log_sum_exps
from torchtitan.components.loss.terms import IGNORE_INDEX, Terms, get_loss_dtype
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.components.loss.valid_rows import ValidRows
from torchtitan.components.loss.vocab_shard import VocabShard, gather_hidden_local_weight, is_dtensor

if TYPE_CHECKING:
    from torchtitan.protocols.model import OutputHead

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class FusedLinearCrossEntropyLoss:
    """The in-tree loss behind the contract of all losses (`loss(hidden, head, labels, scale)`)."""

    takes_host_labels = True
    tells_tokens = True

    def __init__(
        self, *, budget_bytes: int, accum_dtype: torch.dtype | None = None, sums: TokenSums | None = None
    ) -> None:
        self._options: dict[str, Any] = {"budget_bytes": budget_bytes, "accum_dtype": accum_dtype}
        self._sums = sums or TokenSums()

    def __call__(
        self,
        hidden: Tensor,  # (B, S, D)
        head: "OutputHead",
        labels: Tensor,  # (B, S) int64
        scale: Tensor,  # () float32
    ) -> Tensor:
        return head.with_weight(partial(self._of_local_rows, labels=labels, scale=scale), hidden)

    def _of_local_rows(self, hidden: Tensor, weight: Tensor, *, labels: Tensor, scale: Tensor) -> Tensor:
        hidden, weight, shard = gather_hidden_local_weight(hidden, weight)
        sums = self._sums
        vocab_size = len(weight) if shard is None else shard.vocab_size
        terms = Terms(vocab_size, z_loss=sums.z_loss, outputs=sums.wants_predictions)
        loss, tokens = _find(hidden, weight, labels, terms, scale, shard=shard, **self._options)
        if sums.by_sequence:
            sums.of_sequences.append(tokens.losses().sum(-1))
        if sums.wants_predictions:
            entropies, _, correct = tokens.predictions()
            sums.add_predictions(correct, entropies)
        if not sums.z_loss:
            return loss
        return sums.z_loss_apart(loss, sums.z_loss * tokens.log_sum_exps().square().sum(), scale)


class LossOutputs(NamedTuple):
    """The loss, and what is known of each token when it is: (...) as the labels, without a gradient.

    Ignored tokens have 0, as arg max IGNORE_INDEX, and are not correct.
    """

    loss: Tensor
    """(), the same that the plain call gives."""
    token_losses: Tensor
    """Cross entropies, without z-loss, token weights and scale."""
    log_sum_exps: Tensor
    entropies: Tensor
    """In nats."""
    arg_max: Tensor
    """int64, ids of the whole vocabulary; the first of equals."""
    correct: Tensor
    """Whether the label is the arg max."""


@overload
def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_outputs: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_outputs: Literal[True], **options: Any
) -> LossOutputs: ...
def fused_linear_cross_entropy(  # type: ignore[misc]  # the overloads know of the other options by name only
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (Vp, D)
    labels: Tensor,  # (...) int64, ids of the whole vocabulary
    *,
    return_outputs: bool = False,
    scale: Tensor | float = 1.0,
    token_weights: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (Vp,)
    class_weights: Tensor | None = None,  # (V,)
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    budget_bytes: int = 1 << 30,
    accum_dtype: torch.dtype | None = None,
    shard: VocabShard | None = None,
) -> Tensor | LossOutputs:
    """`scale * sum of cross entropies` of `hidden @ weight.T`, () float32, without materialising those logits.

    Args:
        labels: on the device, or on the host: then ignored tokens are left out of all products, without waiting for
            the device.
        return_outputs: also give what is known of each token.
        scale: a number, or a 0-dim tensor on the device, which is not read by the host. It gets no gradient. In float16
            a loss scaler's factor belongs into it: the gradients are rounded with `scale` inside.
        token_weights: what each token's loss is multiplied by. They get no gradient.
        bias: added to the logits; it gets a gradient.
        class_weights, label_smoothing: as in torch.nn.functional.cross_entropy.
        softcap: the logits are `softcap * tanh(logits / softcap)`, after the bias; 0 leaves them as they are.
        z_loss: adds `z_loss * log_sum_exp ** 2` to each token's loss.
        budget_bytes: memory for the logits of one chunk.
        accum_dtype: dtype of the weight gradient's sum over chunks; None is the weight's own.
        shard: which rows of the vocabulary `weight` and `bias` hold; None means all. Each rank of its group must pass
            the same of all else; the hidden gradient is this rank's partial sum.

    Tokens labelled -100 are ignored; if all are, the loss is 0 and so are the gradients. Any other label outside the
    vocabulary makes the loss infinite: to raise an error, the host would have to wait for the device.

    Only the gradients that something asks for are computed: two products with the weight or the hidden states frozen,
    one with both. There is one backward, and no second derivative. float64 is computed in float64, and gives a float64
    loss. terms.py has the formula.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or are none that the loss can be computed with; a
            number is negative or not finite.
        RuntimeError: a second backward, create_graph, or one of torch.func's transforms.
    """
    terms = Terms(
        vocab_size=len(weight) if shard is None else shard.vocab_size,
        bias=bias,
        class_weights=None
        if class_weights is None
        else class_weights.detach().to(hidden.device, get_loss_dtype(hidden)),
        softcap=softcap,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        outputs=return_outputs,
    )
    options: dict[str, Any] = {"budget_bytes": budget_bytes, "accum_dtype": accum_dtype, "shard": shard}
    loss, tokens = _find(hidden, weight, labels, terms, scale, token_weights, **options)
    return LossOutputs(loss, tokens.losses(), tokens.log_sum_exps(), *tokens.predictions()) if return_outputs else loss


@dataclass(frozen=True)
class _Tokens:
    """What was found of the tokens, from which is computed what is asked for, (...) as the labels."""

    statistics: Tensor  # (K, T) of those that were walked over
    valid: ValidRows
    terms: Terms
    shape: torch.Size

    def losses(self) -> Tensor:
        return self._of_all(cross_entropies(self.statistics, self.valid.labels, self.terms))

    def log_sum_exps(self) -> Tensor:
        return self._of_all(log_sum_exps(self.statistics, self.valid.labels))

    def predictions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entropies, the arg max, and whether it is the label; they need `terms.outputs`."""
        labels = self.valid.labels
        arg_max = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, self.statistics[ARG_MAX].long())
        is_correct = (arg_max == labels) & (labels != IGNORE_INDEX)
        found = self._of_all(entropies(self.statistics, labels))
        return found, self._of_all(arg_max, IGNORE_INDEX), self._of_all(is_correct)

    def _of_all(self, values: Tensor, fill: float = 0) -> Tensor:
        return self.valid.put_back(values, fill).view(self.shape)


def _find(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (Vp, D)
    labels: Tensor,  # (...)
    terms: Terms,
    scale: Tensor | float,
    token_weights: Tensor | None = None,  # (...)
    *,
    budget_bytes: int,
    accum_dtype: torch.dtype | None,
    shard: VocabShard | None,
) -> tuple[Tensor, _Tokens]:
    """The loss, (), and what is known of the tokens."""
    check_inputs(hidden, weight, labels, terms.bias)
    dtype, device, shape = get_loss_dtype(hidden), hidden.device, labels.shape
    _check_shape("class_weights", terms.class_weights, torch.Size([terms.vocab_size]))
    _check_shape("token_weights", token_weights, shape)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dtype, device=device)
    if scale.ndim != 0:
        raise ValueError(
            f"scale must be a number or a 0-dim tensor, got the shape {tuple(scale.shape)}; use token_weights"
        )
    scale = scale.detach().to(device, dtype)

    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, terms.bias)]
    valid = ValidRows.of(labels, device)
    # copies only where they are not contiguous
    hidden, labels = valid.take(hidden.reshape(-1, hidden.shape[-1]).contiguous()), valid.labels
    if token_weights is not None:
        weights = valid.take(token_weights.detach().to(device, dtype).flatten())
        scale = torch.where(labels == IGNORE_INDEX, 0.0, scale * weights)
    walk = linear_cross_entropy if torch.compiler.is_compiling() else EagerLinearCrossEntropy.apply
    loss, statistics, *_ = walk(
        hidden,
        weight,
        terms.bias,
        labels,
        scale,
        terms.class_weights,
        terms.numbers,
        terms.outputs,
        needs,
        torch.promote_types(accum_dtype or weight.dtype, weight.dtype),
        budget_bytes,
        *VocabShard.to_arguments(shard),
    )
    if not torch.compiler.is_compiling():  # a compiled graph goes backward as often as it is asked to
        loss = OneBackward.apply(loss)
    return loss, _Tokens(statistics.detach(), valid, terms, shape)


def check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func's transforms (vmap, grad, jvp, ...) do not know the fused linear cross entropy: "
            "use torch.autograd and a batch dim of the hidden states, or cross_entropy_sum of the logits"
        )
    if is_dtensor(weight):
        raise ValueError("the weight is sharded: gather it, or call the loss through OutputHead.with_weight")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1] or weight.ndim != 2:
        raise ValueError(
            "expected hidden (..., D), weight (V, D) and labels (...), "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            "hidden and weight must have one dtype, bfloat16, float16, float32 or float64,"
            f" got {hidden.dtype} and {weight.dtype}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if hidden.device != weight.device or labels.device not in (hidden.device, torch.device("cpu")):
        devices = f"{hidden.device}, {weight.device} and {labels.device}"
        raise ValueError(f"hidden, weight and labels must be on one device, got {devices}")
    _check_shape("bias", bias, weight.shape[:1])


def _check_shape(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
