import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from tests.unit_tests.distributed.layouts import build_model, get_batch, get_gradients, loss_sum, whole
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.async_tensor_parallel import OverlapCollectives

COLLECTIVES = ("_c10d_functional.all_gather_into_tensor", "_c10d_functional.reduce_scatter_tensor")
OPERATORS = ("torchtitan.gather_and_multiply", "torchtitan.multiply_and_exchange")
"""What takes the place of each."""


def step(*, is_async: bool, batch_size: int) -> dict[str, Any]:
    """Logits, gradients, and of each compiled graph what it had before the pass and has behind it."""
    graphs: list[tuple[Counter[str], Counter[str]]] = []
    rewrite = OverlapCollectives.__call__

    def count(graph: torch.fx.Graph) -> Counter[str]:
        names = [str(node.target).removesuffix(".default") for node in graph.nodes]
        return Counter(name for name in names if name in COLLECTIVES + OPERATORS + ("aten.mm",))

    def spy(self: OverlapCollectives, graph: torch.fx.Graph) -> None:
        before = count(graph)
        rewrite(self, graph)
        graph.lint()
        graphs.append((before, count(graph)))

    OverlapCollectives.__call__ = spy  # type: ignore[method-assign]
    model = build_model(
        ParallelDims(tp=2),
        parallelism=Parallelism(enable_async_tensor_parallel=is_async),
        training=Training(compile=is_async, mixed_precision_param="float32"),
    )
    tokens, labels = get_batch(batch_size)
    with torch._inductor.config.patch(fx_graph_cache=False):
        logits = model(tokens)
        loss_sum(logits, labels).backward()
    return {"logits": whole(logits).detach(), "graphs": graphs, **get_gradients(model)}


