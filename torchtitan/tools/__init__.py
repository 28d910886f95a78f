"""What knows nothing of training: the log, the terminal, processes, devices.

logging       the package's one logger
terminal      a live progress line below a scrolling log
files         JSON, read with the user's errors
owner         one run to an output folder
process       what a worker arranges with the operating system
packages      which packages that only some runs need are there
device        the device's kind, its peak arithmetic, the memory in use
gc            Python's garbage collector, at chosen steps
profiling     traces of a step, and snapshots of the CUDA allocator
"""
