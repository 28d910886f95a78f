from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit_tests.distributed.layouts import ARGS, get_batch, get_gradients, loss_sum
from torchtitan.config.block_modes import BlockMode
from torchtitan.distributed.activation_checkpoint import apply_ac, set_block_modes
from torchtitan.distributed.context_parallel import context_attention
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import KEPT_RESULTS

N_LAYERS = 4
NONE: list[BlockMode] = ["none"] * N_LAYERS
FULL: list[BlockMode] = ["full"] * N_LAYERS
EVERY_SECOND_BLOCK: list[BlockMode] = ["none", "full"] * (N_LAYERS // 2)
EVERY_OP: list[BlockMode] = ["op"] * N_LAYERS
EVERY_ATTENTION: list[BlockMode] = ["attention"] * N_LAYERS


class OpCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def run(modes: list[BlockMode], **options: Any) -> tuple[dict[str, Tensor], Counter[str]]:
    """The gradients of one step, and how often each operation ran in its backward."""
    model = Transformer(ARGS(n_layers=N_LAYERS))
    init_parameters(model, seed=7, device="cpu")
    apply_ac(model, modes, **options)
    tokens, labels = get_batch()
    loss = loss_sum(model(tokens), labels)
    with OpCounter() as backward:
        loss.backward()
    return get_gradients(model), backward.counts


@pytest.mark.parametrize("modes", [FULL, EVERY_SECOND_BLOCK, EVERY_OP, EVERY_ATTENTION])
def test_gradients_do_not_change(modes: list[BlockMode]) -> None:
    gradients, _ = run(modes)
    for name, expected in run(NONE)[0].items():
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=0)


def test_recomputation_is_as_asked() -> None:
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    mm: dict[str, int] = {}
    sdpa: dict[str, int] = {}
    cases = {"none": NONE, "full": FULL, "second": EVERY_SECOND_BLOCK, "op": EVERY_OP, "attention": EVERY_ATTENTION}
    for name, modes in cases.items():
        counts = run(modes, kept_results=KEPT_RESULTS if name == "attention" else ())[1]
        mm[name], sdpa[name] = counts["mm"], counts[attention]
    assert sdpa == {"none": 0, "full": N_LAYERS, "second": N_LAYERS // 2, "op": 0, "attention": 0}
    # Of a block's seven products the last is never needed again.
    assert mm["full"] - mm["none"] == 6 * N_LAYERS
    assert mm["second"] - mm["none"] == 6 * N_LAYERS // 2
    assert mm["attention"] - mm["none"] == 6 * N_LAYERS  # no product is kept, whichever are named
    assert mm["op"] - mm["none"] == 6 * N_LAYERS  # attention alone is kept, unless modules are named
    assert run(EVERY_OP, kept_results=KEPT_RESULTS)[1]["mm"] - mm["none"] == N_LAYERS


class MoreProducts(nn.Module):
    """A block with products before, between and inside those that are named."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.kept(self.first(x).sin() @ x.t() @ x).sin()).sin()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_kept_is_named_whatever_else_the_block_multiplies(compiled: bool) -> None:
    block = MoreProducts()
    model = Transformer(ARGS(n_layers=1))
    model.layers["0"] = block
    apply_ac(model, EVERY_OP, kept_results=("kept",))
    x = torch.randn(4, 8, requires_grad=True)
    forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager") if compiled else block.forward
    out = forward(x)
    with OpCounter() as backward:
        out.sum().backward()
    expected = MoreProducts.forward(block, x)
    with OpCounter() as plain:
        expected.sum().backward()
    # `first`, the two products and `last` again, but not `kept`
    assert backward.counts["mm"] - plain.counts["mm"] == 4


@pytest.mark.parametrize("modes", [EVERY_OP, EVERY_ATTENTION])
def test_context_parallel_attention_is_kept(modes: list[BlockMode]) -> None:
    model, block = Transformer(ARGS(n_layers=1)), nn.Module()
    block.forward = lambda q, k, v: context_attention(q, k, v, 0, 2, "")[0]  # type: ignore[method-assign]
    model.layers["0"] = block
    apply_ac(model, modes)
    q, k, v = (torch.empty(1, 2, 4, 8, device="meta", requires_grad=True) for _ in range(3))
    with OpCounter() as forward:
        out = block(q, k, v)
    with OpCounter() as backward:
        out.sum().backward()
    assert (forward.counts["context_attention"], backward.counts["context_attention"]) == (1, 0)
    assert backward.counts["context_attention_backward"] == 1


@pytest.mark.parametrize("modes", [FULL, EVERY_SECOND_BLOCK, EVERY_OP, EVERY_ATTENTION])
def test_names_stay(modes: list[BlockMode]) -> None:
    model = Transformer(ARGS())
    names = [name for name, _ in model.named_parameters()]
    apply_ac(model, modes)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names


def test_attention_on_a_cpu_may_be_kept() -> None:
    model = Transformer(ARGS())
    init_parameters(model, seed=7, device="cpu")
    apply_ac(model, FULL, keep_cpu_attention=True)
    tokens, labels = get_batch()
    loss = loss_sum(model(tokens), labels)
    with OpCounter() as backward:
        loss.backward()
    assert backward.counts["_scaled_dot_product_flash_attention_for_cpu"] == 0
    assert backward.counts["_scaled_dot_product_flash_attention_for_cpu_backward"] == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_modes_of_a_running_model_may_change(compiled: bool) -> None:
    """The next step recomputes as the new ones say; gradients stay, and a mode that was there is not compiled again."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    model = Transformer(ARGS(n_layers=N_LAYERS))
    init_parameters(model, seed=7, device="cpu")
    apply_ac(model, NONE, kept_results=KEPT_RESULTS)
    if compiled:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    tokens, labels = get_batch()
    products, compilations = [], []
    first: dict[str, Tensor] = {}
    some_of_each: list[BlockMode] = ["op", "op", "none", "none"]
    for modes in (NONE, some_of_each, EVERY_OP, EVERY_ATTENTION, NONE):
        set_block_modes(model, modes)
        model.zero_grad()
        loss = loss_sum(model(tokens), labels)
        with OpCounter() as backward:
            loss.backward()
        products.append(backward.counts["mm"])
        compilations.append(backend.frame_count)
        gradients = get_gradients(model)
        first = first or gradients
        torch.testing.assert_close(gradients, first)
    assert [n - products[0] for n in products] == [0, 2, N_LAYERS, 6 * N_LAYERS, 0]  # "op" recomputes that of w3
    assert compilations == ([1, 2, 2, 3, 3] if compiled else [0] * 5)
