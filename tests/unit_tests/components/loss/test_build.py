"""Which loss a configuration means, and what the log says of it."""

import logging
from typing import Any

import pytest
import torch
import triton

from torchtitan.components.loss import CrossEntropyLoss, FusedLinearCrossEntropyLoss, TokenSums
from torchtitan.components.loss.build import build_loss, check_sums
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


def test_budget_dtype_and_sums_reach_the_loss(monkeypatch):
    given: list[dict[str, object]] = []
    sums = TokenSums(z_loss=0.5)
    for name in ("build.FusedLinearCrossEntropyLoss", "liger.LigerFusedLinearLoss"):
        monkeypatch.setattr(f"torchtitan.components.loss.{name}", lambda **options: given.append(options))
    for implementation in ("native", "liger"):
        section = LigerKernel(
            enable_fused_linear_cross_entropy=True,
            implementation=implementation,
            logits_memory_budget_mib=3,
            weight_grad_accum_dtype="float32",
        )
        build_loss(section, device_type="cuda", tensor_parallel=False, compile=False, sums=sums)
    assert given == 2 * [{"budget_bytes": 3 * 2**20, "accum_dtype": torch.float32, "sums": sums}]


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


def test_token_metrics_take_a_loss_that_tells_them(caplog: pytest.LogCaptureFixture) -> None:
    """auto takes it; liger by hand, or a family's own, is refused in one line."""
    caplog.set_level(logging.INFO)
    sums = TokenSums(predictions=True)
    for implementation, on in (("auto", True), ("native", True), ("auto", False)):
        loss = build(implementation, on=on, sums=sums)
        assert check_sums(loss, sums) is loss
    assert caplog.messages[0] == f"{IN_TREE}metrics.enable_token_metrics asks for what Liger-Kernel does not tell"
    for loss in (build("liger", sums=sums), test_token_metrics_take_a_loss_that_tells_them):
        with pytest.raises(
            ConfigError, match=r"metrics.enable_token_metrics: \w+, the loss of this run, tells neither"
        ):
            check_sums(loss, sums)
        assert check_sums(loss, TokenSums()) is loss


def test_losses_of_datasets_take_a_loss_that_tells_them(caplog: pytest.LogCaptureFixture) -> None:
    """auto takes it; of liger by hand, or a family's own, it is said that the log lacks them."""
    caplog.set_level(logging.INFO)
    sums = TokenSums(by_sequence=True)
    check_sums(build("auto", sums=sums), sums)
    assert caplog.messages == [f"{IN_TREE}the log has the loss of each dataset, which Liger-Kernel does not tell"]
    assert sums.by_sequence
    check_sums(build("liger", sums=sums), sums)
    assert caplog.messages[-1].startswith("The log has no loss of each dataset: LigerFusedLinearLoss gives one for all")
    assert not sums.by_sequence
