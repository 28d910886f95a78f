"""Ranks that do not see the same data are named, and none trains. The ranks are simulated one after the other."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from torchtitan.components import data_sources
from torchtitan.components.data_sources import compare, compare_tokenizers, open_together
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import DatasetError
from torchtitan.datasets import registry
from torchtitan.distributed.utils import World


class Ranks:
    """Collectives of `size` ranks that are played one after the other, the first one first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.rank, self.size = 0, size
        self.sent = b""
        self.told: list[Any] = []
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        monkeypatch.setattr(dist, "broadcast_object_list", self._broadcast)
        monkeypatch.setattr(dist, "all_gather_object", lambda values, value: self.told.append(value))
        monkeypatch.setattr(data_sources, "get_world", lambda: World(self.rank, size, self.rank % 2, 2, 0))
        monkeypatch.setattr(data_sources, "compare", lambda told, what: None)

    def _broadcast(self, objects: list[Any], src: int) -> None:
        if self.rank == 0:
            self.sent = pickle.dumps(objects)
        objects[:] = pickle.loads(self.sent)


def test_the_first_rank_looks_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second machine, whose first rank is rank 2, has another file."""
    file = tmp_path / "a.txt"
    file.write_text("some text")
    ranks = Ranks(monkeypatch, 4)
    opened = []
    open_path = registry.open_path
    monkeypatch.setattr(registry, "open_path", lambda *args, **kw: opened.append(ranks.rank) or open_path(*args, **kw))
    for ranks.rank in range(4):
        if ranks.rank == 2:
            file.write_text("another text")
        assert list(open_together("c4", str(file)).read(0, 0, 1)) == ["some text" if ranks.rank < 2 else "another t"]
    assert opened == [0]
    told = f"the data is not the same on all ranks: rank 0 has {file}: 1 file of text, 0.0 KiB"
    with pytest.raises(DatasetError) as caught:
        compare(ranks.told, what="the data")
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith(
        f"1 of 4 differ (rank 2), the first with {file} has 12 bytes, not 9. Give all machines the same files"
    )


def test_what_the_first_rank_says_all_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    for ranks.rank in range(2):
        with pytest.raises(DatasetError, match="nowhere does not exist"):
            open_together("c4", str(tmp_path / "nowhere"))


def test_another_tokenizer_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3)
    tokenizer = build_tokenizer("tests/assets/tokenizer")
    for ranks.rank in range(3):
        compare_tokenizers("abc" if ranks.rank == 0 else "def", tokenizer)
    with pytest.raises(DatasetError) as caught:
        compare(ranks.told, what="the tokenizer")
    assert str(caught.value) == (
        "the tokenizer is not the same on all ranks: rank 0 has one of 2000 ids (abc); 2 of 3 differ (rank 1, 2), the"
        " first with one of 2000 ids (def). Give all machines the same files"
    )
