"""The losses outside of this package."""

import subprocess
import sys
from pathlib import Path

import torchtitan.components.loss

PROGRAM = """
import sys
for name in ("torchtitan", "torch.distributed.tensor"):
    sys.modules[name] = None  # an import of it fails
import torch
from fused_loss import *

hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (5, 9))
labels = torch.tensor([1, 2, IGNORE_INDEX, 3, 8])
(fused_linear_cross_entropy(hidden, weight, labels) - cross_entropy_sum(hidden @ weight.T, labels)).backward()
assert hidden.grad.abs().max() < 1e-5 and weight.grad.abs().max() < 1e-5
"""


def test_a_copy_of_the_losses_needs_nothing_of_this_package_and_no_dtensor(tmp_path: Path) -> None:
    (tmp_path / "fused_loss").mkdir()
    for file in Path(torchtitan.components.loss.__file__).parent.glob("*.py"):
        text = file.read_text().replace("torchtitan.components.loss", "fused_loss")
        (tmp_path / "fused_loss" / file.name).write_text(text)
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path)
