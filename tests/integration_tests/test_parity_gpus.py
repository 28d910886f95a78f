"""Any layout over GPUs, with NCCL, trains as one GPU does, and compiled as not: in float32, and as closely as bf16 can.

Each layout's loss and gradient norm are compared, step by step, with one GPU's. In float32 they must agree to 1e-4.
In bf16 every layout rounds at other places, so that the measure is what rounding does on one GPU: the difference
between its bf16 and its float32. Two runs that are each that far from float32 are at most twice that from each other.

Rows that need more GPUs than there are are skipped. Some also run on CPU, lest the test itself breaks unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch

from tests.integration_tests.test_parity import FUSED, LIGER, OFFLOAD, ONE_PROCESS, RECOMPUTE, RESHARD, Row
from tests.integration_tests.tiny_runs import STEPS, Result, Run, Step, train_all
from torchtitan.config.degrees import ParallelDims

FLOAT32_TOLERANCE = 1e-4
BF16_FACTOR = 2
"""Times the difference that bf16 makes on one device."""

# A hang of NCCL is to cost half a minute.
OPTIONS = "--comm.init_timeout_seconds 30 --comm.train_timeout_seconds 30 --training.mixed_precision_param"
QUANTITIES = ("loss", "grad_norm")
LOSSES = {"standard": "", "fused": FUSED, "liger": LIGER}
COMPILED = "--training.compile"
# as the 405B configuration has it
RECOMPUTED = f"{COMPILED} {RECOMPUTE} full"
RECOMPUTATIONS = [
    *(f"{RECOMPUTE} {mode}" for mode in ("none", "full")),
    *(f"{RECOMPUTE} selective --activation_checkpoint.selective_ac_option {option}" for option in ("2", "op")),
]
ASYNC_TP = "--parallelism.enable_async_tensor_parallel"


@dataclass(frozen=True)
class Case:
    device: str
    dims: ParallelDims
    loss: str
    dtype: str
    options: str = ""
    accumulation: int = 1

    def __str__(self) -> str:
        layout = str(Row(self.dims, self.options, self.accumulation)).removesuffix("-accumulation1")
        return f"{self.device}{self.dims.world_size}-{layout}-{self.loss}-{self.dtype}"

    @property
    def row(self) -> Row:
        return Row(self.dims, f"{LOSSES[self.loss]} {self.options} {OPTIONS} {self.dtype}", self.accumulation)


LAYOUTS = [
    # one axis at a time on 2 GPUs
    *(ParallelDims(**{axis: 2}) for axis in ("dp_shard", "dp_replicate", "tp", "cp", "pp")),
    # two on 4
    ParallelDims(dp_replicate=2, dp_shard=2),
    *(ParallelDims(**{axis: 2, "dp_shard": 2}) for axis in ("tp", "cp", "pp")),
    *(ParallelDims(**{axis: 2, "dp_replicate": 2}) for axis in ("tp", "cp")),
    ParallelDims(tp=2, cp=2),
    *(ParallelDims(**{axis: 2, "pp": 2}) for axis in ("tp", "cp")),
    # and more on 8
    ParallelDims(dp_replicate=2, dp_shard=4),
    *(ParallelDims(**{axis: 2, "dp_shard": 4}) for axis in ("tp", "cp", "pp")),
    ParallelDims(tp=2, cp=2, dp_shard=2),
    *(ParallelDims(**{axis: 2, "pp": 2, "dp_shard": 2}) for axis in ("tp", "cp")),
    *(ParallelDims(**{axis: 2, "dp_replicate": 2, "dp_shard": 2}) for axis in ("tp", "cp")),
]
DTYPES = ("float32", "bfloat16")
CASES = [
    *(Case("cpu", dims, "fused", dtype) for dims, dtype in product((LAYOUTS[0], LAYOUTS[2]), DTYPES)),
    Case("cpu", ONE_PROCESS.dims, "fused", "bfloat16", f"{COMPILED} {RECOMPUTATIONS[-1]}", 2),
    # what a single GPU can vary
    *(
        Case("cuda", ONE_PROCESS.dims, loss, dtype, f"{COMPILED} {recomputation}", 2)
        for loss, dtype, recomputation in product(LOSSES, DTYPES, RECOMPUTATIONS)
    ),
    *(
        Case("cuda", dims, loss, dtype)
        for dims, loss, dtype in product(LAYOUTS, LOSSES, DTYPES)
        if dims.pp == 1 or loss == "standard"  # the fused losses do not go with pipelines
        if dims.tp == 1 or loss != "liger"
    ),
    *(
        Case("cuda", ParallelDims(dp_shard=2), loss, dtype, option, 2)
        for loss, dtype, option in product(("fused", "liger"), DTYPES, (f"{RESHARD} always", OFFLOAD))
    ),
    *(
        Case("cuda", dims, "fused", dtype, options)
        for dims, dtype in product((ParallelDims(tp=2), ParallelDims(tp=2, dp_shard=2)), DTYPES)
        for options in (RECOMPUTED, f"{RECOMPUTED} {ASYNC_TP}")
    ),
    *(Case("cuda", ParallelDims(cp=2), "fused", dtype, RECOMPUTED) for dtype in DTYPES),
    # HSDP's copies are summed once for all microbatches
    *(Case("cuda", ParallelDims(dp_replicate=2, dp_shard=2), "fused", dtype, accumulation=2) for dtype in DTYPES),
]


def reference(device: str, dtype: str) -> Case:
    """One device, the standard loss, nothing compiled."""
    return Case(device, ONE_PROCESS.dims, "standard", dtype)


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    if case.device == "cpu":
        return []
    needed = case.dims.world_size
    missing = torch.cuda.device_count() < needed
    return [pytest.mark.gpu, pytest.mark.skipif(missing, reason=f"needs {needed} GPU{'s' * (needed > 1)}")]


Get = Callable[[Case], list[Step]]


@pytest.fixture(scope="module")
def get_steps(request: pytest.FixtureRequest) -> Get:
    """The steps of a case. All selected cases of one device and number of processes are run at the first question."""
    items = [item for item in request.session.items if item.path == request.path]
    selected = [item.callspec.params["case"] for item in items]

    @cache
    def run_all(device: str, world_size: int) -> dict[str, Result]:
        cases = [case for case in selected if (case.device, case.dims.world_size) == (device, world_size)]
        if world_size == 1:
            cases += [reference(device, dtype) for dtype in DTYPES]
        runs: list[Run] = [case.row.to_run() for case in cases]
        return train_all(runs, on_gpus=device == "cuda")

    def get(case: Case) -> list[Step]:
        result = run_all(case.device, case.dims.world_size)[str(case.row)]
        if isinstance(result, Exception):
            raise result
        assert len(result) == STEPS
        return result

    return get


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks_of(case), id=str(case)) for case in CASES])
def test_every_step_is_that_of_one_device(
    case: Case, get_steps: Get, record_property: Callable[[str, object], None]
) -> None:
    float32, bf16 = (get_steps(reference(case.device, dtype)) for dtype in DTYPES)
    expected = float32 if case.dtype == "float32" else bf16
    steps = get_steps(case)
    exceeded = []
    for name in QUANTITIES:
        difference = largest_difference(steps, expected, name)
        bound = FLOAT32_TOLERANCE
        if case.dtype == "bfloat16":
            bound = BF16_FACTOR * largest_difference(bf16, float32, name)
        record_property(f"{name}_difference", difference)
        record_property(f"{name}_bound", bound)
        if not difference <= bound:
            exceeded.append(f"{name}: {difference:.2e}, and at most {bound:.2e} was expected")
    assert not exceeded


def largest_difference(steps: list[Step], expected: list[Step], name: str) -> float:
    """Relative, over the steps."""
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(steps, expected, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)
