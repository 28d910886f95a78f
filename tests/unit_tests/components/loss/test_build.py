"""Which loss a configuration means, and what the log says of it."""

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton

from torchtitan.components.loss import CrossEntropyLoss, FusedLinearCrossEntropyLoss, ZLoss
from torchtitan.components.loss.build import build_loss
from torchtitan.components.loss.liger import LigerFusedLinearLoss
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import LigerKernel

LIGER = "Using Liger-Kernel fused linear cross entropy loss"
IN_TREE = "Using the in-tree fused linear cross entropy loss: "


def build(implementation: str = "auto", *, on: bool = True, **given: Any) -> Any:
    options = {"device_type": "cuda", "tensor_parallel": False, "compile": False} | given
    section = LigerKernel(enable_fused_linear_cross_entropy=on, implementation=implementation)  # type: ignore[arg-type]
    return build_loss(section, **options)


@pytest.mark.parametrize(
    ("implementation", "device_type", "tensor_parallel", "loss_cls", "line"),
    [
        ("auto", "cuda", False, LigerFusedLinearLoss, LIGER),
        ("liger", "cuda", False, LigerFusedLinearLoss, LIGER),
        ("auto", "cpu", False, FusedLinearCrossEntropyLoss, f"{IN_TREE}Liger-Kernel has no kernels for the cpu"),
        ("auto", "cuda", True, FusedLinearCrossEntropyLoss, f"{IN_TREE}the vocabulary is sharded over the tensor-"),
        ("native", "cuda", False, FusedLinearCrossEntropyLoss, f'{IN_TREE}liger_kernel.implementation is "native"'),
    ],
)
def test_the_log_names_the_loss(implementation, device_type, tensor_parallel, loss_cls, line, caplog):
    caplog.set_level(logging.INFO)
    loss = build(implementation, device_type=device_type, tensor_parallel=tensor_parallel)
    assert type(loss) is loss_cls
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(line)


def test_without_the_flag_it_is_the_standard_loss(caplog):
    caplog.set_level(logging.INFO)
    assert type(build(on=False)) is CrossEntropyLoss and not caplog.messages
    assert type(build(on=False, compile=True)) is CrossEntropyLoss
    assert caplog.messages == ["Compiling the loss function with torch.compile"]


def test_budget_dtype_and_z_loss_reach_the_loss(monkeypatch):
    given: list[dict[str, object]] = []
    z_loss = ZLoss(0.5)
    for name in ("build.FusedLinearCrossEntropyLoss", "liger.LigerFusedLinearLoss"):
        monkeypatch.setattr(f"torchtitan.components.loss.{name}", lambda **options: given.append(options))
    for implementation in ("native", "liger"):
        section = LigerKernel(
            enable_fused_linear_cross_entropy=True,
            implementation=implementation,
            logits_memory_budget_mib=3,
            weight_grad_accum_dtype="float32",
        )
        build_loss(section, device_type="cuda", tensor_parallel=False, compile=False, z_loss=z_loss)
    assert given == 2 * [{"budget_bytes": 3 * 2**20, "accum_dtype": torch.float32, "z_loss": z_loss}]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_missing_liger_kernel_is_an_import_error_unless_it_is_not_asked_for(device_type, monkeypatch):
    monkeypatch.setattr("torchtitan.tools.packages.find_spec", lambda name: None)
    for implementation in ("auto", "liger"):
        with pytest.raises(
            ImportError, match="Liger-Kernel is not installed. Please install it with: pip install liger"
        ):
            build(implementation, device_type=device_type)
    assert type(build("native", device_type=device_type)) is FusedLinearCrossEntropyLoss


@pytest.mark.parametrize("interpret", [False, True])
def test_liger_by_hand_without_a_gpu_needs_the_interpreter(interpret, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    if interpret:
        assert type(build("liger", device_type="cpu")) is LigerFusedLinearLoss
    else:
        with pytest.raises(ConfigError, match="implementation=liger needs a GPU, and this run is on the cpu"):
            build("liger", device_type="cpu")


def test_the_losses_are_imported_without_configurations_and_the_trainer() -> None:
    code = "import sys, torchtitan.components.loss; print(*(m for m in sys.modules if m.startswith('torchtitan.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torchtitan.components.loss.fused_linear" in loaded
    others = [m for m in loaded if not m.startswith(("torchtitan.components.loss", "torchtitan.protocols."))]
    assert set(others) <= {"torchtitan.components", "torchtitan.protocols"}
