import torch
from torch import Tensor

from tests.unit_tests.distributed.layouts import ARGS
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer


def test_seed_and_name_decide_the_weights() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = Transformer(ARGS())
        init_parameters(model, seed, "cpu")
        return dict(model.named_parameters())

    first, same, other = weights(1), weights(1), weights(2)
    assert torch.equal(first["layers.0.attention.wq.weight"], same["layers.0.attention.wq.weight"])
    assert not torch.equal(first["layers.0.attention.wq.weight"], other["layers.0.attention.wq.weight"])
    assert not torch.equal(first["layers.0.attention.wq.weight"], first["layers.1.attention.wq.weight"])
