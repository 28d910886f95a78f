import pytest
import torch

from tests.unit_tests.distributed.layouts import ARGS, get_batch, get_gradients, loss_sum
from torchtitan.config.block_modes import get_block_modes
from torchtitan.config.sections import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer

N_LAYERS = 12
"""More than the number of recompilations after which torch gives up."""


@pytest.mark.parametrize(
    ("mode", "option", "num_graphs"),
    [("none", "2", 1), ("selective", "op", 1), ("selective", "2", 2)],
)
def test_one_compilation_serves_all_blocks_and_changes_nothing(mode: str, option: str, num_graphs: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Transformer(ARGS(n_layers=N_LAYERS))
    init_parameters(model, seed=7, device="cpu")
    names = list(model.state_dict())
    tokens, labels = get_batch()
    expected_loss = loss_sum(model(tokens), labels)
    expected_loss.backward()
    expected = get_gradients(model)
    model.zero_grad()

    apply_ac(model, get_block_modes(ActivationCheckpoint(mode=mode, selective_ac_option=option), N_LAYERS))
    apply_compile(model)
    loss = loss_sum(model(tokens), labels)
    loss.backward()
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in get_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
