"""Time, memory and error of the loss head, all implementations side by side in one process.

    python scripts/benchmark_loss.py                                            # Llama 3 8B's head, on a GPU
    python scripts/benchmark_loss.py --tokens 2048 --vocab 32000 --dim 512 --dtype float32 --budgets 32   # on a CPU
    python scripts/benchmark_loss.py --tokens 8192 --ignored 0 0.5 0.9          # labels that are ignored
    python scripts/benchmark_loss.py --checkpoint outputs/checkpoint/step-500   # also a trained model's head, on text

Measured is hidden -> loss -> both gradients. "floor" is the three bare matrix products (logits, hidden gradient,
weight gradient) in the same process; "x floor" a time over it. linear_logprobs computes the logits twice: its floor is
four. "x plain" is a time over that of the in-tree loss with the largest budget and no option; the last lines say what
ignored labels make of each row's time. Errors of rows with options that change the loss mean nothing. "peak" is the
largest allocation above the inputs, "above grads" the same less the two gradients. "error" is |g - g32| / |g32| of the
hidden and the weight gradient against float32 autograd. Labels are drawn by Zipf's law, as words are: then many tokens
add to the same rows of the weight gradient, and a sum over chunks shows its rounding. Fused losses get the labels where
training has them, on the host.

With --checkpoint, a run's or Hugging Face's, every row is measured twice: with random numbers of its model's shape, and
with its weight, where hidden states and labels are what it makes of Python's library: most of a trained model's
gradients are tiny, and a loss may leave out what is tiny. With --profile, a row's longest kernels follow it: how often
each ran, and its milliseconds in all. Liger, CCE and quack have rows where they import. Writes results.jsonl and
benchmark_loss.png to --out.
"""

import argparse
import ctypes
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
import torch.nn.functional as F
from benchmark_origin import get_origin
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from torchtitan.checkpoint.pretrained import find_pretrained
from torchtitan.components.loss import (
    IGNORE_INDEX,
    CrossEntropyLoss,
    FusedLinearCrossEntropyLoss,
    fused_linear_cross_entropy,
    linear_logprobs,
)

MIB = 1 << 20
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden (T, D), weight (V, D), labels (T,), scale ()) -> loss"""


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    scale: Tensor
    host_labels: Tensor

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def run(self, loss_fn: LossFn) -> Tensor:
        labels = self.host_labels if loss_fn in _ON_HOST else self.labels
        loss = loss_fn(self.hidden, self.weight, labels, self.scale)
        loss.backward()
        return loss


_ON_HOST: set[LossFn] = set()
"""What takes the labels from the host."""


class WeightOnly:
    """Stands in for the model's head: fused losses take the weight through `with_weight`."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def with_weight(self, fn: Callable[..., Tensor], hidden: Tensor) -> Tensor:
        return fn(hidden, self.weight)


