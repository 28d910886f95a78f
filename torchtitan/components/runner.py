"""Forward and backward of one microbatch: the whole model on each rank here, pipeline stages in pipeline_parallel.py.

The trainer and the validator hold one Runner and never ask which it is.

Shapes: B sequences of this data rank, S tokens of each on this context rank, D model dim, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torchtitan.components.loss import CrossEntropyLoss, EvalLoss
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Float8, Parallelism, Training
from torchtitan.distributed.activation_offload import apply_offload
from torchtitan.distributed.attention_kernels import report_kernel
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.pipeline_parallel import LossSum, build_pipeline
from torchtitan.protocols.model import Decoder, Loss
from torchtitan.protocols.sequences import Sequences
from torchtitan.protocols.train_spec import ModelArgs
from torchtitan.tools.logging import logger


class Runner(Protocol):
    """Runs microbatches through the model parts that this rank holds."""

    model_parts: list[Decoder]

    def forward_backward(
        self,
        tokens: Tensor,  # (B, S) int64
        labels: Tensor,  # (B, S) int64; on the host where the loss takes them there
        sequences: Sequences | None,  # None: whole ones
        scale: Tensor,  # () float32
    ) -> Tensor:
        """Add to the gradients; returns this rank's share of the loss, detached (0 where another rank has it)."""

    def eval_loss(
        self, tokens: Tensor, labels: Tensor, sequences: Sequences | None, *, loss_sum: LossSum | None = None
    ) -> Tensor:
        """Sum of this rank's token losses, by the standard path, without gradients (0 where another rank has it).

        The logits are made of some tokens at a time, as the budget of the EvalLoss says.

        loss_sum: called instead with the logits (B, S, V) and labels, or some sequences' at a time; its results add up.
        """


class EagerRunner:
    """The whole model on every rank."""

    def __init__(self, model: Decoder, loss: Loss, *, eval_loss: EvalLoss | None = None) -> None:
        assert model.output is not None
        self.model_parts = [model]
        self._head = model.output
        self._model = model
        self._loss = loss
        self._eval_loss = eval_loss or EvalLoss()

    def forward_backward(self, tokens: Tensor, labels: Tensor, sequences: Sequences | None, scale: Tensor) -> Tensor:
        hidden = self._model(tokens, return_hidden_states=True, sequences=sequences)  # (B, S, D)
        loss = self._loss(hidden, self._head, labels, scale)
        del hidden  # the graph keeps what backward needs
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def eval_loss(
        self, tokens: Tensor, labels: Tensor, sequences: Sequences | None, *, loss_sum: LossSum | None = None
    ) -> Tensor:
        if loss_sum is not None:
            return loss_sum(self._model(tokens, sequences=sequences), labels)
        hidden = self._model(tokens, return_hidden_states=True, sequences=sequences)
        return self._eval_loss(hidden, self._head, labels)


def build_runner(
    build_model: Callable[[], Decoder],
    model_args: ModelArgs,
    loss: Loss,
    *,
    parallelize: Callable[[Decoder], None],
    mesh: Mesh,
    parallelism: Parallelism,
    training: Training,
    device: torch.device,
    seed: int,
    logits_budget_bytes: int = 1 << 30,
    float8: Float8 | None = None,
    offload: bool = False,
    weight_dtype: torch.dtype = torch.float32,
) -> Runner:
    """Build the model on the meta device, divide it, then give this rank's parts their memory and starting weights.

    logits_budget_bytes: for the logits of a validation, and what the loss makes of them.
    float8: how the blocks' linear layers are converted; None leaves them.
    offload: what recomputed blocks keep goes to the machine's memory.
    """

    def build_on_meta() -> Decoder:
        with torch.device("meta"):
            model = build_model().to(weight_dtype)
        if training.document_mask and not model.keeps_documents_apart:
            raise ConfigError(
                f"training.document_mask needs a model that keeps documents apart, and {type(model).__name__} does not"
                " say that it does; leave the option out, or have its attention obey sequences.documents and set"
                " keeps_documents_apart = True in its class"
            )
        if float8 is not None:
            from torchtitan.distributed.float8 import apply_float8

            sharded = mesh["dp_shard_cp"].size() > 1
            apply_float8(model, float8, tp=mesh["tp"].size(), sharded=sharded, device=device)
        return model

    if device.type == "cuda":
        if training.document_mask:
            logger.info("Attention stays within documents, and runs on FlashAttention-2 for sequences of many lengths")
        else:
            report_kernel(
                num_heads=model_args.n_heads,
                num_kv_heads=model_args.n_kv_heads,
                head_dim=getattr(model_args, "head_dim", model_args.dim // model_args.n_heads),
                seq_len=training.seq_len,
                dtype=getattr(torch, training.mixed_precision_param),
                device=device,
            )
    eval_loss = EvalLoss(budget_bytes=logits_budget_bytes, compile=training.compile)
    runner: Runner
    if mesh["pp"].size() > 1:
        if not isinstance(loss, CrossEntropyLoss):
            raise ConfigError(
                f"the model has a loss of its own, {type(loss).__name__}, and pipelines use the standard one;"
                f" parallelism.pipeline_parallel_degree={mesh['pp'].size()} must be 1"
            )
        runner = build_pipeline(
            build_on_meta,
            n_layers=model_args.n_layers,
            dim=model_args.dim,
            vocab_size=model_args.vocab_size,
            parallelize=parallelize,
            loss_sum=loss.sum,
            eval_loss=eval_loss,
            mesh=mesh,
            parallelism=parallelism,
            training=training,
            device=device,
        )
    else:
        model = build_on_meta()
        parallelize(model)
        if offload:
            apply_offload(model, device)
        runner = EagerRunner(model, loss, eval_loss=eval_loss)

    parameter_device = torch.device("cpu") if training.enable_cpu_offload else device
    for part in runner.model_parts:
        part.to_empty(device=parameter_device)
        init_parameters(part, seed, device)
        part.init_buffers(device)
        part.train()
    return runner
