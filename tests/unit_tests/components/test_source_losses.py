"""The loss of each dataset of a mixture; test_parity.py holds it to plain torch, in every layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.source_losses import SourceLosses

TOKENS = {"c4": 700, "code": 300}


class Noting:
    """A loss that can tell sequences apart."""

    def note_sequences(self, sums: list[Tensor]) -> None:
        self.sums = sums

    def __call__(self, *_: Any) -> Tensor:
        raise NotImplementedError


def build(loss: Any, monkeypatch: pytest.MonkeyPatch, tokens: dict[str, int] | None = None) -> SourceLosses:
    monkeypatch.setattr("torchtitan.components.source_losses.sum_over_world_", lambda values: values)
    mesh: Any = SimpleNamespace(is_first=lambda *axes: True)
    return SourceLosses(loss, lambda: TOKENS if tokens is None else tokens, mesh, torch.device("cpu"))


def test_it_is_the_mean_of_each_since_the_last_line_whatever_was_tried_before(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Noting()
    losses = build(loss, monkeypatch)
    batch = Batch(torch.zeros(3, 2), torch.tensor([[1, 2], [1, IGNORE_INDEX], [1, 2]]), sources=torch.tensor([0, 0, 1]))
    for _ in range(2):
        loss.sums += [torch.tensor([9.0, 9.0])]  # of a try that ended for want of memory
        loss.sums += [torch.tensor([3.0, 6.0]), torch.tensor([4.0])]
        losses.add_step([batch])
    assert losses.report() == {"c4": (700, 3.0), "code": (300, 2.0)}
    loss.sums += [torch.tensor([2.0])]
    losses.add_step([Batch(*(t[2:] for t in batch[:2]), sources=torch.tensor([1]))])
    assert losses.report() == {"c4": (700, None), "code": (300, 1.0)}


def test_a_loss_that_cannot_tell_them_is_named_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    losses = build(lambda: None, monkeypatch)
    assert "The log has no loss of each dataset: function gives one for all tokens" in caplog.text
    losses.add_step([])
    assert losses.report() == {"c4": (700, None), "code": (300, None)}


def test_a_run_of_one_dataset_notes_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    loss = Noting()
    losses = build(loss, monkeypatch, {})
    losses.add_step([])
    assert losses.report() == {} and not hasattr(loss, "sums") and not caplog.text
