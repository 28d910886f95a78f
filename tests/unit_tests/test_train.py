"""How main() ends: what it tells the trainer about it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan import train
from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import CrossEntropyLoss, TokenSums
from torchtitan.config import JobConfig
from torchtitan.config.errors import EXIT_MISTAKE, NonFiniteError

OPTIONS = ["--model.tokenizer_path", "tests/assets/tokenizer"]


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (None, False),
        (NonFiniteError(3, "the loss is nan"), True),
        (KeyError("a bug"), True),
        (KeyboardInterrupt(), True),
        (SystemExit(train.EXIT_PREEMPTED), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_the_metrics_learn_whether_the_run_failed(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, failed: bool
) -> None:
    told: list[bool] = []

    def end() -> None:
        if error is not None:
            raise error

    trainer = SimpleNamespace(train=end, close=lambda *, failed: told.append(failed))
    monkeypatch.setattr(train, "Trainer", lambda config: trainer)
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    try:
        train.main(OPTIONS)
    except (KeyError, SystemExit) as raised:
        assert raised is error
    assert told == [failed]


def test_a_compiler_that_is_missing_is_told_before_the_model_is_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Also where no launcher has counted the GPUs, on which it hangs which compiler that is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(train, "Trainer", None)
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    monkeypatch.setattr(train, "init_logger", lambda **_: None)
    assert train.main([*OPTIONS, "--training.compile"]) == EXIT_MISTAKE
    assert caplog.messages[-1].startswith("ConfigError: training.compile needs a C")


def test_weights_that_do_not_fit_are_answered_with_what_would_free_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The estimate needs a mesh: where the trainer was not built, the run's own process group is in its way."""

    def build(config: JobConfig) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.83 GiB.")

    monkeypatch.setattr(train, "Trainer", build)
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    monkeypatch.setattr(train, "init_logger", lambda **_: None)  # whose handler would keep the log from the test
    assert train.main([*OPTIONS, "--training.local_batch_size", "8"]) == 1
    message = caplog.messages[-1]
    assert message.startswith(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 7.83 GiB.\nEstimated peak memory"
    )
    assert "--liger_kernel.enable_fused_linear_cross_entropy" in message
    assert not dist.is_initialized()


@pytest.mark.parametrize("stays", [True, False])
def test_labels_stay_on_the_host_for_a_loss_that_takes_them_there(stays: bool) -> None:
    """A device that is not the CPU, as a GPU: the host then knows which tokens need no computing."""
    devices = []

    def forward_backward(tokens: Tensor, labels: Tensor, sequences: None, scale: Tensor) -> Tensor:
        devices.append((tokens.device.type, labels.device.type))
        return scale

    trainer = SimpleNamespace(
        device=torch.device("meta"),
        optimizer=SimpleNamespace(zero_grad=lambda: None),
        token_sums=TokenSums(),
        metrics=SimpleNamespace(should_log=lambda step: True),
        step=1,
        loss=SimpleNamespace(takes_host_labels=True) if stays else CrossEntropyLoss(),
        runner=SimpleNamespace(model_parts=[], forward_backward=forward_backward),
        shard_context=lambda tokens, labels, documents: (tokens, labels, documents),
    )
    batch = Batch(*torch.zeros(2, 1, 4, dtype=torch.int64))
    train.Trainer._forward_backward(trainer, [batch], torch.ones((), device="meta"))  # type: ignore[arg-type]
    assert devices == [("meta", "cpu" if stays else "meta")]


def test_a_machine_s_memory_that_does_not_suffice_is_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "Trainer", lambda config: torch.empty(1 << 60))
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    monkeypatch.setattr(train, "init_logger", lambda **_: None)
    assert train.main(OPTIONS) == 1
    assert caplog.messages[-1].startswith("OutOfMemoryError: the machine's memory does not suffice: ")
    assert "training.local_batch_size" in caplog.messages[-1]
