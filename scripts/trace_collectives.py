"""Where a GPU's time went in a profiled step: collectives, how much of them arithmetic hides, and kernels by kind.

    python scripts/trace_collectives.py outputs/profile_traces/step_10/rank0_trace.json.gz
    python scripts/trace_collectives.py --longest 20 TRACE OTHER_TRACE       # the longest kernels too, of each

Reads a trace that --profiling.enable_profiling wrote. A collective's kernel waits for the other ranks, so that its time
is more than that of its bytes. Hidden is the part of it in which a kernel of arithmetic ran on the same GPU. Bytes are
those of the larger of input and output. What a trace does not tell is n/a: a trace of a CPU has no kernels, and the
sizes of its collectives are those of their inputs. Alone is the part of a kind's time in which nothing else ran. A
kernel begins some microseconds after its launch where the GPU waits for the CPU, and much later where work is queued.
"""

import argparse
import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

Event = dict[str, Any]

# By the names of NCCL's kernels, and by those of operators.
_NAMES = {
    1: ("Byte", "Char", "Bool", "unsigned char", "signed char", "bool"),
    2: ("Half", "BFloat16", "c10::Half", "c10::BFloat16"),
    4: ("Int", "Float", "int", "float"),
    8: ("Long", "Double", "long int", "double"),
}
ITEM_BYTES = {name: size for size, names in _NAMES.items() for name in names}
_KERNEL_NAME = re.compile(r"nccl\w*?Kernel_([A-Za-z]+)")

# The first that a kernel's name has.
KINDS = {
    "collectives": r"nccl",
    "attention": r"flash|fmha|sdpa|attention",
    "the loss": r"liger|cross_entropy|_(statistics|gradient|multiply)(_and_gradient)?_kernel",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|matmul",
    "FSDP's copies": r"split_with_sizes|chunk_cat|CatArray|multi_tensor.*copy",
    "optimizer, clipping": r"adam|multi_tensor|norm_(two|inf)|^triton.*lshift",  # the last is the compact one's
    "float8's scales and casts": r"^triton.*(amax|clamp)|float8|clamp_|AbsFunctor|MaxOps|MaxNan",
    "compiled by the inductor": r"^triton",
    "copies": r"memcpy|memset|copy|fill",
}
QUEUED_US = 30


@dataclass
class Collective:
    """All collectives of one name, dtype and group of ranks."""

    name: str
    dtype: str
    ranks: str
    count: int = 0
    ms: float = 0.0
    hidden_ms: float | None = None
    sizes: list[int | None] = field(default_factory=list)

    @property
    def num_bytes(self) -> int | None:
        known = [size for size in self.sizes if size is not None]
        return sum(known) if len(known) == len(self.sizes) else None

    @property
    def largest_bytes(self) -> int | None:
        return max((size for size in self.sizes if size is not None), default=None)

    def to_row(self) -> dict[str, Any]:
        return {
            "collective": self.name,
            "dtype": self.dtype,
            "ranks": self.ranks,
            "count": self.count,
            "ms": self.ms,
            "hidden": None if self.hidden_ms is None or not self.ms else self.hidden_ms / self.ms,
            "mb": None if self.num_bytes is None else self.num_bytes / 1e6,
            "largest_mb": None if self.largest_bytes is None else self.largest_bytes / 1e6,
        }


def read_events(path: Path) -> list[Event]:
    """Those that took time."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]


def get_collectives(events: list[Event]) -> list[Collective]:
    """The longest first. Of a GPU its NCCL kernels; where there is none, what gloo did on the CPU."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    busy = Busy(event for event in kernels if not _is_nccl(event))
    table: dict[tuple[str, str, str], Collective] = {}
    for event in filter(_is_nccl, kernels) if kernels else filter(_is_gloo, events):
        name, dtype, ranks, size = _describe(event)
        collective = table.setdefault((name, dtype, ranks), Collective(name, dtype, ranks))
        collective.count += 1
        collective.ms += event["dur"] / 1e3
        collective.sizes.append(size)
        if kernels:
            hidden = busy.overlap(event["ts"], event["ts"] + event["dur"]) / 1e3
            collective.hidden_ms = (collective.hidden_ms or 0.0) + hidden
    return sorted(table.values(), key=lambda collective: -collective.ms)


def describe_time(events: list[Event]) -> str | None:
    """What a GPU did from its first kernel to its last; None where the trace has no kernels."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return None
    arithmetic = Busy(event for event in kernels if not _is_nccl(event))
    anything = Busy(kernels)
    span = anything.span
    return (
        f"From the first kernel to the last {span / 1e3:.1f} ms: arithmetic in {arithmetic.total / 1e3:.1f} ms,"
        f" only collectives in {(anything.total - arithmetic.total) / 1e3:.1f} ms, nothing in"
        f" {(span - anything.total) / 1e3:.1f} ms."
    )


def get_kinds(events: list[Event]) -> dict[str, tuple[int, float, float]]:
    """Of each kind of kernel the number, the ms, and the ms in which no other kind ran; the longest first."""
    groups: dict[str, list[Event]] = {}
    for event in filter(_is_on_device, events):
        groups.setdefault(get_kind(event), []).append(event)
    everything = Busy(filter(_is_on_device, events)).total
    table = {}
    for kind, group in groups.items():
        others = Busy(event for event in filter(_is_on_device, events) if get_kind(event) != kind).total
        table[kind] = (len(group), sum(event["dur"] for event in group) / 1e3, (everything - others) / 1e3)
    return dict(sorted(table.items(), key=lambda item: -item[1][1]))


def get_kind(event: Event) -> str:
    if event["cat"] != "kernel":
        return "copies"
    found = (kind for kind, names in KINDS.items() if re.search(names, event["name"], re.IGNORECASE))
    return next(found, "elementwise and the rest")


def describe_launches(events: list[Event]) -> str | None:
    """How many kernels were launched, and how many began at once, since nothing was queued before them."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    kernels = [event for event in events if event.get("cat") == "kernel" and not _is_nccl(event)]
    delays = [event["ts"] - launched[c] for event in kernels if (c := event["args"].get("correlation")) in launched]
    if not delays:
        return None
    prompt = sum(delay < QUEUED_US for delay in delays)
    began = f"{prompt} began within {QUEUED_US} us: there the GPU waited for the CPU."
    return f"{len(delays)} kernels of arithmetic were launched; {began}"


