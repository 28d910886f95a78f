"""How build_runner puts a run together; what runners compute is in test_examples.py and test_pipeline_parallel.py."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit_tests.distributed.layouts import ARGS
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.runner import build_runner
from torchtitan.config.job_config import ActivationCheckpoint, Parallelism, Training
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import PipelineRunner
from torchtitan.models.llama3.infra.parallelize import parallelize_llama
from torchtitan.models.llama3.model.model import Transformer


@pytest.fixture
def last_of_two() -> Iterator[None]:
    """A process group that only pretends: this is rank 1 of 2."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("last_of_two")
def test_a_pipeline_sums_with_the_loss_that_it_is_given() -> None:
    dims = ParallelDims(pp=2)
    mesh = dims.build_mesh("cpu")
    parallelism, training = Parallelism(pipeline_parallel_degree=2), Training(local_batch_size=2, seq_len=16)
    loss = CrossEntropyLoss()
    runner = build_runner(
        partial(Transformer, ARGS()),
        ARGS(),
        loss,
        parallelize=partial(
            parallelize_llama,
            mesh=mesh,
            parallel_dims=dims,
            parallelism=parallelism,
            training=training,
            activation_checkpoint=ActivationCheckpoint(),
            loss_parallel=False,
        ),
        mesh=mesh,
        parallelism=parallelism,
        training=training,
        device=torch.device("cpu"),
        seed=7,
    )
    assert isinstance(runner, PipelineRunner)
    assert runner._loss.sum is loss.sum
