"""How a model is divided over processes; each file applies one idea to a model from outside.

parallel_dims             the degrees, and the device mesh they make
utils                     the process group, seeds, reductions, clipping
last_words                what a rank that fails tells the others
init_weights              starting weights that do not depend on the layout
tensor_parallel           matrices and the sequence between them, split
context_parallel          the sequence, split
pipeline_parallel         the layers, split; pipeline_split says where
activation_checkpoint     recompute instead of keep
compile                   torch.compile, block by block
fsdp                      weights, gradients and optimizer states, sharded; mixed precision
mixed_precision           mixed precision without sharding, for one process
"""
