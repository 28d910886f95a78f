"""Any layout trains as one process does: the loss and the gradient norm of every step, in float32, by the real trainer.

The global batches are the same in every layout, and their labels are ignored unevenly over ranks and microbatches.
Rows of Llama with two microbatches train with z-loss, and are of a mixture of datasets, each with a loss. All runs of
one number of processes share their processes, so that the suite costs three starts.
"""

from dataclasses import dataclass, replace
from itertools import groupby, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.integration_tests.tiny_model import AttentiveTransformer
from tests.integration_tests.tiny_runs import (
    EOS,
    GLOBAL_BATCH,
    MIXTURE,
    NUM_SOURCES,
    SEED,
    SEQ_LEN,
    SOURCES,
    STEPS,
    Result,
    Run,
    Step,
    global_batch,
    train_all,
)
from tests.integration_tests.tiny_sizes import ODD
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Model
from torchtitan.distributed.init_weights import init_parameters

TOLERANCE = 1e-5
Z_LOSS = 0.01
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
LIGER = f"{FUSED} --liger_kernel.implementation liger"
OFFLOAD = "--training.enable_cpu_offload"
RESHARD = "--parallelism.fsdp_reshard_after_forward"
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
RECOMPUTE = "--activation_checkpoint.mode"
MASKED = "--training.document_mask"
DEGREES = {
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}


@dataclass(frozen=True)
class Row:
    dims: ParallelDims
    options: str = ""
    accumulation: int = 1
    steps: int = STEPS
    z_loss: float = 0.0

    def __str__(self) -> str:
        degrees = [f"{axis}{n}" for axis in DEGREES if (n := getattr(self.dims, axis)) > 1] or ["one_process"]
        options = [word.rpartition(".")[2] for word in self.options.replace(FUSED, "fused").split()]
        options += ["z_loss"] if self.z_loss else []
        return "-".join([*degrees, *options, f"accumulation{self.accumulation}"])

    def to_run(self) -> Run:
        degrees = " ".join(f"--parallelism.{name} {getattr(self.dims, axis)}" for axis, name in DEGREES.items())
        batch_size = GLOBAL_BATCH // self.dims.dp // self.accumulation
        options = f"{degrees} {self.options} --training.z_loss {self.z_loss} --training.steps {self.steps}"
        options += f" {MIXTURE}" if self.z_loss else ""
        if "implementation liger" not in self.options:  # which does not tell them
            options += " --metrics.enable_token_metrics"
        return Run(str(self), self.dims.world_size, batch_size, options)


QWEN3 = "--model.name tiny_qwen3"
ONE_QWEN3 = Row(ParallelDims(), QWEN3)
ONE_PROCESS, TWO_RANKS = Row(ParallelDims()), Row(ParallelDims(dp_shard=2))
ONE_PROCESS_MASKED = Row(ParallelDims(), MASKED)
WITH_Z_LOSS = Row(ParallelDims(), z_loss=Z_LOSS)

