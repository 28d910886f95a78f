"""How a model is divided over processes; each file applies one idea to a model from outside.

mesh                      the device mesh of a layout
parallelize               the parallelisms below, applied to a model in the order that they need
utils                     the process group, seeds, reductions, clipping
init_weights              starting weights that do not depend on the layout
tensor_parallel           matrices and the sequence between them, split
context_parallel          the sequence, split
attention_kernels         attention in parts, by the kernels that whole sequences take
document_attention        attention that stops at the boundaries of documents
pipeline_parallel         the layers, split
activation_checkpoint     recompute instead of keep
float8                    the blocks' linear layers in 8 bits
compile                   torch.compile, block by block
fsdp                      weights, gradients and optimizer states, sharded; mixed precision
mixed_precision           mixed precision without sharding, for one process
"""
