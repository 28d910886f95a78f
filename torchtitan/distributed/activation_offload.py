"""What recomputed blocks keep for backward waits in the machine's memory, copied there and back behind the computation.

A block that is recomputed keeps its input, and attention's result where that is not recomputed: in bf16, of 131,072
tokens of 4096, 1 GiB each. Only two blocks' are then on the GPU at a time. Compute and copies are two streams:

    compute   | forward 1 | forward 2 | forward 3 | ... | backward 3 | backward 2 | backward 1 |
    copies                | 1 to host | 2 to host | ... | 2 to GPU   | 1 to GPU   |

The last block's stays where it is, since its backward comes first. A copy to the host begins when what the block
computes has been issued, and waits for it on the GPU; torch's allocator may have the memory again when the next block
has been issued and the compute stream has been told to wait for the copy, since it gives memory out in that stream's
order. A copy back begins when the backward of the block behind it does, into memory of the compute stream, for which it
waits. The host waits for neither.

What a block keeps is what autograd saves while its forward runs, by the hooks of torch.autograd.graph: run eagerly that
is its input alone (what is kept inside torch.utils.checkpoint no hook sees); compiled it is all that the graph keeps.
Weights and what all blocks share stay.

The host's memory is page-locked, in chunks that serve one tensor after the other, in later steps too: to lock it takes
seconds, to copy through memory that is not locked takes as long as the computation.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from torchtitan.config.block_modes import OFFLOADED_MODES
from torchtitan.protocols.model import Decoder

CHUNK_BYTES = 64 << 20
"""Of page-locked memory; torch would round up what is no power of two."""

MIN_BYTES = 1 << 20
"""What is smaller stays."""


def apply_offload(model: Decoder, device: torch.device) -> "Offloader":
    """Have blocks move what they keep, in place; behind compilation, inside FSDP's hooks.

    On a CPU everything is the same but for the streams: what is kept is copied.
    """
    offloader = Offloader(device)
    blocks: list[Any] = list(model.layers.values())
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        block.forward = partial(offloader.forward, block, block.forward, number, may_move=not is_last)
    return offloader


class Offloader:
    """The copies of one model's blocks."""

    def __init__(self, device: torch.device) -> None:
        self._copies = _Copies(device)
        self._device = device
        self._kept: dict[int, list[_Kept]] = {}
        """Of the last forward, by block."""
        self._open: list[_Kept] = []
        self._staying: set[int] = set()
        self._hooks = self._pack, self._unpack
        """The same at each call, lest compiled blocks compile anew."""

    def forward(self, block: nn.Module, forward: Any, number: int, *args: Any, may_move: bool) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        if number == 0:
            self._forget()
        self._open = []
        if may_move and block.block_mode in OFFLOADED_MODES:
            self._staying = {_address(memory) for memory in _storages((*args[1:], *block.parameters()))}
            with saved_tensors_hooks(*self._hooks):
                out = forward(*args)
            self._copies.to_host(self._open)
        else:
            out = forward(*args)
        self._kept[number] = self._open
        self._copies.release(self._kept.get(number - 1, ()))
        if out.requires_grad:
            out.register_hook(partial(self._start_backward, number))
        return out

    def _forget(self) -> None:
        """What is left of a forward whose backward did not come, or of one that used all, in which case nothing is."""
        for kept in self._kept.values():
            self._copies.release(kept)
        self._kept.clear()

    def _start_backward(self, number: int, grad: Tensor) -> None:
        """Called with the gradient of a block's output."""
        for block in (number, number - 1):
            self._copies.to_device(kept for kept in self._kept.get(block, ()) if kept.on_device is None)

    def _pack(self, tensor: Tensor) -> "Tensor | _Kept":
        if (
            type(tensor) is not Tensor
            or tensor.device.type != self._device.type
            or tensor.nbytes < MIN_BYTES
            or _span(tensor) != tensor.numel()
            or _address(tensor) in self._staying
        ):
            return tensor
        self._open.append(_Kept(tensor))
        return self._open[-1]

    def _unpack(self, packed: "Tensor | _Kept") -> Tensor:
        return packed if isinstance(packed, Tensor) else self._copies.take(packed)


class _Kept:
    """One tensor, on the device or on the host or on the way."""

    def __init__(self, tensor: Tensor) -> None:
        self.on_device: Tensor | None = tensor.detach()
        self.like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.chunks: list[Tensor] = []
        """On the host; none before it is copied there."""
        self.copied: Any = None
        """The event behind the last copy."""
        self.pool: list[Tensor] = []

    def __del__(self) -> None:
        self.pool.extend(self.chunks)  # for copies on the same stream, behind those from here


class _Copies:
    """The second stream, and the host's memory. On a CPU there is one stream, and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: list[Tensor] = []

    def to_host(self, tensors: Iterable[_Kept]) -> None:
        """Begin to copy; what is on the device must stay until `release`."""
        for kept in tensors:
            assert kept.on_device is not None
            source = _flat_bytes(kept.on_device)
            kept.pool = self._pool
            kept.chunks = [self._pool.pop() if self._pool else self._allocate() for _ in source.split(CHUNK_BYTES)]
            with self._behind_computation():
                for part, chunk in zip(source.split(CHUNK_BYTES), kept.chunks, strict=True):
                    chunk[: part.numel()].copy_(part, non_blocking=True)
            kept.copied = self._record()

    def release(self, tensors: Iterable[_Kept]) -> None:
        """Give the device's memory back where there is a copy on the host, or one was on its way back in vain."""
        for kept in tensors:
            if kept.chunks and kept.on_device is not None:
                self._wait(kept)
                kept.on_device = None

    def to_device(self, tensors: Iterable[_Kept]) -> None:
        """Begin to copy back."""
        for kept in tensors:
            kept.on_device = torch.empty_strided(
                kept.like.shape, kept.like.stride(), dtype=kept.like.dtype, device=self._device
            )
            with self._behind_computation():  # which may use that memory still
                for part, chunk in zip(_flat_bytes(kept.on_device).split(CHUNK_BYTES), kept.chunks, strict=True):
                    part.copy_(chunk[: part.numel()], non_blocking=True)
            kept.copied = self._record()

    def take(self, kept: _Kept) -> Tensor:
        """The tensor, for the computation; asked for again, it is copied again."""
        if kept.on_device is None:
            self.to_device([kept])
        self._wait(kept)
        tensor = kept.on_device
        assert tensor is not None
        if kept.chunks:
            kept.on_device = None  # whoever computes with it frees it
        return tensor

    def _allocate(self) -> Tensor:
        return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)

    @contextmanager
    def _behind_computation(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _record(self) -> Any:
        return None if self._stream is None else self._stream.record_event()

    def _wait(self, kept: _Kept) -> None:
        """Before what the computation does next; the host does not wait."""
        if kept.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(kept.copied)


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory: no more than there are, where dims are only ordered otherwise."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flat_bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor, however its dims are ordered."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _storages(values: Any) -> Iterator[Tensor]:
    """The plain tensors in `values`, also those that others, such as DTensors, are made of."""
    for value in tree_leaves(values):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        elif isinstance(value, Tensor):
            yield value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
