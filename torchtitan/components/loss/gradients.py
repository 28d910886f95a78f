"""Gradients that are known in the forward pass: how they add up over chunks, and how backward hands them out, once."""

from typing import Any

import torch
from torch import Tensor


def runs_on_triton(tensor: Tensor) -> bool:
    """Whether our kernels take it; float64 goes through plain torch code on every device."""
    return tensor.is_cuda and tensor.dtype != torch.float64


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """`total += a @ b`, or `total = a @ b` if it is the first: nothing is filled with zeros before."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if is_first else total.addmm_(a, b)
    elif a.is_cuda:
        # the product's own float32 result; these overloads exist on CUDA only
        if is_first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.mm(a, b, out=total) if is_first else total.addmm_(a, b)


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply in place by a 0-dim tensor; on a GPU the host does not read it, and it costs nothing when it is 1.

    What is 0 stays 0, whatever the factor: ignored tokens have no gradient, also where inf or nan comes from above.
    """
    if runs_on_triton(gradient):
        from torchtitan.components.loss import softmax_gradient_triton

        softmax_gradient_triton.multiply_unless_one_(gradient, factor)
    elif gradient.is_cuda or factor != 1:
        is_zero = gradient == 0
        gradient.mul_(factor).masked_fill_(is_zero, 0)


class OneBackward(torch.autograd.Function):
    """The identity, for a loss whose gradients backward hands out: they can be had once, and have no graph."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        ctx.has_run = False
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError(
                "the fused linear cross entropy has no second derivative: leave create_graph off, "
                "or use cross_entropy_sum of the logits"
            )
        if ctx.has_run:
            raise RuntimeError(
                "the fused linear cross entropy goes backward once, since its gradients are handed out and not copied: "
                "call the loss again, or go backward through the sum of all that is made of it"
            )
        ctx.has_run = True
        return grad
