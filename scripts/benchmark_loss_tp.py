"""The loss head alone, its vocabulary sharded over the ranks: the in-tree loss against gathering the weight.

    torchrun --nproc_per_node 2 scripts/benchmark_loss_tp.py      # Llama 3 8B's head; the degree is the number of ranks
    torchrun --nproc_per_node 2 scripts/benchmark_loss_tp.py --device cpu --tokens 256 --vocab 2001 --dim 64 \\
        --dtype float32 --budget 1

Measured is hidden -> loss -> both gradients, from what a rank holds in training, T/tp tokens and V/tp rows, to their
gradients. "floor" is the three bare matrix products of the rank's share, T tokens and V/tp rows, without any sending;
"peak" the largest allocation above the inputs, "moved" the bytes that a rank receives (head_cost_table.py),
"error" |g - g32| / |g32| against float32 autograd. Times and peaks are those of the
slowest and the fullest rank. Writes results.jsonl to --out.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
import torch.distributed as dist
from benchmark_loss import (
    MIB,
    LossFn,
    Problem,
    bare_products,
    float32_gradients,
    fused,
    make_problem,
    peak_bytes,
    timed,
)
from benchmark_origin import get_origin
from head_cost_table import get_head_cost
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from torchtitan.components.loss import FusedLinearCrossEntropyLoss, fused_linear_cross_entropy
from torchtitan.config.sections import Comm
from torchtitan.distributed.utils import end_process, get_world, init_distributed

IN_TREE, GATHERED = "in-tree", "weight gathered"


def gather_weight(
    hidden: Tensor,  # (T, D), a DTensor sharded over the tokens
    weight: Tensor,  # (V, D), a DTensor sharded over the vocabulary
    labels: Tensor,  # (T,)
    scale: Tensor,  # ()
    *,
    budget_bytes: int,
) -> Tensor:
    """The loss of this rank's tokens by the whole weight: what a loss that knows no shards needs."""
    assert isinstance(hidden, DTensor) and isinstance(weight, DTensor)
    # each rank's tokens make a part of the weight's gradient, which is summed on its way back to the shards
    whole = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    mine = shard(labels, hidden.device_mesh).to_local()
    return fused_linear_cross_entropy(hidden.to_local(), whole, mine, scale=scale, budget_bytes=budget_bytes)


def shard(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Of a tensor that all ranks have alike, rows to each."""
    return distribute_tensor(tensor.detach(), mesh, [Shard(0)], src_data_rank=None)


def shard_problem(problem: Problem, mesh: DeviceMesh) -> Problem:
    hidden, weight = (shard(t, mesh).requires_grad_() for t in (problem.hidden, problem.weight))
    return replace(problem, hidden=hidden, weight=weight)


def measure(num_tokens: int, args: argparse.Namespace, mesh: DeviceMesh) -> list[dict[str, Any]]:
    whole = make_problem(args, num_tokens, args.ignored)
    dist.broadcast(whole.labels, src=0)  # drawn by a cumulative sum, which GPUs round each in its own order
    whole = replace(whole, host_labels=whole.labels.cpu())
    reference = float32_gradients(whole)
    problem = shard_problem(whole, mesh)
    share = replace(whole, weight=problem.weight.to_local())  # type: ignore[attr-defined]
    budget_bytes = args.budget * MIB
    ways: dict[str, LossFn] = {
        IN_TREE: fused(FusedLinearCrossEntropyLoss(budget_bytes=budget_bytes)),
        GATHERED: partial(gather_weight, budget_bytes=budget_bytes),
    }
    floor = timed({"floor": bare_products(share)}, args)["floor"]
    rows: list[dict[str, Any]] = []
    for name, loss_fn in ways.items():

        def step(loss_fn: LossFn = loss_fn) -> None:
            problem.clear()
            problem.run(loss_fn)

        dist.barrier()
        median = timed({name: step}, args)[name]
        problem.clear()
        peak = peak_bytes(lambda fn=loss_fn: problem.run(fn), args.device)  # type: ignore[misc]
        problem.clear()
        loss, errors = run_and_compare(problem, loss_fn, reference, is_part=name == GATHERED)
        cost = get_head_cost(
            vocab_size=args.vocab,
            dim=args.dim,
            num_tokens=num_tokens,
            tp_degree=mesh.size(),
            bytes_per_element=whole.weight.element_size(),
            budget_bytes=budget_bytes,
            gather_weight=name == GATHERED,
        )
        rows.append(
            {
                "tp": mesh.size(),
                "name": name,
                "tokens": num_tokens,
                "ms": largest(median, mesh),
                "peak_mib": largest(peak / MIB, mesh),
                "moved_mb": cost.moved / 1e6,
                "loss": loss,
                "d_hidden_error": errors[0],
                "d_weight_error": errors[1],
            }
        )
    floor_ms = largest((floor + timed({"floor": bare_products(share)}, args)["floor"]) / 2, mesh)  # the clock drifts
    return [row | {"floor_ms": floor_ms, "x_floor": row["ms"] / floor_ms} for row in rows]


def run_and_compare(
    problem: Problem, loss_fn: LossFn, reference: tuple[Tensor, Tensor], *, is_part: bool
) -> tuple[float, list[float]]:
    """The loss over all ranks, and the errors of both gradients; `is_part` where each rank has a part of the loss."""
    loss = problem.run(loss_fn).detach()
    if is_part:
        dist.all_reduce(loss)
    errors = []
    for tensor, correct in zip((problem.hidden, problem.weight), reference, strict=True):
        assert isinstance(tensor.grad, DTensor)
        gradient = tensor.grad.full_tensor().float()
        errors.append(((gradient - correct).norm() / correct.norm()).item())
    problem.clear()
    return loss.item(), errors


def largest(value: float, mesh: DeviceMesh) -> float:
    """Over the ranks."""
    tensor = torch.tensor(value, device=mesh.device_type)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['tokens']} tokens, tp {rows[0]['tp']}; floor {rows[0]['floor_ms']:.2f} ms")
    print(f"{'':18}{'ms':>9}{'x floor':>9}{'peak MiB':>10}{'moved MB':>10}{'loss':>11}{'dH error':>11}{'dW error':>11}")
    for row in rows:
        print(
            f"{row['name']:18}{row['ms']:9.2f}{row['x_floor']:9.2f}{row['peak_mib']:10.0f}{row['moved_mb']:10.1f}"
            f"{row['loss']:11.6f}{row['d_hidden_error']:11.2e}{row['d_weight_error']:11.2e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of all ranks together")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--ignored", type=float, default=0.01, help="share of the labels that are ignored")
    parser.add_argument("--budget", type=int, default=1024, help="MiB of logits")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_loss_tp"))
    args = parser.parse_args()

    device = init_distributed(Comm(trace_buf_size=0), dump_folder=str(args.out), device_type=args.device)
    world = get_world()
    mesh = init_device_mesh(device.type, (world.size,))
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for num_tokens in args.tokens:
        new = measure(num_tokens, args, mesh)
        rows += [row | get_origin(device) | {"seed": args.seed} for row in new]
        if world.rank == 0:
            print_table(new)
            (args.out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end_process(0)
