"""Mixed precision for one process, where FSDP has nothing to shard.

Weights stay float32, as FSDP's shards would, and each layer casts them where it uses them; autograd casts their
gradients back. FSDP would gather each unit into a buffer and copy it out again, twice a step, and stage its gradient:
on one H100 80GB that is 7% of a step of the 1B flavour (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.protocols.model import Decoder


def apply_mixed_precision(model: Decoder, dtype: torch.dtype) -> None:
    """Have `model` compute in `dtype` with float32 weights, in place.

    The embedding decides the dtype: what follows keeps to it. Layers change their class, as FSDP has them do, rather
    than their `forward`, so that all blocks stay alike for torch.compile.
    """
    for module in model.modules():
        if type(module) in _CASTING:
            module.__class__ = _CASTING[type(module)]
    if model.tok_embeddings is not None:
        model.tok_embeddings.output_dtype = dtype  # type: ignore[assignment]


class CastingEmbedding(nn.Embedding):
    output_dtype: torch.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.output_dtype)  # casts what was looked up, not the table


class CastingLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class CastingRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


_CASTING: dict[type, type] = {
    nn.Embedding: CastingEmbedding,
    nn.Linear: CastingLinear,
    nn.RMSNorm: CastingRMSNorm,
}
