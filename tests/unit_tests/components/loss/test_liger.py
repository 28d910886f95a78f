"""Liger's loss behind our contract: interpreted without a GPU, compiled with one."""

import importlib.metadata

import pytest
import torch

pytest.importorskip("liger_kernel")
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.components.loss.chunking import liger_chunk_mem_const, liger_chunk_rows
from torchtitan.components.loss.liger import LigerFusedLinearLoss
from torchtitan.config.errors import ConfigError
from torchtitan.models.common.model import OutputHead

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, DIM = 200, 16


def run(loss_fn: object, labels: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    head = OutputHead(DIM, VOCAB).to(DEVICE)
    hidden = torch.randn(*labels.shape, DIM).to(DEVICE).requires_grad_()
    loss = loss_fn(hidden, head, labels.to(DEVICE), scale.to(DEVICE))  # type: ignore[operator]
    (2 * loss).backward()
    assert hidden.grad is not None and head.weight.grad is not None
    return [loss.detach(), hidden.grad, head.weight.grad]


@pytest.mark.parametrize("accum_dtype", [None, torch.float32])
@pytest.mark.parametrize("ignored", [0, 7, 40])
def test_equals_the_standard_loss(ignored: int, accum_dtype: torch.dtype | None) -> None:
    """`scale` is that of a global batch of 100 tokens, of which this call holds 40 at most."""
    labels = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    labels.view(-1)[:ignored] = IGNORE_INDEX
    scale = torch.tensor(0.01)
    liger = LigerFusedLinearLoss(budget_bytes=4 * VOCAB * 8, accum_dtype=accum_dtype)
    for mine, standard in zip(run(liger, labels, scale), run(CrossEntropyLoss(), labels, scale), strict=True):
        torch.testing.assert_close(mine, standard, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_tokens", [1, 1000, 4096, 8192, 12288, 16384, 32768])
@pytest.mark.parametrize("max_rows", [1, 256, 1024, 4186, 10**6])
def test_the_chunk_is_the_largest_that_liger_can_make_within_the_budget(num_tokens: int, max_rows: int) -> None:
    sizes = {"dim": 4096, "vocab_size": 128256}
    value = liger_chunk_mem_const(num_tokens=num_tokens, max_rows=max_rows, **sizes)
    rows = liger_chunk_rows(num_tokens, chunk_mem_const=value, **sizes)
    possible = [liger_chunk_rows(num_tokens, chunk_mem_const=c, **sizes) for c in range(1, 33)]
    assert rows == max((r for r in possible if r <= max_rows), default=min(possible))


def test_our_account_of_liger_s_chunks_is_liger_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kernel launches shows how many chunks Liger made."""
    import liger_kernel.ops.fused_linear_cross_entropy as ops

    chunks: list[int] = []

    class Launches:
        def __getitem__(self, grid: tuple[int]) -> object:
            chunks.append(grid[0])
            return ops_kernel[grid]

    ops_kernel = ops.liger_cross_entropy_kernel
    monkeypatch.setattr(ops, "liger_cross_entropy_kernel", Launches())
    labels = torch.randint(VOCAB, (1, 50), generator=torch.Generator().manual_seed(1))
    run(LigerFusedLinearLoss(budget_bytes=4 * VOCAB * 20), labels, torch.tensor(0.01))
    value = liger_chunk_mem_const(num_tokens=50, dim=DIM, vocab_size=VOCAB, max_rows=20)
    assert chunks[0] == liger_chunk_rows(50, dim=DIM, vocab_size=VOCAB, chunk_mem_const=value) == 16


@pytest.mark.parametrize("num_valid", [40, 41, 47])
def test_one_rank_and_one_microbatch_need_no_pass_over_the_gradients(
    num_valid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, 41 * (1 / 41) and 47 * (1 / 47) are not 1."""
    import liger_kernel.ops.fused_linear_cross_entropy as ops

    monkeypatch.setattr(ops, "element_mul_kernel", None)  # what multiplies them
    labels = torch.zeros(1, 50, dtype=torch.int64, device=DEVICE)
    labels[:, num_valid:] = IGNORE_INDEX
    hidden = torch.randn(1, 50, DIM, device=DEVICE, requires_grad=True)
    scale = 1 / torch.tensor(num_valid, device=DEVICE)
    head = OutputHead(DIM, VOCAB).to(DEVICE)
    LigerFusedLinearLoss(budget_bytes=4 * VOCAB * 8)(hidden, head, labels, scale).backward()


@pytest.mark.parametrize("version", ["0.6.1", "0.8.4"])
def test_an_old_liger_is_refused_before_its_arguments_are(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: object, *, ignore_index: int, reduction: str) -> None:
        """As in 0.6.1, without accum_dtype."""

    monkeypatch.setattr(LigerFusedLinearLoss.__base__, "__init__", init)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(
        ImportError,
        match=f"liger-kernel {version} is too old: the fused loss needs 0.8.5 or newer.*pip install -U liger-kernel",
    ) as raised:
        LigerFusedLinearLoss(budget_bytes=1)
    assert isinstance(raised.value, ConfigError)  # one line for the user, no traceback


def test_the_version_is_that_of_the_distribution_that_has_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    distributions = {"liger_kernel": ["liger-kernel-nightly"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: distributions)
    monkeypatch.setattr("importlib.metadata.version", {"liger-kernel-nightly": "0.9.0.dev1"}.__getitem__)
    LigerFusedLinearLoss(budget_bytes=1)


def test_a_liger_without_a_version_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
    monkeypatch.setattr("importlib.metadata.version", not_found)
    with pytest.raises(ConfigError, match="liger-kernel of unknown version is too old"):
        LigerFusedLinearLoss(budget_bytes=1)