# One axis with each loss, with and without accumulation.
AXES = [ParallelDims(), *(ParallelDims(**{axis: 2}) for axis in ("dp_shard", "dp_replicate", "tp", "cp"))]
# Two with each loss, and each with accumulation once.
PAIRS = [
    *(ParallelDims(dp_shard=2, **{axis: 2}) for axis in ("dp_replicate", "tp", "cp")),
    ParallelDims(tp=2, cp=2),
]
# With the standard loss, the only one that pipelines have.
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
ROWS = [
    *(Row(dims, loss, n) for dims, loss, n in product(AXES, ("", FUSED), (1, 2))),
    *(Row(dims, loss, n) for i, dims in enumerate(PAIRS) for loss, n in (("", 1 + i % 2), (FUSED, 2 - i % 2))),
    *(Row(ParallelDims(pp=2), f"{SCHEDULE} {schedule}", 2) for schedule in SCHEDULES),
    *(Row(ParallelDims(pp=2, **{axis: 2}), f"{SCHEDULE} 1F1B", 2) for axis in ("dp_shard", "tp")),
    # each way to recompute is one more trace; by default there are two
    Row(ParallelDims(dp_shard=2, tp=2), f"{FUSED} --training.compile {RECOMPUTE} none", 2),
    Row(ParallelDims(tp=2), "--training.compile"),
    # some ranks and some microbatches have no label at all
    *(Row(dims, loss, 4) for dims, loss in product(AXES[:3], ("", FUSED))),
    # what else may change when weights are gathered, and where they are
    *(Row(ParallelDims(dp_shard=2), f"{FUSED} {option}", 2) for option in (f"{RESHARD} never", OFFLOAD)),
    *(Row(ParallelDims(dp_shard=2, tp=2), f"{FUSED} {option}", 2) for option in (f"{RESHARD} always", OFFLOAD)),
    *(
        Row(ParallelDims(pp=2, dp_shard=2), f"{SCHEDULE} Interleaved1F1B {option}")
        for option in (f"{RESHARD} always", OFFLOAD)
    ),
    # Liger's kernels, interpreted: seconds a step, by the layout that reads the weight in the most roundabout way
    Row(ParallelDims(dp_shard=2), f"{LIGER} {RESHARD} always", 2, steps=2),
    # and what is recomputed: by default every second block, so that blocks of both kinds are in each row
    Row(ParallelDims(tp=2, cp=2), f"{FUSED} {RECOMPUTE} selective --activation_checkpoint.selective_ac_option op"),
    Row(ParallelDims(tp=2), "--parallelism.disable_loss_parallel"),
    # documents that do not see each other
    *(Row(dims, f"{FUSED} {MASKED}") for dims in (ParallelDims(cp=2), ParallelDims(tp=2, cp=2))),
    Row(ParallelDims(pp=2), f"{SCHEDULE} 1F1B {MASKED}"),
    Row(ParallelDims(tp=2), f"{MASKED} --training.compile {RECOMPUTE} full"),
    # a second family, whose output is tied to the embedding
    Row(ParallelDims(), f"{QWEN3} {FUSED}"),
    Row(ParallelDims(cp=2), f"{QWEN3} {FUSED}"),
    *(Row(ParallelDims(tp=2, dp_shard=2), f"{QWEN3} {loss}", 2) for loss in ("", FUSED)),
]
# what has two microbatches has the z-loss too
ROWS = [replace(row, z_loss=Z_LOSS) if row.accumulation == 2 and QWEN3 not in row.options else row for row in ROWS]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, Result]:
    """The runs of all selected rows, and of one process, by name."""
    items = [item for item in request.session.items if item.path == request.path]
    selected = [item.callspec.params["row"] for item in items if "row" in item.fixturenames]
    references = [ONE_PROCESS, ONE_PROCESS_MASKED, ONE_QWEN3, WITH_Z_LOSS, TWO_RANKS]
    runs = [row.to_run() for row in dict.fromkeys([*references, *selected])]
    results: dict[str, Result] = {}
    for _, group in groupby(sorted(runs, key=lambda run: run.world_size), key=lambda run: run.world_size):
        results |= train_all(list(group))
    return results


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_step_equals_that_of_one_process(row: Row, results: dict[str, Result]) -> None:
    one_process = WITH_Z_LOSS if row.z_loss else ONE_PROCESS
    reference = ONE_PROCESS_MASKED if MASKED in row.options else ONE_QWEN3 if QWEN3 in row.options else one_process
    expected, steps = results[str(reference)], results[str(row)]
    for result in (expected, steps):
        if isinstance(result, Exception):
            raise result
    assert (len(steps), len(expected)) == (row.steps, STEPS)
    for number, (step, reference) in enumerate(zip(steps, expected, strict=False), start=1):
        for name in ("loss", "grad_norm", "z_loss"):
            value, correct = getattr(step, name), getattr(reference, name)
            assert value == pytest.approx(correct, rel=TOLERANCE, abs=0), f"{name} of step {number}"
        if "implementation liger" not in row.options:  # which gives one sum
            predicted, correct = ((s.token_accuracy, s.token_entropy) for s in (step, reference))
            assert predicted == pytest.approx(correct, rel=TOLERANCE), f"accuracy and entropy of step {number}"
            assert [loss is None for loss in step.by_source] == [loss is None for loss in reference.by_source]
            told = [[loss for loss in losses if loss is not None] for losses in (step.by_source, reference.by_source)]
            assert told[0] == pytest.approx(told[1], rel=TOLERANCE), f"the datasets' losses of step {number}"


