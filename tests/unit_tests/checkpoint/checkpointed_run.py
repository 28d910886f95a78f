"""A trainer in miniature that saves checkpoints, for tests."""

import errno
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.manager import CheckpointManager, build_checkpoint_manager
from torchtitan.components.data_state import DataloaderStateError
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Checkpoint, LRScheduler, Optimizer, Parallelism, Training
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import build_mesh
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import parallelize_transformer
from torchtitan.models.llama3 import train_spec

build_adapter = train_spec.load().state_dict_adapter

MODEL = TransformerModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=61, max_seq_len=64
)

MODES = ["disabled", "async", "async_with_pinned_mem"]

TOKENIZER = Path(__file__).parents[2] / "assets/tokenizer"


class Numbers:
    """A data loader: the n-th batch is a function of n, the same on all ranks."""

    def __init__(self, dp_rank: int = 0, dp_world_size: int = 1):
        self.dp_rank, self.dp_world_size, self.position = dp_rank, dp_world_size, 0

    def __next__(self) -> Tensor:
        self.position += 1
        return torch.randint(MODEL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(self.position))

    def state_dict(self) -> dict[str, Any]:
        return {"dp_world_size": self.dp_world_size, f"dp_rank_{self.dp_rank}": json.dumps(self.position)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["dp_world_size"] != self.dp_world_size:
            raise DataloaderStateError(f"read by {state_dict['dp_world_size']} ranks: exclude_from_loading dataloader")
        self.position = json.loads(state_dict[f"dp_rank_{self.dp_rank}"])


@dataclass
class Run:
    """A trainer in miniature. Its loss depends on everything that a checkpoint carries."""

    parts: list[nn.Module]
    options: dict[str, Any]
    dump_folder: Path
    data: Numbers
    steps: int = 10
    noisy: bool = False
    is_restart: bool = False
    compact: bool = False
    step: int = 0

    def __post_init__(self) -> None:
        precision = "compact" if self.compact else "float32"
        self.optimizer = build_optimizer(self.parts, Optimizer(lr=1e-2, state_precision=precision))
        self.lr_scheduler = build_lr_scheduler(self.optimizer, LRScheduler(warmup_steps=2), self.steps)
        self.checkpointer: CheckpointManager = build_checkpoint_manager(
            Checkpoint(**{"enable_checkpoint": True, "interval": 2, **self.options}),
            dump_folder=str(self.dump_folder),
            model_parts=self.parts,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.data,
            train_state=self,
            steps=self.steps,
            is_restart=self.is_restart,
            adapter=build_adapter(self.parts[0].args),
            tokenizer_path=str(TOKENIZER),
            bos_id=59,
            eos_id=60,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    def train(self, last: int, *, save: bool = True) -> list[float]:
        """Up to step `last`; the loss of each step."""
        losses = []
        while self.step < last:
            self.step += 1
            batch = next(self.data).to(self.parts[0].norm.weight.device if self.parts[0].norm else "cpu")
            hidden = batch[:, :-1]
            for part in self.parts:
                hidden = part(hidden)
            loss = F.cross_entropy(hidden.flatten(0, 1).float(), batch[:, 1:].flatten())
            noise = 1 + 0.1 * (torch.rand(()) + random.random()) if self.noisy else torch.tensor(1.0)
            (noise * loss / self.data.dp_world_size).backward()  # FSDP adds up the ranks' gradients
            self.checkpointer.maybe_wait_for_staging()
            self.optimizer.step(grad_factor=torch.tensor(1.0), skip=torch.tensor(False))
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            losses.append((noise * loss).item())
            if save:
                self.checkpointer.maybe_save(self.step, last_step=self.step == self.steps)
        return losses

    def full_state(self) -> dict[str, Tensor]:
        """Whole weights and moments, whatever the layout."""
        state = {name: weight for part in self.parts for name, weight in part.state_dict().items()}
        state |= self.optimizer.state_dict()
        return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in state.items()}


def build_run(
    dump_folder: Path,
    dims: ParallelDims | None = None,
    *,
    args: TransformerModelArgs = MODEL,
    steps: int = 10,
    noisy: bool = False,
    is_restart: bool = False,
    compact: bool = False,
    device: str = "cpu",
    **options: Any,
) -> Run:
    dims = dims or ParallelDims()
    torch.manual_seed(1)
    random.seed(1)
    mesh = build_mesh(dims, device)
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16 if compact else torch.float32)
    parallelize_transformer(
        model,
        mesh=mesh,
        parallel_dims=dims,
        parallelism=Parallelism(disable_loss_parallel=True),
        training=Training(mixed_precision_param="bfloat16" if compact else "float32"),
        block_modes=("none",) * len(model.layers),
        loss_parallel=False,
    )
    if device == "cuda":  # parallelize_transformer leaves FSDP out on one rank
        apply_fsdp(model, mesh, dims, param_dtype=torch.float32)
    model.to_empty(device=device)
    model.init_buffers(device)
    init_parameters(model, seed=3, device=device)
    data = Numbers(dp_rank=mesh["dp"].get_local_rank(), dp_world_size=dims.dp)
    return Run([model], options, dump_folder, data, steps, noisy, is_restart, compact)


def folder(run: Run) -> Path:
    return run.dump_folder / "checkpoint"


def names(run: Run) -> list[str]:
    return sorted(path.name for path in folder(run).iterdir())


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "a bit":  # of the weights or moments, which are what its middle holds
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    else:
        file.write_bytes(bytes(len(content)))


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
