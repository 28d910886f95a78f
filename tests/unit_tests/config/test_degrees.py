import pytest

from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Parallelism


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
            ["tensor_parallel_degree=3", "product is 3", "world size 8", "NGPU=3", "divides 8, and"],
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
        (
            Parallelism(tensor_parallel_degree=2),
            1,
            ["1 process:", "NGPU=2", "whose product divides 1, and"],
        ),
        (
            Parallelism(data_parallel_replicate_degree=3, tensor_parallel_degree=2),
            8,
            ["data_parallel_replicate_degree=3", "tensor_parallel_degree=2;", "product is 6", "NGPU=6"],
        ),
    ],
)
def test_layout_that_does_not_fit_says_what_would(parallelism: Parallelism, world_size: int, said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelDims.from_config(parallelism, world_size)
    for part in said:
        assert part in str(error.value)
