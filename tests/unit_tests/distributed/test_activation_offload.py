"""What waits on the host comes back bit by bit, in time, and to memory that nothing else uses."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit_tests.distributed.layouts import ARGS, get_batch, get_gradients, loss_sum
from torchtitan.config.block_modes import BlockMode
from torchtitan.distributed import activation_offload
from torchtitan.distributed.activation_checkpoint import apply_ac, set_block_modes
from torchtitan.distributed.activation_offload import Offloader, _Copies, _Kept, apply_offload
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer

N_LAYERS = 4
NONE: Sequence[BlockMode] = ["none"] * N_LAYERS
CPU = torch.device("cpu")
HIDDEN_BYTES = 4 * 16 * 32 * 4


class Recorded(_Copies):
    """Copies that tell what they do."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.log: list[str] = []
        self.chunks_made = 0

    def to_host(self, tensors: Iterable[_Kept]) -> None:
        tensors = list(tensors)
        self.log += [f"to host: {len(tensors)}"] * bool(tensors)
        super().to_host(tensors)

    def to_device(self, tensors: Iterable[_Kept]) -> None:
        tensors = list(tensors)
        self.log += [f"to device: {len(tensors)}"] * bool(tensors)
        super().to_device(tensors)

    def take(self, kept: _Kept) -> Tensor:
        self.log.append("take")
        return super().take(kept)

    def _allocate(self) -> Tensor:
        self.chunks_made += 1
        return super()._allocate().fill_(255)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    made = Recorded()
    monkeypatch.setattr(activation_offload, "MIN_BYTES", HIDDEN_BYTES)  # the rotary table is smaller, and the LSEs
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 3000)  # a tensor takes three, and not the whole of the last
    monkeypatch.setattr(activation_offload, "_Copies", lambda device: made)
    return made


def build(modes: Sequence[BlockMode], *, compiled: bool = False, offload: bool = True) -> Transformer:
    model = Transformer(ARGS(n_layers=N_LAYERS))
    init_parameters(model, seed=7, device="cpu")
    apply_ac(model, modes)
    if compiled:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    if offload:
        apply_offload(model, CPU)
    return model


def step(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    tokens, labels = get_batch()
    loss_sum(model(tokens), labels).backward()
    return get_gradients(model)


def check(gradients: dict[str, Tensor]) -> None:
    expected = step(build(NONE, offload=False))
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


# Compiled, the graph keeps attention's result too; run eagerly, torch.utils.checkpoint has it.
@pytest.mark.parametrize(
    ("mode", "compiled", "num"), [("full", False, 1), ("attention", False, 1), ("attention", True, 2)]
)
def test_gradients_are_the_same_bits_and_copies_are_a_block_ahead(
    mode: BlockMode, compiled: bool, num: int, copies: Recorded
) -> None:
    torch._dynamo.reset()
    model = build([mode] * N_LAYERS, compiled=compiled)
    gc.disable()  # the host's memory is to be free again without it
    try:
        for _ in range(3):
            copies.log.clear()
            check(step(model))
            to_host, to_device, takes = f"to host: {num}", f"to device: {num}", ["take"] * num
            # what the last block keeps stays; at its backward comes that of the one before it
            assert copies.log == [*[to_host] * 3, to_device, to_device, *takes, to_device, *takes, *takes]
            assert copies.chunks_made == 3 * num * 3
    finally:
        gc.enable()


def test_only_lean_blocks_move_what_they_keep_and_modes_may_change(copies: Recorded) -> None:
    model = build(["full", "none", "attention", "op"])
    check(step(model))
    assert copies.log == ["to host: 1"] * 2 + ["to device: 1", "take", "to device: 1", "take"]
    copies.log.clear()
    set_block_modes(model, NONE)
    check(step(model))
    assert copies.log == []


def test_after_forward_nothing_is_left_on_the_device(copies: Recorded) -> None:
    model = build(["full"] * N_LAYERS)
    offloader: Any = model.layers["0"].forward.func.__self__  # type: ignore[union-attr]
    loss = loss_sum(model(get_batch()[0]), get_batch()[1])
    kept = [kept for of_block in offloader._kept.values() for kept in of_block]
    assert len(kept) == N_LAYERS - 1
    assert all(one.on_device is None for one in kept)
    for chunk in copies._pool:
        chunk.fill_(255)  # belongs to none of them
    loss.backward()
    check(get_gradients(model))
    assert all(one.on_device is None for one in kept)


def test_a_step_that_was_given_up_leaves_no_trace(copies: Recorded) -> None:
    """As after an out-of-memory error: in forward, and in backward when a copy is on its way."""
    model = build(["full"] * N_LAYERS)
    tokens, labels = get_batch()
    loss_sum(model(tokens), labels)

    def fail(grad: Tensor) -> None:
        raise torch.OutOfMemoryError

    for number in ("1", "2"):
        hook = model.layers[number].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
        with pytest.raises(torch.OutOfMemoryError):
            loss_sum(model(tokens), labels).backward()
        hook.remove()
    with torch.no_grad():
        model(tokens)  # a validation moves nothing
    check(step(model))
    assert copies.chunks_made <= 2 * 9


def test_what_lies_apart_in_memory_stays_and_another_order_of_dims_is_kept(copies: Recorded) -> None:
    offloader = Offloader(CPU)
    whole = torch.randn(16, 32, 32)
    for tensor in (whole[..., ::2], whole[:1].expand(16, 32, 32), whole[0], nn.Parameter(whole)):
        assert offloader._pack(tensor) is tensor
    turned = whole.permute(2, 0, 1)
    kept = offloader._pack(turned)
    assert isinstance(kept, _Kept)
    copies.to_host([kept])
    copies.release([kept])
    for _ in range(2):  # as backward may
        back = offloader._unpack(kept)
        assert back.stride() == turned.stride()
        assert torch.equal(back, turned)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_gradients_are_right_and_memory_is_free(compiled: bool) -> None:
    """The compute stream is behind the host, so that a copy that does not wait for it copies what is not there yet."""
    device = torch.device("cuda")
    args = ARGS(dim=512, n_layers=8, n_heads=4, n_kv_heads=2, ffn_hidden_dim=1024, max_seq_len=4096)
    # not of the squares: a norm's output has all the same, so that their gradient would be what is rounded
    target = torch.randn(args.dim, device=device, generator=torch.Generator(device).manual_seed(2))
    found: list[tuple[int, dict[str, Tensor]]] = []
    for offload in (False, True):
        torch._dynamo.reset()
        model = Transformer(args).to(device)
        model.init_buffers(device)
        init_parameters(model, seed=7, device=device)
        model.to(torch.bfloat16)
        model.init_buffers(device)
        apply_ac(model, ["attention", "full"] * 4)
        if compiled:
            apply_compile(model)
        if offload:
            apply_offload(model, device)
        tokens = torch.randint(101, (8, 4096), device=device, generator=torch.Generator(device).manual_seed(1))
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda._sleep(200_000_000)
            hidden = model(tokens, return_hidden_states=True)
            kept = torch.cuda.memory_allocated() - before
            (hidden.float() * target).mean().backward()
            del hidden
        found.append((kept, get_gradients(model.layers)))
    (kept, expected), (kept_with_offload, gradients) = found
    hidden_bytes = tokens.numel() * 512 * 2
    assert kept - kept_with_offload >= 6 * hidden_bytes  # of seven inputs
    for name, gradient in gradients.items():  # attention's backward adds up in any order
        assert expected[name].norm() > 0, name
        assert (gradient - expected[name]).norm() < 0.02 * expected[name].norm(), name
