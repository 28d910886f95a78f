"""Any layout starts from the weights, and gives the loss and the gradients, of one process."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.unit_tests.distributed.layouts import ARGS, build_model, get_batch, get_gradients, loss_sum, whole
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.utils import dist_sum, get_total_norm
from torchtitan.models.common.model import Transformer


@dataclass(frozen=True)
class Case:
    dims: ParallelDims
    options: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    """Of the model."""


FULL = {"block_modes": ("full", "full")}
EVERY_OP = {"block_modes": ("op", "op")}
COMPILED = {"training": Training(mixed_precision_param="float32", compile=True)}
OFFLOADED = {"training": Training(mixed_precision_param="float32", enable_cpu_offload=True)}
IN_PIECES = {"training": Training(mixed_precision_param="float32", feed_forward_pieces=2)}
IN_COMPILED_PIECES = {"training": Training(mixed_precision_param="float32", compile=True, feed_forward_pieces=4)}
LOSS_PARALLEL = {"loss_parallel": True}
ALWAYS = {"parallelism": Parallelism(fsdp_reshard_after_forward="always")}
NEVER = {"parallelism": Parallelism(fsdp_reshard_after_forward="never")}
TIED = {"tie_embeddings": True, "qk_norm": True, "given_head_dim": 12}
CASES = {
    "one rank": Case(ParallelDims()),
    "one rank, offloaded": Case(ParallelDims(), OFFLOADED),
    "shard 2": Case(ParallelDims(dp_shard=2)),
    "shard 2, compiled, recomputed by op": Case(ParallelDims(dp_shard=2), COMPILED | EVERY_OP),
    "replicate 2": Case(ParallelDims(dp_replicate=2)),
    "tensor 2": Case(ParallelDims(tp=2)),
    "tensor 2, loss parallel": Case(ParallelDims(tp=2), LOSS_PARALLEL),
    "tensor 2, recomputed by op": Case(ParallelDims(tp=2), EVERY_OP),
    "context 2": Case(ParallelDims(cp=2)),
    "context 2, recomputed by op, in pieces": Case(ParallelDims(cp=2), EVERY_OP | IN_PIECES),
    "context 2, compiled": Case(ParallelDims(cp=2), COMPILED),
    "context 2, compiled, recomputed by op": Case(ParallelDims(cp=2), COMPILED | EVERY_OP),
    "context 4": Case(ParallelDims(cp=4)),
    "context 2, tensor 2, compiled, recomputed": Case(ParallelDims(cp=2, tp=2), COMPILED | FULL),
    "replicate 2, shard 2": Case(ParallelDims(dp_replicate=2, dp_shard=2)),
    "replicate 2, tensor 2, recomputed, in pieces": Case(ParallelDims(dp_replicate=2, tp=2), FULL | IN_PIECES),
    "shard 2, tensor 2, loss parallel": Case(ParallelDims(dp_shard=2, tp=2), LOSS_PARALLEL),
    "shard 2, tensor 2, always resharded": Case(ParallelDims(dp_shard=2, tp=2), ALWAYS),
    "shard 2, tensor 2, never resharded": Case(ParallelDims(dp_shard=2, tp=2), NEVER),
    "shard 2, tensor 2, offloaded": Case(ParallelDims(dp_shard=2, tp=2), OFFLOADED),
    "tied, one rank": Case(ParallelDims(), args=TIED),
    "tied, shard 2, recomputed by op": Case(ParallelDims(dp_shard=2), EVERY_OP, TIED),
    "tied, tensor 2, compiled, recomputed, in pieces": Case(ParallelDims(tp=2), IN_COMPILED_PIECES | FULL, TIED),
    "tied, replicate 2, tensor 2": Case(ParallelDims(dp_replicate=2, tp=2), args=TIED),
    "tied, shard 2, tensor 2, loss parallel, always resharded": Case(
        ParallelDims(dp_shard=2, tp=2), LOSS_PARALLEL | ALWAYS, TIED
    ),
    "tied, shard 2, tensor 2, offloaded": Case(ParallelDims(dp_shard=2, tp=2), OFFLOADED, TIED),
}


def step(case: Case) -> dict[str, Tensor]:
    mesh = build_mesh(case.dims, "cpu")
    torch._dynamo.reset()  # else other sizes of head are traced as unknown ones
    model = build_model(case.dims, mesh=mesh, **case.options, **case.args)
    tokens, labels = (part.chunk(case.dims.dp)[mesh["dp"].get_local_rank()] for part in get_batch())
    tokens, labels, sequences = ContextSharder(mesh["cp"])(tokens, labels)
    loss = loss_sum(model(tokens, sequences=sequences), labels)
    loss.backward()
    loss = dist_sum(dist_sum(loss, mesh["dp"]), mesh["cp"])
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    weights = {f"weight of {name}": whole(parameter).detach() for name, parameter in model.named_parameters()}
    return {"loss": loss, "norm": norm, **get_gradients(model), **weights}


def steps(names: list[str]) -> dict[str, dict[str, Tensor]]:
    # Tracing is what parallelism can break; code generation is slow, and test_compile.py has it.
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        return {name: step(CASES[name]) for name in names}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Tensor]]:
    one, two, four = ([name for name, case in CASES.items() if case.dims.world_size == size] for size in (1, 2, 4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = steps(one)
    dist.destroy_process_group()
    return found | run_processes(steps, 2, two)[0] | run_processes(steps, 4, four)[0]


@pytest.mark.parametrize("case", CASES)
def test_weights_loss_and_gradients_equal_those_of_one_process(
    case: str, results: dict[str, dict[str, Tensor]]
) -> None:
    model = Transformer(ARGS(**CASES[case].args))  # without any wrapping
    init_parameters(model, seed=7, device="cpu")
    tokens, labels = get_batch()
    loss = loss_sum(model(tokens), labels)
    loss.backward()
    gradients = get_gradients(model)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()

    weights = {f"weight of {name}": parameter.detach() for name, parameter in model.named_parameters()}
    assert results[case].keys() == {"loss", "norm"} | gradients.keys() | weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(results[case][name], value, rtol=0, atol=0)
    for name, value in {"loss": loss.detach(), "norm": norm, **gradients}.items():
        torch.testing.assert_close(results[case][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
