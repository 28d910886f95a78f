"""Most tests here estimate the same few runs, and half a second of each goes into what is measured: once is enough."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.sections import ActivationCheckpoint
from torchtitan.memory import estimate
from torchtitan.memory.measure import Measured, measure
from torchtitan.protocols.train_spec import get_run_args

KNOWN: dict[str, Measured] = {}


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    def look_up(config: JobConfig, dims: ParallelDims, mesh: Any) -> Measured:
        if mesh is not None and dims.world_size > 1:
            return measure(config, dims, mesh)
        # all ways to recompute are measured, whichever is asked for; tests change the sizes of a flavour
        options = replace(config, activation_checkpoint=ActivationCheckpoint())
        key = f"{options} {dims} {get_run_args(config.model, max_seq_len=config.max_seq_len)}"
        if key not in KNOWN:
            KNOWN[key] = measure(config, dims, mesh)
        return KNOWN[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "measure", look_up)
        yield
