from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit_tests.distributed.layouts import ARGS, build_model, get_batch, whole
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config.degrees import ParallelDims
from torchtitan.distributed.tensor_parallel import apply_tp
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import TENSOR_PARALLEL_PLAN


def observe(loss_parallel: bool) -> dict[str, Any]:
    model = build_model(ParallelDims(tp=2), loss_parallel=loss_parallel)
    tokens, _ = get_batch()
    between: dict[str, Any] = {}
    model.layers["1"].register_forward_hook(lambda module, args, out: between.update(block=(type(out), out.shape)))
    model.layers["1"].attention.sdpa.register_forward_hook(
        lambda module, args, out: between.update(heads=tuple(x.size(1) for x in args if x is not None))
    )
    with torch.no_grad():
        hidden = model(tokens, return_hidden_states=True)
        logits = model(tokens)
        read = model.output.with_weight(lambda hidden, weight: weight, hidden)
        return between | {
            "hidden": (type(hidden), hidden.placements, hidden.to_local().shape),
            "logits": (type(logits), getattr(logits, "placements", None), tuple(logits.shape)),
            "read weight": (type(read), read.placements, tuple(read.to_local().shape)),
            "again": torch.equal(whole(model.output(hidden)), whole(logits)),
        }


class Operations(TorchDispatchMode):
    """The names of what is run on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # which runs others
        self.names.append(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def moved_by_a_feed_forward() -> list[str]:
    model = Transformer(ARGS())
    apply_tp(model, init_device_mesh("cpu", (2,)), TENSOR_PARALLEL_PLAN, loss_parallel=False)
    block = model.layers["0"]
    part: Tensor = torch.randn(4, 8, ARGS().dim, requires_grad=True)
    with Operations() as operations:
        block.feed_forward(block.ffn_norm(part)).sum().backward()
    return [name for name in operations.names if name in ("cat", "all_gather_into_tensor", "reduce_scatter_tensor")]


def test_feed_forward_moves_the_parts_of_the_sequence_as_they_lie() -> None:
    """Put back into the sequence's order, each would be copied once more."""
    for names in run_processes(moved_by_a_feed_forward, 2):
        assert sorted(names) == ["all_gather_into_tensor"] * 2 + ["reduce_scatter_tensor"] * 2


def on_two_ranks() -> dict[bool, dict[str, Any]]:
    return {loss_parallel: observe(loss_parallel) for loss_parallel in (False, True)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[bool, dict[str, Any]]]:
    return run_processes(on_two_ranks, 2)


def test_sequence_is_split_between_blocks_and_heads_within(ranks: list[dict[bool, dict[str, Any]]]) -> None:
    seen = ranks[0][False]
    assert seen["block"] == (torch.Tensor, (4, 8, ARGS().dim))
    assert seen["heads"] == (2, 1, 1)


def test_final_hidden_states_are_a_sequence_sharded_dtensor(ranks: list[dict[bool, dict[str, Any]]]) -> None:
    for loss_parallel in (False, True):
        assert ranks[1][loss_parallel]["hidden"] == (DTensor, (Shard(1),), (4, 8, ARGS().dim))


def test_logits_are_vocabulary_shards_only_for_a_parallel_loss(ranks: list[dict[bool, dict[str, Any]]]) -> None:
    shape = (4, 16, 101)
    assert ranks[0][True]["logits"] == (DTensor, (Shard(2),), shape)
    assert ranks[0][False]["logits"] == (torch.Tensor, None, shape)


def test_fused_loss_reads_this_ranks_rows_of_an_uneven_vocabulary(ranks: list[dict[bool, dict[str, Any]]]) -> None:
    rows = [rank[True]["read weight"] for rank in ranks]
    assert rows == [(DTensor, (Shard(0),), (51, ARGS().dim)), (DTensor, (Shard(0),), (50, ARGS().dim))]


def test_output_may_be_called_by_itself(ranks: list[dict[bool, dict[str, Any]]]) -> None:
    assert all(rank[loss_parallel]["again"] for rank in ranks for loss_parallel in (False, True))
