"""Which tensors exist when, found out by running code on the meta device: real shapes, no memory, no arithmetic.

    block.forward = with_gpu_kernels(block.forward)
    with MemoryTrace() as trace:
        y = block(x)
        forward_ends = trace.now
        y.backward(torch.empty_like(y))
    trace.peak(end=forward_ends), trace.live(forward_ends), trace.peak(start=forward_ends)

Counted are the tensors that the traced code makes, not those that it is given. Run eagerly each lives from the
operation that makes it until Python or autograd lets go of it. Compiled (`compiled=True`) fewer exist: inductor fuses
an elementwise operation or a reduction into its readers, so that its result is in memory only if a matrix product,
attention or a collective makes or reads it, or if it outlives the traced code; what is not in memory is computed again
from its inputs, which therefore live until its last reader has run. Results of one size that are fused from a common
tensor are made by one kernel, when the last of them can be: of SwiGLU's backward, whose three results are in memory
beside the three that they are made of.
"""

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_KERNELS = {
    *("aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_mm"),
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward"),
    *("torchtitan::context_attention", "torchtitan::context_attention_backward"),
    *("torchtitan::document_attention", "torchtitan::document_attention_backward"),
    *("aten::embedding", "aten::embedding_dense_backward"),
}
"""What inductor calls a kernel of its own for, as for collectives, instead of fusing it with its neighbours."""


@dataclass
class _Storage:
    """The life of one tensor's memory, in numbers of operations."""

    nbytes: int
    start: int
    end: float = math.inf
    last_read: int = 0
    in_memory_when_compiled: bool = False
    is_fused: bool = False
    """When compiled, it may be made together with others."""
    graph: int = 0
    """Which of the traced parts makes it; each is compiled by itself."""
    inputs: list["_Storage"] = field(default_factory=list)
    """What it is computed from."""
    ancestors: set[int] = field(default_factory=set)
    """Of all that it is computed from, the `id`."""
    sources: set[int] = field(default_factory=set)
    """Of what a kernel made that it is fused from, the `id`."""


class MemoryTrace(TorchDispatchMode):
    """Records the tensors that are made inside it; code may be traced in several parts, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Operations so far."""
        self._graph = 0
        self._made: list[_Storage] = []
        self._known: dict[int, _Storage | None] = {}  # by address; None: given, not made here

    def peak(self, *, start: int = 0, end: float = math.inf, compiled: bool = False) -> int:
        """Bytes, at the worst moment from operation `start` up to operation `end`."""
        changes: list[tuple[float, int]] = []
        for storage, storage_end in self._lives(compiled):
            if storage.start <= end and storage_end > start + 1:
                changes += [(max(storage.start, start), storage.nbytes), (storage_end, -storage.nbytes)]
        live = peak = 0
        for _, change in sorted(changes):  # at one moment, what is freed comes first
            live += change
            peak = max(peak, live)
        return peak

    def live(self, moment: int, *, compiled: bool = False) -> int:
        """Bytes after operation `moment`."""
        return sum(s.nbytes for s, end in self._lives(compiled) if s.start <= moment and end > moment + 1)

    def __enter__(self) -> Self:
        self._graph += 1
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, FakeTensor) for t in types):
            return func(*args, **(kwargs or {}))  # DTensor asks for the shape of a result
        if any(issubclass(t, Tensor) and t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a DTensor comes apart first, and its local operations come here
        given = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for memory in given:
            if memory._cdata not in self._known:
                self._remember(memory, None)
        inputs = [self._known[memory._cdata] for memory in given]
        result = func(*args, **(kwargs or {}))
        self.now += 1
        read = [] if func.is_view else [storage for storage in inputs if storage is not None]
        is_kernel = func.namespace == "_c10d_functional" or func._schema.name in _KERNELS
        for storage in read:
            storage.last_read = self.now
            storage.in_memory_when_compiled |= is_kernel
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            memory = tensor.untyped_storage()
            if memory._cdata not in self._known:
                storage = self._make(memory.nbytes(), is_kernel, read)
                storage.is_fused = not is_kernel and tensor.itemsize > 1  # one of 8 bits first waits for its scale
                self._made.append(storage)
                self._remember(memory, storage)
        return result

    def _make(self, nbytes: int, is_kernel: bool, inputs: list[_Storage]) -> _Storage:
        storage = _Storage(nbytes, self.now, in_memory_when_compiled=is_kernel, inputs=inputs, graph=self._graph)
        for source in inputs:
            storage.ancestors |= {id(source), *source.ancestors}
            storage.sources |= source.sources if source.is_fused else {id(source)}
        return storage

    def _remember(self, memory: torch.UntypedStorage, storage: _Storage | None) -> None:
        address = memory._cdata
        self._known[address] = storage

        def forget() -> None:
            del self._known[address]  # it may be used again
            if storage is not None:
                storage.end = self.now + 1

        weakref.finalize(memory, forget)

    def _lives(self, compiled: bool) -> Iterable[tuple[_Storage, float]]:
        """Each tensor that is in memory, and the operation before which it is freed."""
        if not compiled:
            return [(storage, storage.end) for storage in self._made]
        last_read: dict[int, float] = {}
        for storage in reversed(self._made):  # readers before what they read
            end = max(storage.start + 1.0, storage.last_read + 1.0, last_read.get(id(storage), 0.0))
            last_read[id(storage)] = end
            if not storage.in_memory_when_compiled and storage.end < math.inf:
                for source in storage.inputs:
                    last_read[id(source)] = max(end, last_read.get(id(source), 0.0))
        in_memory = [storage for storage in self._made if storage.in_memory_when_compiled or storage.end == math.inf]
        for first, later in itertools.combinations([storage for storage in in_memory if storage.is_fused], 2):
            is_alike = (first.graph, first.nbytes) == (later.graph, later.nbytes) and first.sources & later.sources
            if is_alike and id(first) not in later.ancestors:
                last_read[id(first)] = max(last_read[id(first)], later.start + 1.0)
        return [(storage, storage.end if storage.end == math.inf else last_read[id(storage)]) for storage in in_memory]


def with_gpu_kernels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, in which attention and RMSNorm are one operation each, as on a GPU.

    On the meta device torch composes them of small ones, which need far more memory.
    """

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _GPUKernels():
            return forward(*args, **kwargs)

    return wrapped


class _GPUKernels(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention(*args[:3], is_causal=True)[0]
        if func is F.rms_norm and kwargs.get("weight") is not None:
            return _RMSNormKernel.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


class _RMSNormKernel(torch.autograd.Function):
    """As much memory as torch's CUDA kernel takes, at the same moments; the values are of no interest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())  # the last is 1 / RMS of each row
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.addcmul(x, grad, weight), torch.empty_like(weight)


class Float8Linear(torch.nn.Linear):
    """As much memory as torchao's layer takes, which is another package; the values are of no interest."""

    def forward(self, x: Tensor) -> Tensor:
        return _Float8Products.apply(x, self.weight.to(x.dtype))


class _Float8Products(torch.autograd.Function):
    """Keeps what it is given, not its casts: to recompute those is cheap, and compiled code does the same by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(_cast(x.flatten(0, -2)), _cast(weight).t(), x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad8, x8 = _cast(grad.flatten(0, -2)), _cast(x.flatten(0, -2))
        d_x = _product(grad8, _column_major(_cast(weight)), x.dtype).view_as(x)
        return d_x, _product(grad8.t().contiguous(), _column_major(x8), weight.dtype)


def _cast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


def _column_major(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.empty((), device=a.device)
    return torch._scaled_mm(a, b, scale, scale, out_dtype=dtype)
