"""scripts/trace_collectives.py on a small trace as a GPU writes it; test_benchmark_parallel.py has one of a CPU."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.finished_run import load_script

script = load_script("trace_collectives")

GROUP = {"Process Group Ranks": "[0, 1]", "Group size": 2}
GATHER = {"Collective name": "_allgather_base", "dtype": "BFloat16", "In msg nelems": 500, "Out msg nelems": 1000}


def kernel(name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": args}


def operator(name: str, types: list[str], dims: list[Any], concrete: list[str]) -> dict[str, Any]:
    args = {"Input type": types, "Input Dims": dims, "Concrete Inputs": concrete}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 0, "dur": 1, "args": args}


EVENTS = [
    kernel("gemm", 1000, 2000),
    kernel("elementwise", 1900, 2200),
    kernel("gemm", 4000, 5000),
    kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 2100, 2500, **GATHER, **GROUP),
    kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 3900, 4500, **GATHER, **GROUP),
    kernel("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 4400, 5600),
    operator("_c10d_functional::all_gather_into_tensor", ["c10::BFloat16", "Scalar", ""], [[5, 70], [], []], ["", "2"]),
    operator("_c10d_functional::reduce_scatter_tensor", ["float", "", "Scalar"], [[10, 20], [], []], ["", "", "2", ""]),
    operator("_c10d_functional::wait_tensor", ["float"], [[9999]], [""]),
    operator("c10d::_allgather_base_", ["float", "float"], [[8888], [4444]], ["", ""]),  # FSDP's
    {"ph": "i", "name": "an instant", "ts": 0},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    return path


def test_collectives_are_counted_measured_and_compared_with_the_arithmetic_beside_them(trace: Path) -> None:
    reduce_scatter, gather = (collective.to_row() for collective in script.get_collectives(script.read_events(trace)))
    names = {"collective": "_allgather_base", "dtype": "BFloat16", "ranks": "[0, 1]"}
    # hidden are 100 of 400 microseconds and 500 of 600; an element has two bytes
    assert gather == names | {"count": 2, "ms": 1.0, "hidden": 0.6, "mb": 0.004, "largest_mb": 0.002}
    unknown = {"dtype": "n/a", "ranks": "n/a", "mb": None, "largest_mb": None}
    assert reduce_scatter == unknown | {"collective": "ReduceScatter", "count": 1, "ms": 1.2, "hidden": 0.5}


def test_time_is_told_apart(trace: Path) -> None:
    assert script.describe_time(script.read_events(trace)) == (
        "From the first kernel to the last 4.6 ms: arithmetic in 2.2 ms, only collectives in 1.0 ms, nothing in 1.4 ms."
    )


def test_time_is_told_by_kind_of_kernel_and_how_much_of_it_ran_alone() -> None:
    events = [
        kernel("nvjet_qqtst_128x256", 0, 100, correlation=1),
        kernel("ncclDevKernel_AllGather_RING_LL", 50, 250, correlation=2),
        kernel("triton_red_fused__to_copy_abs_amax_2", 200, 230, correlation=3),
        kernel("triton_poi_fused_mul_silu_1", 300, 320, correlation=4),
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 320, "dur": 5, "args": {}},
        *({"cat": "cuda_runtime", "ts": ts, "args": {"correlation": c}} for c, ts in ((1, -9), (2, 0), (3, 9), (4, 9))),
    ]
    assert script.get_kinds(events) == {
        "collectives": (1, 0.2, 0.12),  # behind the products 50 microseconds, behind the scales 30
        "matrix products": (1, 0.1, 0.05),
        "float8's scales and casts": (1, 0.03, 0.0),
        "compiled by the inductor": (1, 0.02, 0.02),
        "copies": (1, 0.005, 0.005),
    }
    assert script.describe_launches(events).startswith("3 kernels of arithmetic were launched; 1 began within 30 us")


def test_sizes_between_tensor_parallel_ranks_are_those_of_functional_collectives(trace: Path) -> None:
    assert script.get_tensor_parallel_sizes(script.read_events(trace)) == [2 * 5 * 70 * 2, 10 * 20 * 4]


def test_the_table_is_printed(trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trace_collectives.py", "--longest", "1", str(trace)])
    script.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["ReduceScatter", "n/a", "n/a", "1", "1.20", "50%", "n/a", "n/a"]
    assert lines[2][-5:] == ["2", "1.00", "60%", "0.00", "0.00"]
    assert ["matrix", "products", "2", "2.00", "0.90"] in lines
    assert ["2.00", "ms", "2", "x", "matrix", "products", "gemm"] in lines
