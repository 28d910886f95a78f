"""A Transformer on many devices: what is its own of the way that distributed/parallelize.py divides a model."""

from functools import partial

from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from torchtitan.distributed.parallelize import parallelize_decoder
from torchtitan.distributed.tensor_parallel import IN_A_ROW, SEQUENCE, gathered_sequence

# Of the feed-forward's results those of w1 and w3 are the large ones: one of them is recomputed. Nothing in backward
# needs that of w2, since the next block keeps its own input.
KEPT_RESULTS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1")

TENSOR_PARALLEL_PLAN = {
    "attention_norm": SequenceParallel(),
    "attention": gathered_sequence(SEQUENCE, None, None),
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    # each rank normalises its own heads, and the gradients of the weights, which all have, are summed
    "attention.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
    "attention.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
    "attention.wo": RowwiseParallel(output_layouts=SEQUENCE),
    # the feed-forward sees each token alone: the ranks' parts lie one behind the other, which no copy has to reorder
    "ffn_norm": SequenceParallel(use_local_output=True),
    "feed_forward": gathered_sequence(IN_A_ROW),
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w3": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(output_layouts=IN_A_ROW),
}

parallelize_transformer = partial(
    parallelize_decoder, tensor_parallel_plan=TENSOR_PARALLEL_PLAN, kept_results=KEPT_RESULTS
)
