import gc
from collections.abc import Iterator

import pytest
import torch

from torchtitan.tools.gc import GarbageCollection


@pytest.fixture(autouse=True)
def automatic_again() -> Iterator[None]:
    gc.freeze()  # what was imported, and what other tests left
    yield
    gc.unfreeze()
    gc.enable()


class Node:
    """Part of a reference cycle, with a tensor that only the collector can free."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.me = self


def test_collects_only_at_the_chosen_steps() -> None:
    collection = GarbageCollection(3)
    assert not gc.isenabled()
    collected = []
    gc.callbacks.append(callback := lambda phase, info: collected.append(phase))
    try:
        for step in range(1, 8):
            if step % 3 == 0:
                collected.append(step)
            collection.run(step)
    finally:
        gc.callbacks.remove(callback)
    assert collected == [3, "start", "stop", 6, "start", "stop"]


def test_debug_names_the_tensors_in_cycles_and_frees_them(caplog: pytest.LogCaptureFixture) -> None:
    collection = GarbageCollection(50, debug=True)
    Node(torch.zeros(3, 5))
    collection.run(1)
    assert "1 tensors" in caplog.text
    assert "float32 (3, 5)" in caplog.text
    caplog.clear()
    collection.run(2)
    assert caplog.text == ""
    assert gc.garbage == []
