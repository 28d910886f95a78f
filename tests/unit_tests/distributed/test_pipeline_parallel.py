"""Any pipeline, alone or with the other axes, gives the loss and the gradients of one process."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.tensor import DTensor

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.loss import IGNORE_INDEX, EvalLoss, cross_entropy_sum
from torchtitan.config.block_modes import get_block_modes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.pipeline_split import get_stage_modules, get_stages_of_rank
from torchtitan.config.sections import ActivationCheckpoint, Parallelism, Training
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.pipeline_parallel import build_pipeline, keep_modules
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import parallelize_transformer

MODEL = TransformerModelArgs(
    dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=61, max_seq_len=16
)
SEQ_LEN, GLOBAL_BATCH, ACCUMULATION = 16, 8, 2


@dataclass(frozen=True)
class Case:
    schedule: str
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    compile: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    loss_parallel: bool = True
    microbatch_size: int = 1
    reshard: Literal["default", "always"] = "default"
    dtype: Literal["float32", "bfloat16"] = "float32"
    parts: tuple[tuple[str, ...], ...] = field(default=())

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(dp_replicate=self.dp_replicate, dp_shard=self.dp_shard, cp=self.cp, tp=self.tp, pp=2)

    def __str__(self) -> str:
        default = Case(self.schedule)
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k) and k != "parts"]
        return "-".join([self.schedule, *changed, *["named"] * bool(self.parts)])


CASES = [
    Case("GPipe"),
    Case("1F1B"),
    Case("Interleaved1F1B"),
    Case("InterleavedZeroBubble"),
    Case("ZBVZeroBubble"),
    Case("1F1B", microbatch_size=2, recompute="full"),
    Case("ZBVZeroBubble", recompute="full"),
    Case("Interleaved1F1B", reshard="always"),
    Case("1F1B", compile=True, recompute="selective"),
    Case("1F1B", dtype="bfloat16"),
    Case("InterleavedZeroBubble", dtype="bfloat16"),
    Case(
        "1F1B",
        parts=(("tok_embeddings", "layers.0", "layers.1", "layers.2"), ("layers.3", "norm", "output")),
    ),
    Case("1F1B", dp_shard=2),
    Case("Interleaved1F1B", dp_shard=2),
    Case("ZBVZeroBubble", dp_shard=2),
    Case("1F1B", dp_replicate=2),
    Case("GPipe", tp=2, loss_parallel=False),
    Case("ZBVZeroBubble", tp=2),
    Case("1F1B", tp=2, compile=True),
    Case("1F1B", cp=2),
]


def global_batches() -> list[tuple[Tensor, Tensor]]:
    """One (tokens, labels) for each accumulated microbatch, with labels ignored unevenly over rows and batches."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for i in range(ACCUMULATION):
        tokens = torch.randint(MODEL.vocab_size, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
        labels = torch.randint(MODEL.vocab_size, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
        labels[0] = IGNORE_INDEX
        labels[2, : 5 + 3 * i] = IGNORE_INDEX
        labels[7, 4:] = IGNORE_INDEX
        batches.append((tokens, labels))
    return batches


def loss_scale() -> Tensor:
    return 1 / sum((labels != IGNORE_INDEX).sum() for _, labels in global_batches()).float()


def initialise(model: nn.Module) -> None:
    init_parameters(model, 5, "cpu")
    model.init_buffers("cpu")


def reshard(part: nn.Module) -> None:
    """What a validator does after it."""
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def build_model() -> Transformer:
    with torch.device("meta"):
        return Transformer(MODEL)


def run_cases(cases: list[Case]) -> list[dict[str, Tensor]]:
    # Tracing is what parallelism can break; code generation is slow, and test_compile.py has it.
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        return [run_case(case) for case in cases]


def run_case(case: Case) -> dict[str, Tensor]:
    torch._dynamo.reset()
    dims = case.dims
    mesh = build_mesh(dims, "cpu")
    parallelism = Parallelism(
        pipeline_parallel_degree=2,
        pipeline_parallel_schedule=case.schedule,
        pipeline_parallel_microbatch_size=case.microbatch_size,
        fsdp_reshard_after_forward=case.reshard,
        module_fqns_per_model_part=[list(part) for part in case.parts] or None,
    )
    training = Training(
        local_batch_size=GLOBAL_BATCH // dims.dp,
        seq_len=SEQ_LEN,
        mixed_precision_param=case.dtype,
        compile=case.compile,
    )
    runner = build_pipeline(
        build_model,
        n_layers=MODEL.n_layers,
        dim=MODEL.dim,
        vocab_size=MODEL.vocab_size,
        parallelize=partial(
            parallelize_transformer,
            mesh=mesh,
            parallel_dims=dims,
            parallelism=parallelism,
            training=training,
            block_modes=get_block_modes(ActivationCheckpoint(mode=case.recompute), MODEL.n_layers),
            loss_parallel=case.loss_parallel,
        ),
        loss_sum=cross_entropy_sum,
        eval_loss=EvalLoss(budget_bytes=1 << 12),  # some tokens at a time
        mesh=mesh,
        parallelism=parallelism,
        training=training,
        device=torch.device("cpu"),
    )
    for part in runner.model_parts:
        part.to_empty(device="cpu")
        initialise(part)

    shard_context = ContextSharder(mesh["cp"])
    dp_rank = mesh["dp"].get_local_rank()
    local = [[x.chunk(dims.dp)[dp_rank] for x in batch] for batch in global_batches()]
    local = [shard_context(*batch) for batch in local]
    result = {"loss": torch.zeros(()), "eval": torch.zeros(())}
    for tokens, labels, positions in local:
        result["eval"] += runner.eval_loss(tokens, labels, positions)
    for tokens, labels, positions in local:
        result["loss"] += runner.forward_backward(tokens, labels, positions, loss_scale())
    # a shorter, odd batch than those of training, after training
    tokens, labels, positions = local[0]
    result["eval"] += runner.eval_loss(tokens[:3], labels[:3], None if positions is None else positions.split(3)[0])
    for name in ("loss", "eval"):
        for axis in ("dp", "cp"):
            torch.distributed.all_reduce(result[name], group=mesh[axis].get_group())
    for part in runner.model_parts:
        reshard(part)
        for name, p in part.named_parameters():
            assert p.grad is not None, f"{case}: no gradient for {name}"
            result[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return result


@pytest.fixture(scope="module")
def results() -> dict[Case, dict[str, Tensor]]:
    """By case: the gradients of all stages, and the sums over the stages of the losses."""
    merged = {}
    for world_size in sorted({case.dims.world_size for case in CASES}):
        cases = [case for case in CASES if case.dims.world_size == world_size]
        by_rank = run_processes(run_cases, world_size, cases)
        for i, case in enumerate(cases):
            # the pp axis is outermost: the first rank of each stage
            stages = [by_rank[0][i], by_rank[world_size // 2][i]]
            merged[case] = stages[0] | stages[1]
            for name in ("loss", "eval"):
                merged[case][name] = sum(stage[name] for stage in stages)
    return merged


def one_process(case: Case) -> dict[str, Tensor]:
    model = Transformer(MODEL)
    initialise(model)
    result = {"loss": torch.zeros(()), "eval": torch.zeros(())}
    for tokens, labels in global_batches():
        loss_sum = cross_entropy_sum(model(tokens), labels)
        (loss_sum * loss_scale()).backward()
        result["loss"] += (loss_sum * loss_scale()).detach()
        result["eval"] += loss_sum.detach()
    tokens, labels = global_batches()[0]
    for rows in zip(tokens.chunk(case.dims.dp), labels.chunk(case.dims.dp), strict=True):
        result["eval"] += cross_entropy_sum(model(rows[0][:3]), rows[1][:3]).detach()
    return result | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_grads_equal_one_process(case: Case, results: dict[Case, dict[str, Tensor]]) -> None:
    oracle = one_process(case)
    assert results[case].keys() == oracle.keys()
    for name, expected in oracle.items():
        error = (results[case][name] - expected).norm() / expected.norm()
        assert error < (1e-5 if case.dtype == "float32" else 5e-2), f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [2, 3, 3, 1]),
        ({"pipeline_parallel_first_stage_less_layers": 0, "pipeline_parallel_last_stage_less_layers": 0}, [3, 2, 2, 2]),
        ({"pipeline_parallel_layers_per_stage": 2}, [1, 2, 2, 2, 2, 0]),
        ({"pipeline_parallel_last_stage_less_layers": 2, "pipeline_parallel_schedule": "GPipe"}, [2, 3, 3, 1]),
    ],
    ids=str,
)
def test_layers_are_divided_evenly(options: dict[str, Any], sizes: list[int]) -> None:
    parts = get_stage_modules(Parallelism(pipeline_parallel_degree=4, **options), n_layers=9)
    flat = [name for part in parts for name in part]
    assert flat == ["tok_embeddings", *(f"layers.{i}" for i in range(9)), "norm", "output"]
    assert [sum(name.startswith("layers.") for name in part) for part in parts] == sizes


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("1F1B", [[0], [1], [2]]),
        ("Interleaved1F1B", [[0, 3], [1, 4], [2, 5]]),
        ("ZBVZeroBubble", [[0, 5], [1, 4], [2, 3]]),
    ],
)
def test_stages_lie_on_the_ranks_that_the_schedule_expects(schedule: str, stages: list[list[int]]) -> None:
    num_stages = sum(len(of_rank) for of_rank in stages)
    style = "v" if schedule == "ZBVZeroBubble" else "loop"
    rank_of_stage = generate_stage_to_rank_mapping(3, num_stages, style)
    assert [get_stages_of_rank(schedule, rank, 3, num_stages) for rank in range(3)] == stages
    assert all(rank_of_stage[stage] == rank for rank, of_rank in enumerate(stages) for stage in of_rank)


def test_interleaved_schedules_have_two_stages_a_rank() -> None:
    parallelism = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_schedule="Interleaved1F1B")
    assert len(get_stage_modules(parallelism, n_layers=9)) == 4


def test_named_parts_are_taken_as_they_are() -> None:
    parts = [["tok_embeddings"], ["layers.0", "norm", "output"]]
    assert get_stage_modules(Parallelism(module_fqns_per_model_part=parts), n_layers=1) == parts


def test_a_stage_keeps_the_names_of_its_parameters() -> None:
    model = Transformer(MODEL)
    whole = dict(model.named_parameters())
    keep_modules(model, ["layers.2", "norm"])
    assert model.tok_embeddings is model.output is None
    assert dict(model.named_parameters()).keys() == {
        k for k in whole if k.startswith("layers.2.") or k == "norm.weight"
    }
