"""The losses of training, and the choice between them.

| file | what it holds |
|---|---|
| cross_entropy.py | standard: logits, then cross entropy in float32; the oracle of the others |
| eval_loss.py | the standard loss of validation, some tokens at a time |
| liger.py | Liger-Kernel's fused linear cross entropy, its chunks sized from a memory budget |
| fused_linear.py | the in-tree fused linear cross entropy: CPU, GPU, and a vocabulary sharded over ranks |
| logprobs.py | log-probabilities of the labels, by the same means, for losses of your own |
| terms.py | what a token's loss is made of: z-loss, softcap, label smoothing, class weights, bias |
| token_sums.py | what training tells of its tokens: z-loss, accuracy, entropy, the loss of each sequence |
| operators.py | the walks of both over the tokens, as operators that torch can compile |
| chunked_logits.py | a chunk's logits, their statistics over all ranks, and the products with their gradient |
| softmax_gradient.py | statistics and gradient of one chunk of logits, in place; _triton.py holds its GPU kernels |
| gradients.py | how the gradients of chunks add up, and how backward hands them out, once |
| valid_rows.py | the tokens that are walked over where the host knows which are ignored |
| vocab_shard.py | which rows of the vocabulary this rank holds; the one place where a DTensor becomes local |
| chunking.py | how many tokens fit a memory budget |
| build.py | build_loss: which loss a configuration means |

build.py and liger.py are the trainer's; all else here needs torch alone, and may be copied out of this package.

Every loss is called as `loss(hidden, head, labels, scale)`:

    hidden   (B, S, D) hidden states after the final norm (a DTensor under tensor parallelism)
    head     the model's `output`, an OutputHead with weight (V, D)
    labels   (B, S) int64; IGNORE_INDEX marks tokens without a target. On the device, or, where the loss has a true
             `takes_host_labels`, on the host: ignored tokens are then not computed
    scale    0-dim float32 tensor, 1 / (valid tokens of the whole global batch)

and returns `scale * sum of this rank's cross entropies`, a float32 scalar, whose gradients are also those of the z-loss
(token_sums.py). Summed over microbatches and data ranks this is the mean over all valid tokens. Nothing else divides:
not FSDP, not the trainer. A loss with a true `tells_tokens` also fills the TokenSums that it is built with.
"""

from torchtitan.components.loss.cross_entropy import CrossEntropyLoss, cross_entropy_sum
from torchtitan.components.loss.eval_loss import EvalLoss
from torchtitan.components.loss.fused_linear import (
    FusedLinearCrossEntropyLoss,
    LossOutputs,
    fused_linear_cross_entropy,
)
from torchtitan.components.loss.logprobs import LogProbs, linear_logprobs
from torchtitan.components.loss.terms import IGNORE_INDEX
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.components.loss.vocab_shard import VocabShard

__all__ = [
    "IGNORE_INDEX",
    "CrossEntropyLoss",
    "EvalLoss",
    "FusedLinearCrossEntropyLoss",
    "LogProbs",
    "LossOutputs",
    "TokenSums",
    "VocabShard",
    "cross_entropy_sum",
    "fused_linear_cross_entropy",
    "linear_logprobs",
]
