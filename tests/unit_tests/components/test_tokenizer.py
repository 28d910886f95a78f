"""The tokenizer: lossless, begin and end tokens exactly where asked, faults in one message."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from torchtitan.cli import tokenizer as script
from torchtitan.cli.main import main
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import ConfigError, TokenizerError
from torchtitan.launch.preflight import get_vocab_size

SHIPPED = Path("tests/assets/tokenizer")


@pytest.fixture(scope="module")
def shipped():
    return build_tokenizer(SHIPPED)


def save(folder: Path, special: list[str], config: dict | None = None, **kwargs) -> Path:
    """A tokenizer of bytes, with special tokens behind them."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    for name, value in kwargs.items():
        setattr(backend, name, value)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_shipped_tokenizer_has_2000_ids(shipped):
    assert shipped.vocab_size == get_vocab_size(SHIPPED / "tokenizer.json") == 2000
    assert {shipped.bos_id, shipped.eos_id} == {0, 1}
    assert shipped.decode([0, 1], skip_special_tokens=False) == "<|begin_of_text|><|end_of_text|>"


def test_any_text_survives(shipped):
    rng = random.Random(0)
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [
        "".join(map(chr, codes[:3000])),
        "".join(map(chr, rng.choices(codes, k=5000))),
        "\x00\r\n\t  \u2028",
        " ",
        "",
    ]
    texts += ["def f(x):\n        return  x \n", "<|begin_of_text|>a<|end_of_text|>"]
    for text in texts:
        ids = shipped.encode(text, add_bos=False, add_eos=False)
        assert shipped.decode(ids) == text
        assert not {0, 1} & set(ids)  # text never turns into a special token
    assert shipped.encode_batch(texts, add_bos=True, add_eos=True) == [
        [0, *shipped.encode(text, add_bos=False, add_eos=False), 1] for text in texts
    ]


def test_every_byte_is_a_token(shipped):
    ids = {shipped.encode(chr(c), add_bos=False, add_eos=False)[0] for c in range(128)}
    assert len(ids) == 128
    assert all(len(shipped.encode(text, add_bos=False, add_eos=False)) == len(text.encode()) for text in "\x01\x7f𐍈")


def test_begin_and_end_are_added_as_asked(shipped):
    body = shipped.encode("x = 1", add_bos=False, add_eos=False)
    assert shipped.encode("x = 1", add_bos=True, add_eos=False) == [0, *body]
    assert shipped.encode("x = 1", add_bos=False, add_eos=True) == [*body, 1]
    assert shipped.decode([0, *body, 1]) == "x = 1"


def test_post_processor_that_adds_them_adds_nothing_twice(tmp_path):
    adds_both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    tokenizer = build_tokenizer(save(tmp_path, ["<s>", "</s>"], post_processor=adds_both))
    assert tokenizer.encode("a", add_bos=True, add_eos=True)[::2] == [256, 257]
    assert len(tokenizer.encode("a", add_bos=True, add_eos=True)) == 3
    assert len(tokenizer.encode("a", add_bos=False, add_eos=False)) == 1


def test_truncation_and_padding_in_the_file_are_not_used(tmp_path):
    save(tmp_path, ["<s>"])
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(build_tokenizer(tmp_path).encode("123456", add_bos=False, add_eos=False)) == 6