@pytest.fixture(scope="module", params=[4, 1], ids=["4 sequences", "1 sequence"])
def steps(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Without and with, on the first rank."""
    return [
        run_processes(partial(step, is_async=is_async, batch_size=request.param), 2)[0] for is_async in (False, True)
    ]


def test_results_are_those_of_the_collectives(steps: list[dict[str, Any]]) -> None:
    expected, found = steps
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"graphs"}:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_every_collective_of_a_block_goes_together_with_products(steps: list[dict[str, Any]]) -> None:
    """Forward and backward have two gathers and two reductions each."""
    assert not steps[0]["graphs"]
    graphs = steps[1]["graphs"]
    assert len(graphs) == 2
    for before, after in graphs:
        assert [before[name] for name in COLLECTIVES] == [2, 2]
        assert [after[name] for name in COLLECTIVES + OPERATORS] == [0, 0, 2, 2]
    (forward_before, forward), (backward_before, backward) = graphs
    assert (forward_before["aten.mm"], forward["aten.mm"]) == (7, 0)
    assert (backward_before["aten.mm"], backward["aten.mm"]) == (14, 7)  # what is left makes the weights' gradients


# The pass alone, on graphs that are not a block's

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
GROUP = "tp"


def placeholder(graph: torch.fx.Graph, name: str, *shape: int) -> torch.fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = torch.empty(shape, device="meta")
    return node


def call(graph: torch.fx.Graph, target: Any, *args: Any) -> torch.fx.Node:
    node = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda argument: argument.meta["val"])
    node.meta["val"] = target(*values) if target.namespace == "aten" else torch.empty(values[0].shape, device="meta")
    return node


def reduce(graph: torch.fx.Graph, total: torch.fx.Node, kind: str = "sum", group: str = GROUP) -> torch.fx.Node:
    return call(graph, c10d.wait_tensor.default, call(graph, c10d.reduce_scatter_tensor.default, total, kind, 2, group))


def of_one_product(graph: torch.fx.Graph, shape: Sequence[int] = (2, 4, 8)) -> tuple[torch.fx.Node, torch.fx.Node]:
    product = call(graph, aten.mm.default, placeholder(graph, "x", 8, 6), placeholder(graph, "w", 6, 8))
    return product, call(graph, aten.reshape.default, product, list(shape))


def one_product(graph: torch.fx.Graph) -> Any:
    return reduce(graph, of_one_product(graph)[1])


def largest(graph: torch.fx.Graph) -> Any:
    return reduce(graph, of_one_product(graph)[1], kind="max")


def another_group(graph: torch.fx.Graph) -> Any:
    return reduce(graph, of_one_product(graph)[1], group="dp")


def product_used_elsewhere(graph: torch.fx.Graph) -> Any:
    product, total = of_one_product(graph)
    return reduce(graph, total), product


def something_else_in_the_sum(graph: torch.fx.Graph) -> Any:
    _, total = of_one_product(graph)
    return reduce(graph, call(graph, aten.add.Tensor, total, placeholder(graph, "bias", 2, 4, 8)))


def rows_of_another_width(graph: torch.fx.Graph) -> Any:
    return reduce(graph, of_one_product(graph, (2, 8, 4))[1])


def gathered(graph: torch.fx.Graph) -> torch.fx.Node:
    gather = call(graph, c10d.all_gather_into_tensor.default, placeholder(graph, "part", 2, 4, 6), 2, GROUP)
    wait = call(graph, c10d.wait_tensor.default, gather)
    wait.meta["val"] = torch.empty(4, 4, 6, device="meta")
    return wait


def put_in_order(graph: torch.fx.Graph, x: torch.fx.Node, split_dim: int, cat_dim: int, order: Sequence[int]) -> Any:
    split = call(graph, aten.split.Tensor, x, x.meta["val"].size(split_dim) // 2, split_dim)
    pieces = [graph.call_function(operator.getitem, (split, index)) for index in range(2)]
    for piece, value in zip(pieces, split.meta["val"], strict=True):
        piece.meta["val"] = value
    return call(graph, aten.cat.default, [pieces[index] for index in order], cat_dim)


def scattered(graph: torch.fx.Graph, split_dim: int, order: Sequence[int] = (0, 1)) -> Any:
    return reduce(graph, put_in_order(graph, of_one_product(graph)[1], split_dim, 0, order))


def product_of_gathered(graph: torch.fx.Graph, cat_dim: int, order: Sequence[int] = (0, 1)) -> Any:
    whole = put_in_order(graph, gathered(graph), 0, cat_dim, order)
    rows = call(graph, aten.reshape.default, whole, [-1, whole.meta["val"].size(-1)])
    weight = placeholder(graph, "weight", whole.meta["val"].size(-1), 8)
    return call(graph, aten.mm.default, rows, weight)


def term_that_is_broadcast(graph: torch.fx.Graph) -> Any:
    row = call(graph, aten.mm.default, placeholder(graph, "row", 1, 6), placeholder(graph, "v", 6, 8))
    return reduce(graph, call(graph, aten.add.Tensor, of_one_product(graph)[1], row))


def weight_that_comes_later(graph: torch.fx.Graph) -> Any:
    rows = call(graph, aten.reshape.default, gathered(graph), [16, 6])
    weight = call(graph, aten.permute.default, placeholder(graph, "weight", 8, 6), [1, 0])
    return call(graph, aten.mm.default, rows, weight)


def weight_that_is_gathered_too(graph: torch.fx.Graph) -> Any:
    rows = call(graph, aten.reshape.default, gathered(graph), [16, 6])
    return call(graph, aten.mm.default, rows, call(graph, aten.permute.default, rows, [1, 0]))


def whole_on_the_right(graph: torch.fx.Graph) -> Any:
    rows = call(graph, aten.reshape.default, gathered(graph), [16, 6])
    return call(graph, aten.mm.default, placeholder(graph, "x", 8, 16), rows)


@pytest.mark.parametrize(
    ("build", "is_replaced"),
    [
        (one_product, True),
        (weight_that_comes_later, True),
        (partial(scattered, split_dim=1), True),
        (partial(scattered, split_dim=-2), True),
        (partial(scattered, split_dim=2), False),
        (partial(scattered, split_dim=1, order=(1, 0)), False),
        (partial(product_of_gathered, cat_dim=1), True),
        (partial(product_of_gathered, cat_dim=2), False),
        (partial(product_of_gathered, cat_dim=1, order=(1, 0)), False),
        *(
            (build, False)
            for build in (
                largest,
                another_group,
                product_used_elsewhere,
                something_else_in_the_sum,
                term_that_is_broadcast,
                rows_of_another_width,
                weight_that_is_gathered_too,
                whole_on_the_right,
            )
        ),
    ],
)
def test_only_what_is_between_products_is_replaced(build: Callable[[torch.fx.Graph], Any], is_replaced: bool) -> None:
    graph = torch.fx.Graph()
    graph.output(build(graph))
    before = [node.target for node in graph.nodes]
    OverlapCollectives(GROUP)(graph)
    graph.lint()
    after = [node.target for node in graph.nodes]
    if not is_replaced:
        assert after == before
        return
    operators = {torch.ops.torchtitan.gather_and_multiply.default, torch.ops.torchtitan.multiply_and_exchange.default}
    assert len(operators.intersection(after)) == 1
    assert not any(str(target).startswith(("_c10d_functional", "aten.mm")) for target in after)
