"""What a loss sends between ranks: every collective that it adds to a step, by axis, kind and bytes.

Tensor parallel over 2 ranks and FSDP over 2, in the real trainer. A step with the loss and a step with a loss that
sends nothing are recorded; the difference is what the loss costs, whatever the rest of the model sends.
"""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integration_tests.tiny_runs import SEQ_LEN, Run, become_worker, serve_store, start
from tests.integration_tests.tiny_sizes import ODD
from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss, FusedLinearCrossEntropyLoss
from torchtitan.components.runner import EagerRunner
from torchtitan.config import ConfigManager
from torchtitan.distributed.mesh import Mesh
from torchtitan.train import Trainer

TP, FSDP, MICROBATCHES, BATCH_SIZE, CHUNK = 2, 2, 2, 8, 128
TOKENS = BATCH_SIZE * SEQ_LEN
VOCAB_ROWS = -(-ODD.vocab_size // TP)  # on the first tensor-parallel rank; the second has one less

LOSSES = {
    "standard": CrossEntropyLoss(),
    # memory for the logits of one chunk on their way to the other ranks, and for the next one's
    "fused": FusedLinearCrossEntropyLoss(budget_bytes=2 * CHUNK * VOCAB_ROWS * 4),
}
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast")

Traffic = Counter[tuple[str, str, int]]
"""How many collectives there were of (mesh axis, kind, bytes of the larger of input and output)."""


class Recorder(TorchDispatchMode):
    """Counts the collectives under it: those of FSDP, which call c10d, and those of DTensors, which are functional."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.traffic: Traffic = Counter()
        # the last of those that share a group: dp_shard_cp is dp here
        self._axes = {mesh[axis].get_group().group_name: axis for axis in ("tp", "dp", "cp", "pp", "dp_shard_cp")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.replace("allgather", "all_gather").replace("allreduce", "all_reduce").strip("_")
        kind = next((kind for kind in KINDS if name.startswith(kind)), None)
        if func.namespace in ("c10d", "_c10d_functional") and kind is not None:
            leaves = tree_leaves((args, kwargs, result))
            num_bytes = max(x.nbytes for x in leaves if isinstance(x, Tensor))
            axis = next((self._axes[name] for x in leaves if (name := _group_name(x)) in self._axes), "world")
            self.traffic[axis, kind, num_bytes] += 1
        return result


def _group_name(x: object) -> str | None:
    if isinstance(x, torch.ScriptObject) and x._type().name() == "ProcessGroup":
        return dist.ProcessGroup.unbox(x).group_name
    return x if isinstance(x, str) else None


def record(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    """Leave in `folder` what each loss sends in a step, and the gradient that it gives to hidden states."""
    become_worker(rank, TP * FSDP, port)
    importlib.import_module("tests.integration_tests.tiny_llama3")  # as the trainer's main does
    trainer = Trainer(ConfigManager().parse_args(arguments))
    model, mesh = trainer.runner.model_parts[0], trainer.mesh
    data_rank = mesh["dp"].get_local_rank()

    def record_step(loss: Any) -> Traffic:
        trainer.runner = EagerRunner(model, loss)
        with Recorder(mesh) as recorder:
            trainer.train_step(iter([batch_of(data_rank)] * MICROBATCHES))
        return recorder.traffic

    silent = record_step(_send_nothing)
    recorded: dict[str, Any] = {"weight": model.output.weight.full_tensor().detach()}
    for name, loss in LOSSES.items():
        hidden = distribute_tensor(hidden_states(), mesh["tp"], [Shard(1)]).requires_grad_()
        loss(hidden, model.output, batch_of(0).labels, torch.ones(())).backward()
        recorded[name] = {"hidden_grad": hidden.grad.full_tensor()}
    for name, loss in LOSSES.items():
        traffic = record_step(loss)
        recorded[name]["all"] = Counter(traffic)
        traffic.subtract(silent)
        recorded[name]["traffic"] = {collective: count for collective, count in traffic.items() if count}
    torch.save(recorded, folder / f"rank{rank}")
    dist.barrier()
    trainer.close()
    dist.destroy_process_group()


def batch_of(data_rank: int) -> Batch:
    generator = torch.Generator().manual_seed(data_rank)
    tokens = torch.randint(ODD.vocab_size, (BATCH_SIZE, SEQ_LEN), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[0, :5] = IGNORE_INDEX
    return Batch(tokens, labels)


def hidden_states() -> Tensor:
    return torch.randn(BATCH_SIZE, SEQ_LEN, ODD.dim, generator=torch.Generator().manual_seed(2))


def _send_nothing(hidden: DTensor, head: nn.Module, labels: Tensor, scale: Tensor) -> Tensor:
    return hidden.to_local().sum() * scale


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first rank left."""
    folder = tmp_path_factory.mktemp("traffic")
    global_batch_size = MICROBATCHES * BATCH_SIZE * FSDP
    options = f"--parallelism.tensor_parallel_degree {TP} --training.global_batch_size {global_batch_size}"
    arguments = Run("run", local_batch_size=BATCH_SIZE, options=options).arguments(folder)
    store = serve_store()
    start(record, TP * FSDP, store.port, folder, arguments)
    return torch.load(folder / "rank0", weights_only=False)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_sends_this_and_nothing_else(name: str, recorded: dict[str, Any]) -> None:
    hidden = TOKENS * ODD.dim * 4
    weight = -(-VOCAB_ROWS // FSDP) * FSDP * ODD.dim * 4  # FSDP pads it
    of_a_microbatch = {
        # the gradient of this rank's rows of the weight is reduced, over the data ranks only
        ("dp_shard_cp", "reduce_scatter", weight): 1,
        # the hidden states are gathered and their gradient is reduced, over the tensor-parallel ranks
        ("tp", "all_gather", hidden): 1,
        ("tp", "reduce_scatter", hidden): 1,
    }
    if name == "fused":  # of each token maximum, sum and the target's logit, from each rank, chunk by chunk
        of_a_microbatch["tp", "all_gather", 3 * CHUNK * 4 * TP] = TOKENS // CHUNK
    else:  # the maximum; then the sum and the target's logit
        of_a_microbatch["tp", "all_reduce", TOKENS * 4] = 1
        of_a_microbatch["tp", "all_reduce", 2 * TOKENS * 4] = 1
    expected = {collective: MICROBATCHES * count for collective, count in of_a_microbatch.items()}
    assert recorded[name]["traffic"] == expected
    # The rows themselves are gathered before, once, while the last block computes; the embedding's, which are as large,
    # in forward and again in backward.
    assert recorded[name]["all"]["dp_shard_cp", "all_gather", weight] == 3 * MICROBATCHES


@pytest.mark.parametrize("name", LOSSES)
def test_the_hidden_gradient_is_summed_over_the_vocabulary(name: str, recorded: dict[str, Any]) -> None:
    """Each rank's part of it comes from its own rows of the vocabulary only, and is no whole gradient."""
    hidden = hidden_states().double().requires_grad_()
    logits = hidden @ recorded["weight"].double().T
    F.cross_entropy(logits.flatten(0, 1), batch_of(0).labels.flatten(), reduction="sum").backward()
    error = (recorded[name]["hidden_grad"] - hidden.grad).norm() / hidden.grad.norm()
    assert error < 1e-6
