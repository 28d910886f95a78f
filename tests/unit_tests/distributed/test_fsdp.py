from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.unit_tests.distributed.layouts import ARGS, build_model, get_batch, get_gradients, loss_sum
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config.block_modes import BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Parallelism, ReshardPolicy, Training
from torchtitan.distributed.fsdp import reduce_over_copies, should_reshard_after_forward
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.models.common.model import Transformer


@dataclass(frozen=True)
class Policy:
    reshard: ReshardPolicy
    modes: tuple[BlockMode, BlockMode]
    again: list[str]
    """The units that are gathered again in backward."""


UNITS = ["tok_embeddings", "layers.0", "layers.1", "norm", "output"]
POLICIES = {
    # The embedding's backward does not need its weight, but FSDP gathers it all the same.
    "default": Policy("default", ("none", "none"), UNITS[:3]),
    "always": Policy("always", ("none", "none"), UNITS),
    "never": Policy("never", ("none", "none"), []),
    "last block gathered": Policy("default", ("none", "gathered"), UNITS[:2]),
    "all blocks gathered": Policy("default", ("gathered", "gathered"), []),
}


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A loss that uses the weight several times, and never makes the logits of all tokens."""
    assert not isinstance(weight, DTensor)
    assert weight.shape == (ARGS().vocab_size, ARGS().dim)
    chunks = zip(hidden.split(5, dim=1), labels.split(5, dim=1), strict=True)
    return torch.stack([loss_sum(h @ weight.T, part) for h, part in chunks]).sum()


def step_with_chunks(policy: Policy) -> dict[str, Any]:
    dims = ParallelDims(dp_shard=2)
    mesh = build_mesh(dims, "cpu")
    model = build_model(
        dims, mesh=mesh, parallelism=Parallelism(fsdp_reshard_after_forward=policy.reshard), block_modes=policy.modes
    )
    tokens, labels = (part.chunk(2)[mesh["dp"].get_local_rank()] for part in get_batch())
    with CommDebugMode() as comm:
        gathers: list[int] = []  # that have begun when the last block does
        last_block = model.layers["1"].register_forward_pre_hook(lambda *_: gathers.append(comm.get_total_counts()))
        hidden = model(tokens, return_hidden_states=True)
        is_sharded = {unit: isinstance(weight_of(model, unit), DTensor) for unit in UNITS}
        loss = model.output.with_weight(partial(chunked_loss, labels=labels), hidden)
        loss.backward()
    last_block.remove()
    all_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {
        "gradients": get_gradients(model),
        "is_sharded": is_sharded,
        "all_sharded_after": all_sharded,
        "gathers_before_last_block": gathers,
        "collectives": {"step": count(comm), **collectives_of(model, tokens, labels)},
        "head": head_of(model, tokens),
    }


def collectives_of(model: Transformer, tokens: Tensor, labels: Tensor) -> dict[str, Counter[str]]:
    """Those of one more microbatch, by the standard path, and of validation after it."""
    with CommDebugMode() as accumulation:
        loss_sum(model(tokens), labels).backward()
    with CommDebugMode() as validation, torch.no_grad():
        model(tokens)
    for unit in UNITS:
        model.get_submodule(unit).reshard()
    return {"accumulation": count(accumulation), "validation": count(validation)}


def count(comm: CommDebugMode) -> Counter[str]:
    return Counter({op.__name__.split(".")[0]: number for op, number in comm.get_comm_counts().items()})


def weight_of(model: Transformer, unit: str) -> Tensor:
    return next(model.get_submodule(unit).parameters())


@torch.no_grad()
def head_of(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one forward, and of the output called by itself after a forward without it."""
    logits = model(tokens)
    return logits, model.output(model(tokens, return_hidden_states=True))


def mixed_precision() -> dict[str, Any]:
    model = build_model(ParallelDims(dp_shard=2), training=Training(mixed_precision_param="bfloat16"))
    seen: dict[str, torch.dtype] = {}

    def see(module: torch.nn.Module, args: tuple[Tensor, Tensor]) -> None:
        seen["hidden"], seen["freqs_cis"], seen["weight"] = args[0].dtype, args[1].dtype, weight_of(module, "").dtype

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        seen["head"], seen["scale"] = weight.dtype, scale.dtype
        return scale * loss_sum(hidden @ weight.T, labels)

    model.layers["1"].register_forward_pre_hook(see)
    tokens, labels = get_batch()
    hidden = model(tokens, return_hidden_states=True)
    model.output.with_weight(partial(loss, labels=labels, scale=torch.tensor(0.1)), hidden).backward()
    parameter = model.layers["1"].attention.wq.weight
    return seen | {"parameter": parameter.dtype, "gradient": parameter.grad.dtype, "final hidden": hidden.dtype}


