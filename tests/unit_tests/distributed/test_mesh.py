from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.config.degrees import ParallelDims
from torchtitan.distributed.mesh import build_mesh


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
