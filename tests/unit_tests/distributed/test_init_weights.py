from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit_tests.distributed.layouts import ARGS
from torchtitan.distributed.init_weights import init_parameters, local_shard
from torchtitan.models.common.model import Transformer


@pytest.fixture(params=range(4))
def one_of_four(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group that only pretends."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_of_four")
@pytest.mark.parametrize("shape", [(8, 4), (3, 5), (1, 1), (7, 3)])
@pytest.mark.parametrize("placements", [(Shard(0), Shard(1)), (Shard(1), Replicate()), (Shard(0), Shard(0))])
def test_shards_are_those_of_torch_even_where_they_are_empty(
    shape: tuple[int, int], placements: tuple[Placement, Placement]
) -> None:
    """FSDP's strided shards are compared in test_parallelize.py."""
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    expected = distribute_tensor(whole, init_device_mesh("cpu", (2, 2)), placements, src_data_rank=None)
    torch.testing.assert_close(local_shard(whole, expected), expected.to_local())


def test_seed_and_name_decide_the_weights() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = Transformer(ARGS())
        init_parameters(model, seed, "cpu")
        return dict(model.named_parameters())

    first, same, other = weights(1), weights(1), weights(2)
    assert torch.equal(first["layers.0.attention.wq.weight"], same["layers.0.attention.wq.weight"])
    assert not torch.equal(first["layers.0.attention.wq.weight"], other["layers.0.attention.wq.weight"])
    assert not torch.equal(first["layers.0.attention.wq.weight"], first["layers.1.attention.wq.weight"])