def copies_of_the_weights() -> dict[str, Any]:
    """Three microbatches on two copies: all-reduces of each backward, and the gradients of all."""
    model = build_model(ParallelDims(dp_replicate=2))
    tokens, labels = get_batch()
    counts = []
    for number in range(3):
        reduce_over_copies([model], now=number == 2)
        with CommDebugMode() as comm:
            loss_sum(model(tokens.roll(number)), labels).backward()
        counts.append(sum(n for name, n in count(comm).items() if "allreduce" in name.replace("_", "")))
    return {"all-reduces": counts, "gradients": get_gradients(model)}


def on_two_ranks() -> dict[str, Any]:
    return {
        "copies": copies_of_the_weights(),
        "mixed": mixed_precision(),
        **{name: step_with_chunks(policy) for name, policy in POLICIES.items()},
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_processes(on_two_ranks, 2)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_fused_loss_reads_a_whole_weight_and_gives_the_gradients_of_one_process(
    policy: str, results: dict[str, Any]
) -> None:
    model = Transformer(ARGS())
    init_parameters(model, seed=7, device="cpu")
    tokens, labels = get_batch()
    loss_sum(model(tokens), labels).backward()
    for name, expected in get_gradients(model).items():
        torch.testing.assert_close(results[policy]["gradients"][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_unit_is_reduced_once_and_gathered_as_the_policy_says(policy: str, results: dict[str, Any]) -> None:
    for phase in ("step", "accumulation"):
        collectives = results[policy]["collectives"][phase]
        assert collectives["reduce_scatter_tensor_coalesced_"] + collectives["_reduce_scatter_base_"] == len(UNITS)
        assert collectives["_allgather_base_"] == len(UNITS) + len(POLICIES[policy].again)
    assert results[policy]["collectives"]["validation"] == {"_allgather_base_": len(UNITS)}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_last_block_computes_while_the_head_is_gathered(policy: str, results: dict[str, Any]) -> None:
    assert results[policy]["gathers_before_last_block"] == [len(UNITS)]


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_are_resharded_as_the_policy_says(policy: str, results: dict[str, Any]) -> None:
    sharded = results[policy]["is_sharded"]
    assert sharded["output"], "the output did not run in the model's forward"
    for unit in UNITS[:-1]:
        assert sharded[unit] == (unit in POLICIES[policy].again)
    assert results[policy]["all_sharded_after"]


@pytest.mark.parametrize("policy", POLICIES)
def test_output_may_be_called_by_itself(policy: str, results: dict[str, Any]) -> None:
    torch.testing.assert_close(*results[policy]["head"])


def test_forward_and_backward_are_in_the_low_precision_and_all_that_lasts_is_not(results: dict[str, Any]) -> None:
    low = {"hidden", "weight", "head", "final hidden"}
    high = {"freqs_cis", "scale", "parameter", "gradient"}
    assert results["mixed"] == dict.fromkeys(low, torch.bfloat16) | dict.fromkeys(high, torch.float32)


def test_pipeline_stages_keep_their_weights_between_microbatches() -> None:
    assert should_reshard_after_forward("default", ParallelDims(dp_shard=2))
    assert not should_reshard_after_forward("default", ParallelDims(pp=2, dp_shard=2))
    assert should_reshard_after_forward("always", ParallelDims(pp=2))
    assert not should_reshard_after_forward("never", ParallelDims(dp_shard=2))


def test_gradients_of_several_microbatches_cross_the_copies_once(results: dict[str, Any]) -> None:
    *earlier, last = results["copies"]["all-reduces"]
    assert earlier == [0, 0]
    assert last == len(UNITS)
    model = Transformer(ARGS())
    init_parameters(model, seed=7, device="cpu")
    tokens, labels = get_batch()
    for number in range(3):
        (2 * loss_sum(model(tokens.roll(number)), labels)).backward()  # both ranks have the whole batch
    for name, expected in get_gradients(model).items():
        torch.testing.assert_close(results["copies"]["gradients"][name], expected, rtol=1e-5, atol=1e-5)