def test_the_largest_loss_is_that_of_one_data_rank(results: dict[str, Result]) -> None:
    one, two = results[str(ONE_PROCESS)], results[str(TWO_RANKS)]
    assert isinstance(one, list) and isinstance(two, list)
    assert all(step.max_loss == pytest.approx(step.loss, rel=1e-6) for step in one)
    first, *others = two  # in the first step one of the ranks has no label
    assert first.max_loss == pytest.approx(first.loss, rel=1e-6)
    assert all(step.max_loss > step.loss for step in others)


def test_the_first_step_of_one_process_is_that_of_plain_torch(results: dict[str, Result]) -> None:
    tokens, labels, *_ = global_batch(0)
    for row, z_loss in ((ONE_PROCESS, 0.0), (WITH_Z_LOSS, Z_LOSS)):
        expected = plain_step([(tokens, labels)], z_loss=z_loss)
        assert get_first_step(results[str(row)]) == pytest.approx(expected, rel=TOLERANCE)
    parts = [(tokens[i == SOURCES], labels[i == SOURCES]) for i in range(NUM_SOURCES)]
    by_source = [plain_step([part])[0] for part in parts]
    assert get_first(results[str(WITH_Z_LOSS)]).by_source == pytest.approx(by_source, rel=TOLERANCE)


def test_accuracy_and_entropy_are_those_of_all_logits(results: dict[str, Result]) -> None:
    tokens, labels, *_ = global_batch(0)
    is_valid = labels != IGNORE_INDEX
    logits = make_model()(tokens)[is_valid].double()  # (valid, V)
    accuracy = (logits.argmax(-1) == labels[is_valid]).double().mean().item()
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    first = get_first(results[str(ONE_PROCESS)])
    assert accuracy > 0 and (first.token_accuracy, first.token_entropy) == pytest.approx((accuracy, entropy), rel=1e-5)


def test_documents_train_as_if_each_were_alone(results: dict[str, Result]) -> None:
    tokens, labels, *_ = global_batch(0)
    documents = []
    for row_tokens, row_labels in zip(tokens, labels, strict=True):
        lengths = row_tokens.eq(EOS).nonzero().flatten().add(1).diff(prepend=torch.tensor([0]))
        sizes = [*lengths.tolist(), SEQ_LEN - int(lengths.sum())]
        documents += zip(row_tokens[None].split(sizes, dim=1), row_labels[None].split(sizes, dim=1), strict=True)
    alone = [(x, y.masked_fill(x == EOS, IGNORE_INDEX)) for x, y in documents if x.numel()]
    assert get_first_step(results[str(ONE_PROCESS_MASKED)]) == pytest.approx(plain_step(alone), rel=TOLERANCE)


def get_first(result: Result) -> Step:
    assert isinstance(result, list)
    return result[0]


def get_first_step(result: Result) -> tuple[float, float, float]:
    first = get_first(result)
    return first.loss, first.grad_norm, first.z_loss


def make_model() -> AttentiveTransformer:
    model = AttentiveTransformer(ODD.for_run(Model(), max_seq_len=SEQ_LEN))
    init_parameters(model, SEED, "cpu")
    return model


def plain_step(batches: list[tuple[Tensor, Tensor]], *, z_loss: float = 0.0) -> tuple[float, float, float]:
    """The loss, the gradient norm and the z-loss over all batches (tokens, labels), by torch alone."""
    model = make_model()
    num_valid = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
    total = z_total = 0.0
    for tokens, labels in batches:
        logits, targets = model(tokens).flatten(0, 1), labels.flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_valid
        z_part = z_loss * logits.logsumexp(dim=1)[targets != IGNORE_INDEX].square().sum() / num_valid
        (loss + z_part).backward()
        total, z_total = total + loss.item(), z_total + z_part.item()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item(), z_total
