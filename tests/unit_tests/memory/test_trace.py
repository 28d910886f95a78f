"""The trace counts what autograd really keeps, run eagerly and compiled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchtitan.config.block_modes import SELECTIVE_MODES
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.context_parallel import context_attention
from torchtitan.memory.trace import Float8Linear, MemoryTrace, with_gpu_kernels
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import KEPT_RESULTS

ARGS = TransformerModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_hidden_dim=192, vocab_size=100)


def build(device: str, seq_len: int = 32) -> tuple[Transformer, Tensor]:
    """A model with one block, and an input for the block."""
    with torch.device(device):
        model = Transformer(replace(ARGS, max_seq_len=seq_len))
    model.init_buffers(device)
    return model, torch.zeros(2, seq_len, ARGS.dim, device=device, requires_grad=True)


def test_counts_every_tensor_once_and_until_it_is_freed() -> None:
    trace = MemoryTrace()
    given = torch.zeros(100)
    with trace:
        a = given + 1  # 400 bytes
        b = a.view(10, 10).t()  # the same memory
        both = trace.now
        c = torch.cat([a, a])
        del c
        after = trace.now
        d = b * 2
    assert trace.live(both) == 400
    assert trace.live(after) == 400
    assert trace.peak() == 1200
    assert trace.peak(end=both) == 400
    assert trace.live(trace.now) == 800
    del a, b, d


def test_kept_is_what_autograd_saves() -> None:
    model, x = build("cpu")
    saved: dict[int, int] = {}
    given = {t.untyped_storage().data_ptr() for t in (x, model.freqs_cis, *model.parameters())}

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in given:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    trace = MemoryTrace()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trace:
        y = model.layers["0"](x, model.freqs_cis[None])
    assert trace.live(trace.now) == sum(saved.values()) + y.nbytes


class Flash(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]


class OfContext(nn.Module):
    """As the first of two context ranks has it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        return context_attention(q, k, v, 0, 2, "")[0]


# Not OfContext by op, for which K and V of the whole sequence are kept: those of the rank, which op keeps too, are then
# needed no more, and the partitioner drops them.
@pytest.mark.parametrize(
    ("kernel", "option"),
    [(Flash, "none"), (Flash, "op"), (Flash, "attention"), (OfContext, "none"), (Flash, "float8")],
)
def test_kept_when_compiled_is_what_the_partitioner_keeps(option: str, kernel: type[nn.Module]) -> None:
    """Against AOTAutograd's partition of the same block, which is what torch.compile runs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    model, x = build("meta")
    block = model.layers["0"]
    block.attention.sdpa = kernel()
    if option == "float8":
        for linear in [module for module in block.modules() if type(module) is nn.Linear]:
            linear.__class__ = Float8Linear
    if option in SELECTIVE_MODES:
        apply_ac(model, [option], kept_results=KEPT_RESULTS)

    trace = MemoryTrace()
    with trace:
        y = block(x, model.freqs_cis[None])
    kept_until = trace.now
    with trace:
        torch.autograd.backward((y,), (torch.empty_like(y),))

    kept: dict[int, int] = {}

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        for node in outputs:
            if node is not None and node.op != "placeholder" and isinstance(node.meta["val"], Tensor):
                memory = node.meta["val"].untyped_storage()
                kept[memory._cdata] = memory.nbytes()
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=record,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    z = torch.compile(block.forward, backend=backend, fullgraph=True)(x, model.freqs_cis[None])
    torch._dynamo.reset()
    assert z.shape == y.shape
    # of a tensor that is cast to float8 the partitioner may keep the cast as well
    tolerance = 0.05 if option == "float8" else 0.01
    assert trace.live(kept_until, compiled=True) == pytest.approx(sum(kept.values()), rel=tolerance)
    if option == "none":  # by op no more is kept eagerly than what is named
        assert trace.live(kept_until, compiled=True) < 0.9 * trace.live(kept_until)


def test_with_gpu_kernels_no_score_matrix_is_made() -> None:
    model, x = build("meta", seq_len=1024)
    block, scores = model.layers["0"], 4 * 2 * 1024 * 1024 * ARGS.n_heads

    def peak() -> int:
        trace = MemoryTrace()
        with trace:
            block(x, model.freqs_cis[None])
        return trace.peak()

    assert peak() > scores
    block.forward = with_gpu_kernels(block.forward)
    assert peak() < scores


def test_compiled_backward_of_swiglu_has_its_three_results_beside_what_they_are_made_of() -> None:
    """The gate, the value and the gradient: one kernel, as the history of the allocator of a GPU shows."""
    with torch.device("meta"):
        w1, w3, w2 = nn.Linear(1, 100, bias=False), nn.Linear(1, 100, bias=False), nn.Linear(100, 1, bias=False)
        x = torch.empty(5000, 1)
    trace = MemoryTrace()
    with trace:
        y = checkpoint(lambda x: w2(F.silu(w1(x)) * w3(x)), x, use_reentrant=False)
    forward_ends = trace.now
    with trace:
        y.backward(torch.empty_like(y))
    wide = 5000 * 100 * x.itemsize
    assert trace.peak(start=forward_ends, compiled=True) == pytest.approx(6 * wide, rel=0.05)
