"""What the process imports that tests fork others from (processes.py)."""

import gc

import pytest  # noqa: F401

import torchtitan.models.common.parallelize
import torchtitan.models.common.state_dict_adapter
import torchtitan.models.llama3
import torchtitan.models.qwen3
import torchtitan.train  # noqa: F401

gc.freeze()  # a collector that walks what was imported takes longer than many a run, and copies its memory
