"""The text of a row, whatever the format that it comes from."""

import json

import pytest

from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.datasets.source import get_text


@pytest.mark.parametrize("text", ["q", lambda row: row["q"]], ids=["field", "function"])
def test_every_text_can_be_tokenised(text):
    """JSON may hold halves of surrogate pairs, which are no characters; whole pairs are."""
    row = json.loads(r'{"q": "bad \ud800\ud800 x \udc00", "n": 1}')
    assert get_text(row, text) == "bad \ufffd\ufffd x \ufffd"
    assert get_text(json.loads(b'{"q": "raw \xed\xa0\x80"}'), text) == "raw \ufffd"
    assert get_text(json.loads(r'{"q": "\ud83c\udf0d naïve"}'), text) == "🌍 naïve"
    build_tokenizer("tests/assets/tokenizer").encode(get_text(row, text), add_bos=True, add_eos=True)


@pytest.mark.parametrize("text", ["q", lambda row: row["q"]], ids=["field", "function"])
def test_null_is_an_empty_text(text):
    assert get_text({"q": None}, text) == get_text({"q": ""}, text) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [("q", "holds a number in 'q', not a text"), (lambda row: 3, "holds a number as its text, not")],
)
def test_other_values_are_no_texts(text, problem):
    with pytest.raises(ValueError, match=problem):
        get_text({"q": 3}, text)
