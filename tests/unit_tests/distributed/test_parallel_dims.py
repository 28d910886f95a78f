from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Parallelism
from torchtitan.distributed.mesh import build_mesh


def test_shard_degree_takes_the_ranks_that_are_left() -> None:
    parallelism = Parallelism(tensor_parallel_degree=2, pipeline_parallel_degree=2, context_parallel_degree=2)
    dims = ParallelDims.from_config(parallelism, world_size=24)
    assert dims == ParallelDims(dp_shard=3, cp=2, tp=2, pp=2)
    assert (dims.world_size, dims.dp, dims.fsdp) == (24, 3, 6)


@pytest.mark.parametrize(
    ("parallelism", "world_size", "said"),
    [
        (
            Parallelism(tensor_parallel_degree=3),
            8,
            ["tensor_parallel_degree=3", "product is 3", "world size 8", "NGPU=3", "data_parallel_shard_degree=8"],
        ),
        (Parallelism(data_parallel_shard_degree=2), 8, ["product is 2", "data_parallel_shard_degree=8 (or -1) would"]),
        (
            Parallelism(data_parallel_shard_degree=4, tensor_parallel_degree=2, pipeline_parallel_degree=2),
            8,
            ["product is 16", "data_parallel_shard_degree=2 (or -1) would fit"],
        ),
        (
            Parallelism(data_parallel_shard_degree=1),
            2,
            ["fit 2 processes: parallelism.data_parallel_shard_degree=1; their product is 1"],
        ),
        (Parallelism(tensor_parallel_degree=2), 1, ["1 process:", "NGPU=2", "leave all degrees at 1"]),
        (
            Parallelism(data_parallel_replicate_degree=3, tensor_parallel_degree=2),
            8,
            ["product is 6", "parallelism.tensor_parallel_degree=2, parallelism.data_parallel_shard_degree=4"],
        ),
    ],
)
def test_layout_that_does_not_fit_names_one_that_does(
    parallelism: Parallelism, world_size: int, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelDims.from_config(parallelism, world_size)
    for part in said:
        assert part in str(error.value)


@pytest.fixture
def last_of_four() -> Iterator[None]:
    """A process group that only pretends: this is rank 3 of 4."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("last_of_four")
@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (
            ParallelDims(dp_replicate=2, cp=2),
            {"dp_replicate": [1, 3], "cp": [2, 3], "dp": [1, 3], "dp_shard_cp": [2, 3]},
        ),
        (
            ParallelDims(dp_shard=2, tp=2),
            {"tp": [2, 3], "dp_shard": [1, 3], "dp": [1, 3], "dp_shard_cp": [1, 3]},
        ),
        (
            ParallelDims(pp=2, dp_shard=2),
            {"pp": [1, 3], "dp_shard": [2, 3], "dp": [2, 3], "dp_shard_cp": [2, 3]},
        ),
    ],
)
def test_every_axis_has_its_ranks(dims: ParallelDims, expected: dict[str, list[int]]) -> None:
    mesh = build_mesh(dims, "cpu")
    for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "dp", "dp_shard_cp"):
        assert dist.get_process_group_ranks(mesh[axis].get_group()) == expected.get(axis, [3]), axis
    assert mesh["hsdp"].shape == (dims.dp_replicate, dims.fsdp)
    assert len(mesh.get_groups()) == 7
    assert mesh.is_first("pp") == (dims.pp == 1)
    assert not mesh.is_first("pp", "dp", "cp", "tp")
