"""A tiny Llama 3 on any layout, and one step of it, for tests that compare layouts with one process."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.config.block_modes import BlockMode
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import Mesh, build_mesh
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import parallelize_transformer

# A vocabulary that no degree divides.
ARGS = partial(
    TransformerModelArgs, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=101, max_seq_len=16
)


def build_model(
    dims: ParallelDims,
    *,
    mesh: Mesh | None = None,
    parallelism: Parallelism | None = None,
    training: Training | None = None,
    block_modes: Sequence[BlockMode] | None = None,
    loss_parallel: bool = False,
    **args: Any,
) -> Transformer:
    """In float32 and without checkpointing unless said otherwise; the same weights on every layout."""
    with torch.device("meta"):
        model = Transformer(ARGS(**args))
    parallelize_transformer(
        model,
        mesh=mesh or build_mesh(dims, "cpu"),
        parallel_dims=dims,
        parallelism=parallelism or Parallelism(),
        training=training or Training(mixed_precision_param="float32"),
        block_modes=block_modes or ("none",) * len(model.layers),
        loss_parallel=loss_parallel,
    )
    model.to_empty(device="cpu")
    init_parameters(model, seed=7, device="cpu")
    model.init_buffers("cpu")
    return model


def get_batch(batch_size: int = 4, seq_len: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens and labels, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(ARGS().vocab_size, (2, batch_size, seq_len), generator=generator)
    return tokens, labels


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropies, from whole logits on every rank."""
    return nn.functional.cross_entropy(whole(logits).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; differentiable."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def get_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = whole(parameter.grad).detach()
    return gradients
