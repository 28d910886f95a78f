"""The losses outside of the trainer: what they are imported without."""

import subprocess
import sys

PROGRAM = """
import sys
for name in ("torch.distributed.tensor", "torchtitan.config", "torchtitan.distributed", "torchtitan.train"):
    sys.modules[name] = None  # an import of it fails
import torch
from torchtitan.components.loss import *

hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (5, 9))
labels = torch.tensor([1, 2, IGNORE_INDEX, 3, 8])
(fused_linear_cross_entropy(hidden, weight, labels) - cross_entropy_sum(hidden @ weight.T, labels)).backward()
files = {name for name, module in sys.modules.items() if name.startswith("torchtitan.") and module}
others = {name for name in files if not name.startswith(("torchtitan.components.loss", "torchtitan.protocols."))}
assert others == {"torchtitan.components", "torchtitan.protocols"}, others
assert hidden.grad.abs().max() < 1e-5 and weight.grad.abs().max() < 1e-5
"""


def test_the_losses_need_no_trainer_no_configuration_and_no_dtensor() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
