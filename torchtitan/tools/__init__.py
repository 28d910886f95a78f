"""Helpers around a run and before it.

logging           the package's one logger
terminal          a live progress line below a scrolling log
process           what a worker arranges with the operating system
device            the device's kind, its peak arithmetic, the memory in use
gc                Python's garbage collector, at chosen steps
host_mirror       device values read one step late, without waiting
profiling         traces of a step, and snapshots of the CUDA allocator
memory_estimate   the memory that a run needs, by part and by moment
memory_measure    what a block and the loss keep and need, for the estimate
memory_trace      which tensors exist when, on the meta device
head_cost         memory and traffic of the output projection and its loss
out_of_memory     what took the memory, and which options would free how much
"""
