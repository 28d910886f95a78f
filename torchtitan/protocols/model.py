"""What the trainer and the parallelisms expect of a model: equal blocks between an embedding and an output."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.protocols.sequences import Sequences

T = TypeVar("T")
Initializer = Callable[[Tensor, torch.Generator], object]
"""Fills a whole parameter, drawing from the generator."""


class OutputHead(nn.Linear):
    """The projection to logits. Fused losses, which never make the logits, take its weight through `with_weight`.

    It has no bias: one would be part of the standard loss only.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def with_weight(self, fn: Callable[[Tensor, Tensor], T], hidden: Tensor) -> T:
        """fn(hidden, weight), where weight may be read: FSDP gathers it before and reduces its gradient after.

        What else fn needs is bound to it: hidden is the one tensor that FSDP's hooks are to see. The weight has the
        dtype of the hidden states, as FSDP makes it, or by a cast where a single process keeps it in float32.
        """
        return fn(hidden, self.weight.to(hidden.dtype))

    def forward(self, input: Tensor) -> Tensor:  # hidden states (B, S, D) -> logits (B, S, V)
        return F.linear(input, self.weight.to(input.dtype))


class TiedOutputHead(OutputHead):
    """Projects with the embedding's weight, which stays the embedding's: one parameter with one name.

    Its gradient is the sum of both uses, whichever comes first. FSDP keeps it gathered from the embedding to the head,
    and reduces the gradient once, after both.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.out_features, self.in_features = embedding.weight.shape
        self.register_parameter("bias", None)
        self._embedding = (embedding,)  # in a tuple, where it is no child: its weight is not counted twice

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._embedding[0].weight


class Decoder(nn.Module):
    """The base of a model. On a pipeline stage, the modules that other stages have are None."""

    tok_embeddings: nn.Module | None
    layers: nn.ModuleDict
    """The blocks by their number, as text."""
    norm: nn.Module | None
    output: OutputHead | None

    keeps_documents_apart = False
    """Whether `sequences.documents` is obeyed: training.document_mask is refused where it is not."""

    def forward(
        self,
        tokens: Tensor,  # (B, S) int64; on a later pipeline stage the hidden states (B, S, D)
        return_hidden_states: bool = False,
        *,
        sequences: Sequences | None = None,  # None: whole ones, every token of which sees all before it
    ) -> Tensor:
        """The logits (B, S, V), or the hidden states (B, S, D), which `output` takes."""
        raise NotImplementedError

    def weight_initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by its name."""
        raise NotImplementedError

    def init_buffers(self, device: torch.device | str | None) -> None:
        """Compute on `device` the buffers that no checkpoint holds."""
        raise NotImplementedError


class Loss(Protocol):
    """What the trainer calls; components/loss/__init__.py has the shapes and the meaning."""

    def __call__(self, hidden: Tensor, head: OutputHead, labels: Tensor, scale: Tensor) -> Tensor: ...


class StateDictAdapter(Protocol):
    """Hugging Face's names and layouts for a model's weights, and back.

    Of a weight only the rows may be in another order; both ways then also reorder a 1-dim tensor of as many numbers,
    from which a rank learns which rows to read.
    """

    hf_names: Mapping[str, str]
    """Theirs for each of the whole model's weights."""
    hf_copies: Mapping[str, str]
    """Names under which a weight may lie there once more, as a tied output does, and that weight's name there."""

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def to_hf_config(self) -> dict[str, Any]:
        """What goes into config.json beside the weights: all that decides the shapes and the maths."""