def fused(loss: Any) -> LossFn:
    def call(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return loss(hidden, WeightOnly(weight), labels, scale)  # type: ignore[no-any-return]

    _ON_HOST.add(call)  # as the trainer does
    return call


def with_options(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, **options: Any) -> Tensor:
    if options.pop("token_weights", False):
        options["token_weights"] = torch.ones(labels.shape, device=hidden.device)
    found = fused_linear_cross_entropy(hidden, weight, labels, scale=scale, **options)
    return found if isinstance(found, Tensor) else found.loss


def negative_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    return -linear_logprobs(hidden, weight, labels).logprobs.sum() * scale


OPTIONS: dict[str, dict[str, Any]] = {
    "z-loss": {"z_loss": 1e-4},
    "softcap": {"softcap": 30.0},
    "token weights": {"token_weights": True},
    "label smoothing": {"label_smoothing": 0.1},
    "outputs": {"return_outputs": True},
    "z-loss, softcap, token weights, outputs": {
        "z_loss": 1e-4,
        "softcap": 30.0,
        "token_weights": True,
        "return_outputs": True,
    },
}


FOUR_PRODUCTS = ["linear_logprobs"]
WEIGHTS = ("random", "trained")


def implementations(args: argparse.Namespace) -> dict[str, LossFn]:
    table: dict[str, LossFn] = {}
    eager, compiled = CrossEntropyLoss().sum, CrossEntropyLoss(compile=True).sum

    def standard(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return eager(F.linear(hidden, weight), labels) * scale

    table["standard, eager"] = standard
    table["standard, loss compiled"] = lambda h, w, y, scale: compiled(F.linear(h, w), y) * scale
    table["standard, head and loss compiled"] = torch.compile(standard)

    if args.device == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            from torchtitan.components.loss.liger import LigerFusedLinearLoss
        except ImportError:
            print("liger-kernel is not installed: its rows are left out")
        else:
            as_shipped = LigerFusedLinearCrossEntropyLoss()
            table["Liger as shipped"] = lambda h, w, y, scale: as_shipped(w, h, y)
            budget = max(args.budgets)  # below Liger's own chunk a budget has no effect
            table[f"Liger, {budget:g} MiB"] = fused(LigerFusedLinearLoss(budget_bytes=int(budget * MIB)))

    for budget in args.budgets:
        table[f"in-tree, {budget:g} MiB"] = fused(FusedLinearCrossEntropyLoss(budget_bytes=int(budget * MIB)))
    for name, terms in OPTIONS.items():
        table[f"in-tree + {name}"] = partial(with_options, **terms)
        _ON_HOST.add(table[f"in-tree + {name}"])
    table["in-tree + labels on the device"] = partial(with_options)
    table["linear_logprobs"] = negative_logprobs
    _ON_HOST.add(negative_logprobs)
    if args.dtype != "float32":
        budget = max(args.budgets)
        loss = FusedLinearCrossEntropyLoss(budget_bytes=int(budget * MIB), accum_dtype=torch.float32)
        table[f"in-tree, {budget:g} MiB, float32 dW"] = fused(loss)

    if hasattr(nn, "LinearCrossEntropyOptions"):  # of torch 2.13
        options = nn.LinearCrossEntropyOptions()
        table["torch linear_cross_entropy, chunked"] = lambda h, w, y, scale: F.linear_cross_entropy(
            h, w, y, ignore_index=IGNORE_INDEX, options=options
        )
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        table["Apple CCE"] = lambda h, w, y, scale: linear_cross_entropy(h, w, y, ignore_index=IGNORE_INDEX)
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError:
        pass
    else:
        table["quack, chunks of 4096"] = lambda h, w, y, scale: chunked_linear_cross_entropy(
            h, w, y, ignore_index=IGNORE_INDEX, reduction="mean"
        )
    return {name: fn for name, fn in table.items() if not args.only or any(part in name for part in args.only)}


def use_trained(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, D) and labels (T,) of as many tokens as are asked for at most, and the weight (V, D)."""
    pretrained = find_pretrained(args.checkpoint)
    tokenizer, dtype, device = pretrained.build_tokenizer(), getattr(torch, args.dtype), torch.device(args.device)
    model = pretrained.build_model(device=device, dtype=dtype)
    assert model.output is not None
    num_tokens = max(args.tokens)
    seq_len = min(4096, pretrained.args.max_seq_len, num_tokens)
    ids: list[int] = []
    for file in sorted(Path(argparse.__file__).parent.glob("*.py")):
        ids += tokenizer.encode(file.read_text(errors="replace"), add_bos=True, add_eos=True)
    text = torch.tensor(ids, device=device)
    if len(text) <= num_tokens:
        raise SystemExit(f"Python's library has {len(text)} tokens of this tokenizer: ask for fewer than --tokens")
    with torch.no_grad():
        parts = text[:num_tokens].split(seq_len)
        hidden = torch.cat([model(part.unsqueeze(0), return_hidden_states=True).squeeze(0) for part in parts])
    return hidden, text[1 : num_tokens + 1], model.output.weight.detach()


def make_problem(
    args: argparse.Namespace, num_tokens: int, ignored: float, trained: tuple[Tensor, Tensor, Tensor] | None = None
) -> Problem:
    generator = torch.Generator(args.device).manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=args.device).mul_(std).to(dtype).requires_grad_()

    if trained is None:
        frequencies = 1 / torch.arange(1, args.vocab + 1, device=args.device)
        labels = torch.multinomial(frequencies, num_tokens, replacement=True, generator=generator)
        hidden = normal(num_tokens, args.dim, std=1.0)
        weight = normal(args.vocab, args.dim, std=args.dim**-0.5)
    else:
        hidden, labels, weight = trained
        hidden, labels = hidden[:num_tokens].clone().requires_grad_(), labels[:num_tokens].clone()
        weight = weight.clone().requires_grad_()
    labels[torch.rand(num_tokens, generator=generator, device=args.device) < ignored] = IGNORE_INDEX
    host_labels = labels.cpu().pin_memory() if args.device == "cuda" else labels.cpu()
    scale = 1 / (labels != IGNORE_INDEX).sum().clamp(min=1).float()
    return Problem(hidden, weight, labels, scale, host_labels)


_HEAD_START_CYCLES = 8_000_000
"""Some 5 ms of a GPU's clock: the host is ahead, as in a training step, and what it needs to begin is not timed."""


def milliseconds(fn: Callable[[], object], device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        fn()
        return 1e3 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(steps: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, float]:
    """The median milliseconds of each; they take turns, for the clock of a GPU drifts."""
    rounds = [
        {name: milliseconds(fn, args.device) for name, fn in steps.items()} for _ in range(args.warmup + args.repeats)
    ]
    return {name: statistics.median(round[name] for round in rounds[args.warmup :]) for name in steps}


def bare_products(problem: Problem) -> Callable[[], object]:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits, d_hidden, d_weight = hidden @ weight.t(), torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)

    return products


def peak_bytes(fn: Callable[[], object], device: str) -> int:
    """The most memory that `fn` held above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or it would hide what fn takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the process's high-water mark
    before = _status_bytes("VmRSS")
    fn()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def longest_kernels(fn: Callable[[], object], device: str, limit: int = 8) -> list[dict[str, Any]]:
    """Where the time of one call goes: kernels on a GPU, operators on a CPU."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
    kind = "CUDA" if device == "cuda" else "CPU"
    kernels = [
        {
            "kernel": event.key,
            "count": event.count,
            "ms": (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e3,
        }
        for event in trace.key_averages()
        if event.device_type.name == kind
    ]
    return sorted(kernels, key=lambda kernel: kernel["ms"], reverse=True)[:limit]


def relative_errors(problem: Problem, loss_fn: LossFn, reference: tuple[Tensor, Tensor]) -> tuple[float, float]:
    problem.clear()
    problem.run(loss_fn)
    gradients = (problem.hidden.grad, problem.weight.grad)
    problem.clear()
    return tuple(((g.float() - r).norm() / r.norm()).item() for g, r in zip(gradients, reference, strict=True))  # type: ignore[return-value, union-attr]


def float32_gradients(problem: Problem, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """By autograd, some tokens at a time, for the logits of all may not fit; sums in float32."""
    hidden, weight = problem.hidden.detach().float(), problem.weight.detach().float().requires_grad_()
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in (slice(first, first + chunk) for first in range(0, len(hidden), chunk)):
        part = hidden[rows].requires_grad_()
        loss = F.cross_entropy(part @ weight.t(), problem.labels[rows], ignore_index=IGNORE_INDEX, reduction="sum")
        d_hidden[rows], added = torch.autograd.grad(loss * problem.scale, (part, weight))
        d_weight += added
    return d_hidden, d_weight


def measure(num_tokens: int, ignored: float, weights: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    problem = make_problem(args, num_tokens, ignored, args.trained if weights == "trained" else None)
    reference = float32_gradients(problem)
    grad_bytes = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))
    rows: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], object]] = {}
    for name, loss_fn in implementations(args).items():

        def step(loss_fn: LossFn = loss_fn) -> None:
            problem.clear()
            problem.run(loss_fn)

        try:
            step()
            problem.clear()
            peak = peak_bytes(lambda fn=loss_fn: problem.run(fn), args.device)  # type: ignore[misc]
            errors = relative_errors(problem, loss_fn, reference)
            kernels = longest_kernels(step, args.device) if args.profile else []
        except torch.cuda.OutOfMemoryError:
            print(f"{name}: out of memory at {num_tokens} tokens")
            continue
        finally:
            problem.clear()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        steps[name] = step
        rows.append(
            {
                "name": name,
                "tokens": num_tokens,
                "ignored": ignored,
                "weights": weights,
                "peak_mib": peak / MIB,
                "above_grads_mib": (peak - grad_bytes) / MIB,
                "d_hidden_error": errors[0],
                "d_weight_error": errors[1],
                **({"kernels": kernels} if kernels else {}),
            }
        )
    floor = bare_products(problem)
    times = timed({"floor": floor} | steps, args)
    for row in rows:
        num_products = 4 if row["name"] in FOUR_PRODUCTS else 3
        row |= {"ms": times[row["name"]], "floor_ms": times["floor"]}
        row["x_floor"] = row["ms"] / row["floor_ms"] * 3 / num_products
        if plain_name(args) in times:
            row["x_plain"] = row["ms"] / times[plain_name(args)]
    return rows


