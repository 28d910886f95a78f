"""The loss of each dataset of a mixture; test_parity.py holds it to plain torch, in every layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.loss.token_sums import TokenSums
from torchtitan.components.source_losses import SourceLosses

TOKENS = {"c4": 700, "code": 300}


def build(monkeypatch: pytest.MonkeyPatch, tokens: dict[str, int]) -> tuple[SourceLosses, TokenSums]:
    monkeypatch.setattr("torchtitan.components.source_losses.sum_over_world_", lambda values: values)
    mesh: Any = SimpleNamespace(is_first=lambda *axes: True)
    sums = TokenSums(by_sequence=bool(tokens))
    return SourceLosses(lambda: tokens, sums, mesh, torch.device("cpu")), sums


def test_it_is_the_mean_of_each_since_the_last_line_whatever_was_tried_before(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, sums = build(monkeypatch, TOKENS)
    batch = Batch(torch.zeros(3, 2), torch.tensor([[1, 2], [1, IGNORE_INDEX], [1, 2]]), sources=torch.tensor([0, 0, 1]))
    for _ in range(2):
        sums.of_sequences += [torch.tensor([9.0, 9.0])]  # of a try that ended for want of memory
        sums.reset(logged=False)
        sums.of_sequences += [torch.tensor([3.0, 6.0]), torch.tensor([4.0])]
        losses.add_step([batch])
    assert losses.report() == {"c4": (700, 3.0), "code": (300, 2.0)}
    sums.reset(logged=False)
    sums.of_sequences += [torch.tensor([2.0])]
    losses.add_step([Batch(*(t[2:] for t in batch[:2]), sources=torch.tensor([1]))])
    assert losses.report() == {"c4": (700, None), "code": (300, 1.0)}


def test_a_loss_that_does_not_tell_them_leaves_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, sums = build(monkeypatch, TOKENS)
    sums.by_sequence = False
    losses.add_step([])
    assert losses.report() == {"c4": (700, None), "code": (300, None)}


def test_a_run_of_one_dataset_has_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = build(monkeypatch, {})
    losses.add_step([])
    assert losses.report() == {}