@pytest.mark.parametrize(
    ("special", "config", "bos", "eos"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>"], None, 256, 257),
        (["<s>", "</s>"], {}, 256, 257),
        (["<|endoftext|>"], None, 256, 256),
        (["<a>", "<b>"], {"bos_token": "<b>", "eos_token": {"content": "<a>", "lstrip": False}}, 257, 256),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": "</s>"}, None, 257),
        (["<other>"], None, None, None),
    ],
)
def test_special_tokens_are_found(special, config, bos, eos, tmp_path):
    tokenizer = build_tokenizer(save(tmp_path, special, config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, eos)
    expected = [i for i in (bos, None, eos) if i is not None]
    ids = tokenizer.encode("a", add_bos=True, add_eos=True)
    assert [i for i in ids if i >= 256] == expected


def test_vocabulary_counts_ids_not_tokens(tmp_path):
    """A tokenizer may leave ids out; a model needs a row for the largest."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(tmp_path).vocab_size == get_vocab_size(tmp_path / "tokenizer.json") == 10


def test_faults_are_told(tmp_path):
    def error(path: Path) -> str:
        with pytest.raises(TokenizerError) as caught:
            build_tokenizer(path)
        return str(caught.value)

    advice = "model.tokenizer_path takes a tokenizer.json or the folder that holds one"
    assert error(tmp_path / "nowhere") == f"{tmp_path}/nowhere does not exist; {advice}"
    assert error(tmp_path) == f"{tmp_path} holds no tokenizer.json; {advice}"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b")
    assert (
        error(tmp_path / "tokenizer.model") == f"{tmp_path}/tokenizer.model is a tokenizer of another format; {advice}"
    )
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert error(tmp_path).startswith(f"{tmp_path}/tokenizer.json is not a tokenizer.json that the package tokenizers ")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert error(tmp_path).startswith(f"{tmp_path}/tokenizer.json is not a tokenizer.json that the package tokenizers ")
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    assert error(tmp_path) == f"{tmp_path}/tokenizer.json has an empty vocabulary"
    save(tmp_path, ["<s>"], {"bos_token": "<bos>"})
    assert error(tmp_path).startswith("tokenizer_config.json names '<bos>' as bos_token, which is not a token of ")
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert error(tmp_path).startswith(f"{tmp_path}/tokenizer_config.json cannot be read: Expecting")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert error(tmp_path).startswith(f"{tmp_path}/tokenizer_config.json cannot be read: expected a JSON object")


def test_transformers_reads_the_shipped_folder(shipped, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shutil.copytree(SHIPPED, tmp_path / "t"))
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 2000)
    text = "class A:\n    def f(self): return 'naïve 🌍'\n"
    assert theirs(text)["input_ids"] == shipped.encode(text, add_bos=True, add_eos=False)


def test_training_gives_the_same_file_each_time(tmp_path):
    (tmp_path / "a.txt").write_text(Path(script.__file__).read_text() * 3)
    for name in ("one", "two"):
        arguments = ["--dataset_path", str(tmp_path / "a.txt"), "--vocab_size", "400", "--output", str(tmp_path / name)]
        assert main(["tokenizer", *arguments]) == 0
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    tokenizer = build_tokenizer(tmp_path / "one")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 0, 1)


def test_training_on_too_little_text_is_told():
    with pytest.raises(ConfigError, match=r"the data gives only 2\d\d ids: give more of it, or a lower --vocab_size"):
        script.train(["too little"], 2000)
    with pytest.raises(ConfigError, match="--vocab_size 100: 256 bytes and 2 special tokens need at least 258"):
        script.train(["too little"], 100)


def test_data_that_are_not_there_are_told(tmp_path, capsys):
    words = ["--dataset_path", str(tmp_path / "nope"), "--output", str(tmp_path / "out")]
    assert main(["tokenizer", *words]) == 1
    assert re.match("DatasetError: .*nope does not exist; data are a file or a folder", capsys.readouterr().err)


def test_shipped_file_is_what_the_script_writes():
    """But for the merges, which are those of one Python version's library."""
    made = json.loads(script.train([Path(script.__file__).read_text() * 3], 400).to_str())
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    for key in made.keys() - {"model"}:
        assert made[key] == shipped[key]


def make_word_level(folder: Path, **files: object) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "end": 2}))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_begin_and_end_are_also_looked_for_where_others_write_them(tmp_path, caplog):
    path = make_word_level(
        tmp_path, special_tokens_map={"eos_token": "end"}, generation_config={"bos_token_id": [1, 0]}
    )
    tokenizer = build_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert caplog.messages == []
    (tmp_path / "special_tokens_map.json").unlink()
    assert build_tokenizer(path).eos_id is None
    assert caplog.messages[0].startswith(f"{path}/tokenizer.json has no end token, so documents run together")


def test_a_document_that_cannot_be_encoded_is_named(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"cannot encode the document that begins 'b who': .*; it has no token for"
    ):
        build_tokenizer(make_word_level(tmp_path)).encode_batch(["a b", "b who"], add_bos=True, add_eos=True)


def test_a_tokenizer_of_which_no_token_comes_or_few_is_told(tmp_path, caplog):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))  # drops all else
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no token comes of 12,000 characters, such as 'xyzxyz"):
        for _ in range(4):
            tokenizer.encode_batch(["xyz" * 1000], add_bos=True, add_eos=True)
    caplog.clear()
    for _ in range(2):
        assert build_tokenizer(tmp_path).encode("a cat", add_bos=True, add_eos=True) == [0, 0]
    assert caplog.messages[-1] == (
        "The tokenizer drops what it does not know: 2 of 4 characters of the first documents become tokens"
    )