def get_tensor_parallel_sizes(events: list[Event]) -> list[int]:
    """Bytes of every collective between tensor-parallel ranks, the larger of input and output.

    They are those that were called as functional collectives, by DTensors and by the fused loss; FSDP and the trainer
    call torch.distributed itself. Read from the operators on the CPU, which say their shapes in every trace.
    """
    sizes = []
    for event in events:
        kind = re.match(r"_c10d_functional::(all_gather|all_reduce|reduce_scatter|all_to_all)", event.get("name", ""))
        if kind is not None and (size := _input_bytes(event)) is not None:
            factor = _group_size(event) if kind[1] == "all_gather" else 1
            sizes.append(size * factor)
    return sizes


class Busy:
    """The times at which some of the kernels ran."""

    def __init__(self, kernels: Iterable[Event]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in kernels):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def overlap(self, start: float, end: float) -> float:
        first = bisect_right(self._ends, start)
        last = bisect_right(self._starts, end)
        return sum(min(end, self._ends[i]) - max(start, self._starts[i]) for i in range(first, last))

    @property
    def total(self) -> float:
        return sum(end - start for start, end in zip(self._starts, self._ends, strict=True))

    @property
    def span(self) -> float:
        """From the first kernel's start to the last one's end."""
        return self._ends[-1] - self._starts[0]


def _is_on_device(event: Event) -> bool:
    return event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")


def _is_nccl(event: Event) -> bool:
    return event.get("cat") == "kernel" and "nccl" in event["name"].lower()


def _is_gloo(event: Event) -> bool:
    return event["name"].startswith("gloo:")


def _describe(event: Event) -> tuple[str, str, str, int | None]:
    """Name, dtype, ranks and bytes."""
    args = event.get("args", {})
    if _is_gloo(event):
        return event["name"], (args.get("Input type") or ["n/a"])[0], "n/a", _input_bytes(event)
    named = _KERNEL_NAME.search(event["name"])
    name = args.get("Collective name") or (named[1] if named else event["name"])
    dtype = args.get("dtype", "n/a")
    num_elements = max(args.get("In msg nelems") or 0, args.get("Out msg nelems") or 0)
    size = num_elements * ITEM_BYTES[dtype] if num_elements and dtype in ITEM_BYTES else None
    ranks = args.get("Process Group Ranks") or args.get("Process Group Name") or "n/a"
    return name, dtype, str(ranks), size


def _input_bytes(event: Event) -> int | None:
    """Of the largest input; None where the trace has no shapes."""
    args = event.get("args", {})
    inputs = zip(args.get("Input type", []), args.get("Input Dims", []), strict=False)
    return max((prod(dims) * ITEM_BYTES[dtype] for dtype, dims in inputs if dtype in ITEM_BYTES), default=None)


def _group_size(event: Event) -> int:
    given = event["args"].get("Concrete Inputs", [])
    return next((int(value) for value in given if re.fullmatch(r"\d+", str(value))), 1)


def format_table(collectives: list[Collective]) -> Iterator[str]:
    yield f"{'collective':44}{'dtype':>14}{'ranks':>10}{'count':>7}{'ms':>10}{'hidden':>8}{'MB':>10}{'largest':>10}"
    for row in (collective.to_row() for collective in collectives):
        hidden = "n/a" if row["hidden"] is None else f"{100 * row['hidden']:.0f}%"
        mb, largest = ("n/a" if row[key] is None else f"{row[key]:.2f}" for key in ("mb", "largest_mb"))
        names = f"{row['collective']:44}{row['dtype']:>14}{row['ranks']:>10}"
        yield f"{names}{row['count']:7}{row['ms']:10.2f}{hidden:>8}{mb:>10}{largest:>10}"


def format_kinds(events: list[Event], longest: int) -> Iterator[str]:
    if kinds := get_kinds(events):
        yield f"{'kind of kernel':44}{'count':>7}{'ms':>10}{'alone':>10}"
    for kind, (count, ms, alone_ms) in kinds.items():
        yield f"{kind:44}{count:7}{ms:10.2f}{alone_ms:10.2f}"
    by_name: dict[str, list[Event]] = {}
    for event in filter(_is_on_device, events):
        by_name.setdefault(event["name"], []).append(event)
    table = sorted(((sum(e["dur"] for e in group), group) for group in by_name.values()), key=lambda row: -row[0])
    for us, group in table[:longest]:
        yield f"{us / 1e3:10.2f} ms{len(group):7} x  {get_kind(group[0]):28}{group[0]['name'][:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="a rank's trace, as JSON")
    parser.add_argument("--longest", type=int, default=0, help="how many kernels to name, by their time")
    args = parser.parse_args()
    for path in args.traces:
        if len(args.traces) > 1:
            print(f"\n{path}")
        events = read_events(path)
        print("\n".join(format_table(get_collectives(events))))
        print("\n".join(format_kinds(events, args.longest)))
        for about in (describe_time(events), describe_launches(events)):
            if about:
                print(about)
        if sizes := get_tensor_parallel_sizes(events):
            print(f"The largest between tensor-parallel ranks: {max(sizes) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
