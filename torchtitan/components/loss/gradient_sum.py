"""Gradients that add up over chunks in a dtype of their own; the first writes, so that nothing is filled with zeros."""

import torch
from torch import Tensor


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """`total += a @ b`, or `total = a @ b` if it is the first; the product has the dtype of `total`."""
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


class WeightGradient:
    """The sum over chunks of G^T H, for all rows of the weight or, in their order, for some of them at a time."""

    def __init__(self, weight: Tensor, accum_dtype: torch.dtype) -> None:
        self._sum = torch.empty_like(weight, dtype=accum_dtype, memory_format=torch.contiguous_format)
        self._dtype = weight.dtype
        self._num_written = 0
        """Rows that hold something; those after them hold nothing yet."""

    def add(
        self,
        gradient: Tensor,  # (C, W), of W words' logits
        hidden: Tensor,  # (C, D)
        first_word: int = 0,
    ) -> None:
        end = first_word + gradient.shape[1]
        add_product_(self._sum[first_word:end], gradient.t(), hidden, is_first=first_word >= self._num_written)
        self._num_written = max(self._num_written, end)

    def claim(self) -> Tensor:
        """The memory of the sum, for the caller to write the first chunk's share."""
        assert self._num_written == 0
        self._num_written = len(self._sum)
        return self._sum

    def finish(self) -> Tensor:
        self._sum[self._num_written :].zero_()  # there were no tokens
        return self._sum.to(self._dtype)
