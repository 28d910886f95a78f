"""Helpers around a run and before it.

logging       the package's one logger
terminal      a live progress line below a scrolling log
process       what a worker arranges with the operating system
packages      which packages that only some runs need are there
device        the device's kind, its peak arithmetic, the memory in use
gc            Python's garbage collector, at chosen steps
profiling     traces of a step, and snapshots of the CUDA allocator
"""
