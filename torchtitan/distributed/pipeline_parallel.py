"""Pipeline parallelism: each rank holds some of the layers, and microbatches pass through the ranks.

A stage is the whole model with the modules of other stages taken out: set to None, or deleted from `layers`, so
parameters keep their names. The schedules are those of torch.distributed.pipelining. A local batch is cut into
microbatches; the last stage computes their losses, `scale * sum over the microbatch's tokens`, so gradients and losses
just add up, over microbatches as over ranks, and the schedules scale nothing. Under FSDP the weights stay gathered and
the gradients unreduced until the schedule's last microbatch.

| schedule              | stages on rank r of P            | bubble, as a share of the work of M microbatches |
|---|---|---|
| GPipe                 | r                                | (P - 1) / M; keeps activations of M microbatches |
| 1F1B                  | r                                | (P - 1) / M; keeps those of P                    |
| Interleaved1F1B       | r, r + P, ... (V of them)        | (P - 1) / (V * M)                                |
| InterleavedZeroBubble | r, r + P, ...                    | less: weight gradients are computed in the gaps  |
| ZBVZeroBubble         | r and 2 * P - 1 - r              | less still                                       |

What passes between stages is the hidden state as its blocks have it: (microbatch, S / (cp * tp), D) on each rank, in
the dtype of mixed precision. Its shape is known in advance, so nothing is sent to agree on it.

Shapes: B local batch, S this context rank's tokens, D model dim, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

from torchtitan.config.pipeline_split import get_stage_modules, get_stages_of_rank
from torchtitan.config.sections import Parallelism, Training
from torchtitan.distributed.mesh import Mesh
from torchtitan.protocols.model import Decoder, OutputHead
from torchtitan.protocols.sequences import Sequences

LossSum = Callable[[Tensor, Tensor], Tensor]
"""(logits, labels) -> sum of the token losses, float32."""
HeadLossSum = Callable[[Tensor, OutputHead, Tensor], Tensor]
"""(hidden states, head, labels) -> the same."""


def build_pipeline(
    build_model: Callable[[], Decoder],
    *,
    n_layers: int,
    dim: int,
    vocab_size: int,
    parallelize: Callable[[Decoder], None],
    loss_sum: LossSum,
    eval_loss: HeadLossSum,
    mesh: Mesh,
    parallelism: Parallelism,
    training: Training,
    device: torch.device,
) -> "PipelineRunner":
    """This rank's stages and the schedule that runs them.

    Args:
        build_model: makes the whole model on the meta device; called once for each stage of this rank.
        parallelize: divides a stage over the other axes of the mesh, in place.

    The options are those that config/validate.py accepts.
    """
    pp_group, pp_rank, pp_degree = mesh["pp"].get_group(), mesh["pp"].get_local_rank(), mesh["pp"].size()
    parts = get_stage_modules(parallelism, n_layers)
    microbatch_size = parallelism.pipeline_parallel_microbatch_size
    tp_degree, dtype = mesh["tp"].size(), getattr(torch, training.mixed_precision_param)

    def new_hidden(tokens: Tensor, device: torch.device | str = device) -> Tensor:
        """Room for the hidden states of tokens (B, S): (B, S / tp, D)."""
        return torch.empty(tokens.size(0), tokens.size(1) // tp_degree, dim, dtype=dtype, device=device)

    local_len = training.seq_len // mesh["cp"].size()
    tokens = torch.empty(microbatch_size, local_len, dtype=torch.int64, device="meta")
    hidden = new_hidden(tokens, device="meta").requires_grad_()
    logits = hidden.new_empty(microbatch_size, local_len, vocab_size).requires_grad_()

    stages: list[PipelineStage] = []
    for index in get_stages_of_rank(parallelism.pipeline_parallel_schedule, pp_rank, pp_degree, len(parts)):
        model = build_model()
        keep_modules(model, parts[index])
        parallelize(model)
        stages.append(
            _Stage(
                model,
                index,
                len(parts),
                device,
                input_args=tokens if index == 0 else hidden,
                output_args=logits if index == len(parts) - 1 else hidden,
                group=pp_group,
            )
        )

    loss = _ScaledLoss(loss_sum)
    schedule_class = get_schedule_class(parallelism.pipeline_parallel_schedule)
    schedule = schedule_class(
        stages if issubclass(schedule_class, PipelineScheduleMulti) else stages[0],
        n_microbatches=training.local_batch_size // microbatch_size,
        loss_fn=loss,
        scale_grads=False,
    )
    return PipelineRunner(stages, schedule, loss, eval_loss, new_hidden, microbatch_size)


@dataclass
class PipelineRunner:
    """Runs local batches through the pipeline; a Runner (components/runner.py)."""

    stages: list[PipelineStage]
    schedule: PipelineScheduleSingle | PipelineScheduleMulti
    loss: "_ScaledLoss"
    head_loss: HeadLossSum
    new_hidden: Callable[[Tensor], Tensor]
    """For the tokens of a microbatch, room for what passes from stage to stage."""
    microbatch_size: int

    def __post_init__(self) -> None:
        self.model_parts: list[Decoder] = [cast(Decoder, stage.submod) for stage in self.stages]

    def forward_backward(
        self,
        tokens: Tensor,  # (B, S) int64
        labels: Tensor,  # (B, S) int64
        sequences: Sequences | None,
        scale: Tensor,  # () float32
    ) -> Tensor:
        """Add to the gradients; the loss, detached, is on the rank of the last stage, and 0 on the others."""
        self.loss.scale = scale
        inputs = (tokens,) if any(stage.is_first for stage in self.stages) else ()
        target = labels if any(stage.is_last for stage in self.stages) else None
        for_all_stages: dict[str, Any] = {} if sequences is None else {"sequences": sequences}
        losses: list[Tensor] = []
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **for_all_stages)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=tokens.device)

    @torch.no_grad()
    def eval_loss(
        self, tokens: Tensor, labels: Tensor, sequences: Sequences | None, *, loss_sum: LossSum | None = None
    ) -> Tensor:
        """Sum of the token losses on the rank of the last stage, 0 on the others; any batch size and length.

        Each microbatch passes through all stages before a rank turns to the next. All ranks so send and receive in
        one order, by microbatch and then by stage, and need no schedule to keep them from waiting for each other.
        """
        total = torch.zeros((), device=tokens.device)
        parts = [None] * len(tokens) if sequences is None else sequences.split(self.microbatch_size)
        for inputs, targets, part in zip(
            tokens.split(self.microbatch_size), labels.split(self.microbatch_size), parts, strict=False
        ):
            x = inputs
            for stage in self.stages:
                rank_of = stage.stage_index_to_group_rank
                if not stage.is_first and rank_of[stage.stage_index - 1] != stage.group_rank:
                    x = self.new_hidden(inputs)
                    dist.recv(x, group=stage.group, group_src=rank_of[stage.stage_index - 1])
                by_rows = stage.is_last and loss_sum is None
                x = stage.submod(x, return_hidden_states=by_rows, sequences=part)
                if by_rows:
                    total = total + self.head_loss(x, cast(OutputHead, stage.submod.output), targets)
                elif loss_sum is not None and stage.is_last:
                    total = total + loss_sum(x, targets)
                elif rank_of[stage.stage_index + 1] != stage.group_rank:
                    dist.send(x.contiguous(), group=stage.group, group_dst=rank_of[stage.stage_index + 1])
        return total


def keep_modules(model: nn.Module, names: list[str]) -> None:
    """Take out of `model` all direct children, and all entries of its dictionaries of modules, but those named."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ModuleDict):
            for key in list(child):
                if f"{name}.{key}" not in names:
                    del child[key]
        elif name not in names:
            setattr(model, name, None)


class _Stage(PipelineStage):
    """What torch 2.11 needs to be told; 2.13 calls neither method."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Greetings that warm up the way to the neighbours, but not to one on this rank: gloo cannot send to itself."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Compare what is sent with what was announced, but not logits, which stay here: they may be a DTensor."""
        if not self.is_last:
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]


@dataclass
class _ScaledLoss:
    """The loss inside the schedule, which calls it with logits and labels only; set `scale` before each step."""

    sum: LossSum
    scale: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self.scale is not None, "scale is set before each step"
        return self.sum(logits, labels) * self.scale
