"""Packing: no token is lost, every sequence begins with the last one's last token, any cursor can be gone on from."""

from itertools import islice, pairwise

import pytest

from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.datasets import Cursor, DocumentStreams, open_path, pack

SEQ_LEN = 16
BEGIN = Cursor()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("torchtitan.datasets.documents.WINDOW_DOCUMENTS", 13)
    monkeypatch.setattr("torchtitan.datasets.packing.GROUP_DOCUMENTS", 3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("tests/assets/tokenizer")


@pytest.fixture
def read(write, documents):
    source = open_path(write("jsonl", documents), "text")

    def read(start: Cursor = BEGIN, *, infinite: bool):
        return DocumentStreams(source, seed=3, infinite=infinite).read(0, start.position)

    return read


@pytest.fixture
def packed(read, tokenizer):
    def packed(seq_len: int, start: Cursor = BEGIN, *, infinite: bool):
        return pack(read(start, infinite=infinite), tokenizer, seq_len=seq_len, start=start)

    return packed


def test_sequences_hold_the_whole_stream(read, packed, tokenizer):
    expected = []
    for _, text in read(infinite=False):
        expected += [tokenizer.bos_id, *tokenizer.encode(text, add_bos=False, add_eos=False), tokenizer.eos_id]
    sequences = [s.tolist() for s, _ in packed(SEQ_LEN, infinite=False)]
    assert all(len(sequence) == SEQ_LEN + 1 for sequence in sequences[:-1])
    assert 2 <= len(sequences[-1]) <= SEQ_LEN + 1
    assert all(a[-1] == b[0] for a, b in pairwise(sequences))
    labels = [token for sequence in sequences for token in sequence[1:]]
    assert labels == expected[1:]


@pytest.mark.parametrize("seq_len", [1, 5, SEQ_LEN, 1000])
def test_every_cursor_can_be_gone_on_from(seq_len, packed):
    undisturbed = list(islice(packed(seq_len, infinite=True), 400 if seq_len < 100 else 12))
    offsets = {cursor.offset for _, cursor in undisturbed}
    assert len(offsets) > 5  # in the middle of documents
    for i, (_, cursor) in enumerate(undisturbed[:-5:3]):
        cursor = Cursor.from_list(cursor.to_list())
        again = list(islice(packed(seq_len, cursor, infinite=True), 5))
        expected = undisturbed[3 * i + 1 : 3 * i + 6]
        assert [s.tolist() for s, _ in again] == [s.tolist() for s, _ in expected]
        assert [c for _, c in again] == [c for _, c in expected]


def test_cursor_does_not_depend_on_sequence_length(packed):
    """A run may go on with longer sequences, and no token is seen twice or missed."""
    short = list(islice(packed(10, infinite=True), 41))
    (long, _) = next(packed(400, short[0][1], infinite=True))
    assert long.tolist() == [*(token for s, _ in short[1:] for token in s[:-1]), short[-1][0][-1]]


def test_end_is_a_cursor_too(packed):
    *_, (_, end) = packed(SEQ_LEN, infinite=False)
    assert list(packed(SEQ_LEN, end, infinite=False)) == []
