from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtitan.config.degrees import ParallelDims
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.utils import dist_sum


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
    assert len(mesh.get_groups()) == 5  # of one axis each: of two that are joined, one has a single rank
    assert mesh.is_first("pp") == (dims.pp == 1)
    assert not mesh.is_first("pp", "dp", "cp", "tp")


@pytest.mark.usefixtures("last_of_four")
def test_axes_that_are_joined_are_a_group_where_both_have_several_ranks() -> None:
    mesh = build_mesh(ParallelDims(dp_shard=2, cp=2), "cpu")
    assert dist.get_process_group_ranks(mesh["dp_shard_cp"].get_group()) == [0, 1, 2, 3]
    assert mesh["dp"].get_group() is mesh["dp_shard"].get_group()
    assert mesh["hsdp"].shape == (1, 4)
    assert len(mesh.get_groups()) == 6


@pytest.mark.usefixtures("last_of_four")
def test_nothing_is_sent_over_an_axis_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, sent_over = build_mesh(ParallelDims(dp_shard=2, tp=2), "cpu"), []
    monkeypatch.setattr(dist, "all_reduce", lambda value, op, group: sent_over.append(group))
    for axis in ("pp", "dp_replicate", "cp", "dp"):
        assert dist_sum(torch.ones(()), mesh[axis]) == 1
    assert sent_over == [mesh["dp"].get_group()]