def plain_name(args: argparse.Namespace) -> str:
    """Of the row that options and ignored labels are compared with."""
    return f"in-tree, {max(args.budgets):g} MiB"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Of one size; what was measured with random and with trained weights is in one line."""
    by_weights = {weights: [row for row in rows if row["weights"] == weights] for weights in WEIGHTS}
    by_weights = {weights: found for weights, found in by_weights.items() if found}
    floors = ", ".join(f"{found[0]['floor_ms']:.1f} ms with {weights} weights" for weights, found in by_weights.items())
    print(f"\n{rows[0]['tokens']} tokens, {100 * rows[0]['ignored']:g}% ignored; floor {floors}")
    columns = (
        f"{'ms':>9}{'x floor':>9}{'x plain':>9}{'peak MiB':>10}{'above grads':>13}{'dH error':>11}{'dW error':>11}"
    )
    print(f"{'':45}" + "".join(f"{weights:>{len(columns)}}" for weights in by_weights))
    print(f"{'':45}" + columns * len(by_weights))
    for name in dict.fromkeys(row["name"] for row in rows):
        found = {row["weights"]: row for row in rows if row["name"] == name}
        cells = [_cells(found[weights]) if weights in found else " " * len(columns) for weights in by_weights]
        print(f"{name:45}" + "".join(cells), flush=True)
        for row in found.values():
            for kernel in row.get("kernels", []):
                print(f"    {row['weights']} {kernel['ms']:9.2f} ms {kernel['count']:5} x {kernel['kernel'][:90]}")


def _cells(row: dict[str, Any]) -> str:
    plain = f"{row['x_plain']:9.3f}" if "x_plain" in row else " " * 9
    return (
        f"{row['ms']:9.1f}{row['x_floor']:9.3f}{plain}{row['peak_mib']:10.0f}{row['above_grads_mib']:13.0f}"
        f"{row['d_hidden_error']:11.2e}{row['d_weight_error']:11.2e}"
    )


def print_ignored(rows: list[dict[str, Any]]) -> None:
    """Of each row measured with none of the labels ignored, what others of them ignored make of its time."""
    times = {(row["name"], row["weights"], row["tokens"], row["ignored"]): row["ms"] for row in rows}
    for (name, weights, num_tokens, ignored), whole in times.items():
        if ignored == 0:
            others = {row["ignored"] for row in rows} - {0}
            parts = [
                (i, times[name, weights, num_tokens, i])
                for i in sorted(others)
                if (name, weights, num_tokens, i) in times
            ]
            told = ", ".join(f"{part / whole:.3f} with {100 * i:g}%" for i, part in parts)
            if told:
                print(f"{name}, {num_tokens} tokens, {weights} weights: {told} of the labels ignored")


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """One panel a number of tokens; an implementation that was run with several budgets is a curve over them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys((row["tokens"], row["ignored"]) for row in rows))
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes) + 1, 4.6), sharey=True, squeeze=False)
    markers = dict(zip(dict.fromkeys(_family(row["name"]) for row in rows), cycle("osD^vP*X"), strict=False))
    for axes, size in zip(panels[0], sizes, strict=True):
        for family, marker in markers.items():
            curve = [r for r in rows if (r["tokens"], r["ignored"]) == size and _family(r["name"]) == family]
            memory = [max(row["above_grads_mib"], 1) for row in curve]
            axes.plot(memory, [row["x_floor"] for row in curve], marker=marker, label=family)
        axes.set(
            xscale="log",
            xlabel="peak above the two gradients, MiB",
            title=f"{size[0]} tokens, {100 * size[1]:g}% ignored",
        )
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time over the three products")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _family(name: str) -> str:
    """ "in-tree, 512 MiB" -> "in-tree"; float32 sums are another family."""
    return re.sub(r", [\d.]+ MiB", "", name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--ignored", type=float, nargs="+", default=[0.01], help="shares of the labels that are ignored, one by one"
    )
    parser.add_argument("--checkpoint", type=Path, help="also with weight and hidden states of this trained model")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[125.3, 250.6, 512, 1024],
        help="MiB of logits; the default's smaller two hold what Liger's own chunks do at 16384 and 32768 tokens",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print where the time of each row goes")
    parser.add_argument("--only", nargs="+", help="rows whose name holds one of these")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_loss"))
    args = parser.parse_args()

    if not implementations(args):
        parser.error(f"no row's name holds {' or '.join(args.only)}")
    origin = get_origin(torch.device(args.device))
    args.trained = use_trained(args) if args.checkpoint else None
    if args.trained:
        args.vocab, args.dim = args.trained[2].shape
    title = f"{origin['device']}, torch {origin['torch']}, {args.dtype}, V={args.vocab}, D={args.dim}"
    print(f"{title}; commit {origin['commit']}")
    args.out.mkdir(parents=True, exist_ok=True)
    about = origin | {name: getattr(args, name) for name in ("dtype", "vocab", "dim", "seed")}
    about["checkpoint"] = args.checkpoint and str(args.checkpoint)
    rows: list[dict[str, Any]] = []
    with (args.out / "results.jsonl").open("w") as results:
        for num_tokens, ignored in product(args.tokens, args.ignored):
            kinds = WEIGHTS if args.trained else WEIGHTS[:1]
            new = [row for weights in kinds for row in measure(num_tokens, ignored, weights, args)]
            if new:  # not out of memory with all of them
                print_table(new)
            rows += new
            results.writelines(json.dumps({**about, **row}) + "\n" for row in new)
    print()
    print_ignored(rows)
    plot([row for row in rows if row["weights"] == WEIGHTS[0]], args.out / "benchmark_loss.png", title)


if __name__ == "__main__":
    main()
