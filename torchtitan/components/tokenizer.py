"""Text to token ids and back, for any `tokenizer.json`; needs no torch.

Begin and end tokens are added here and only here: the file's own post-processor, which may add them
too, is not asked to. Text never turns into them: `<|end_of_text|>` inside a document is plain text.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from torchtitan.config.errors import TokenizerError, UnknownTextError
from torchtitan.tools.files import read_json
from torchtitan.tools.logging import logger

# Where tokenizer_config.json does not say: the names that tokenizers are published with.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")

MAX_CHARS_WITHOUT_TOKEN = 10_000
MIN_SHARE_KEPT = 0.9
PATH_ADVICE = "model.tokenizer_path takes a tokenizer.json or the folder that holds one"
PUBLISHERS = {"Llama-": "meta-llama", "Qwen": "Qwen"}
"""Who publishes the models whose names begin so."""


def get_download_advice(folder: Path, *files: str) -> str:
    """How to get a published model's files, or all of them, into a folder of its name; empty for another name."""
    publisher = next((name for begin, name in PUBLISHERS.items() if folder.name.startswith(begin)), None)
    if publisher is None:
        return ""
    words = ["hf download", f"{publisher}/{folder.name}", *files, "--local-dir", str(folder)]
    return f"; to get it: {' '.join(words)} (some ask to accept a licence first, then: hf auth login)"


class Tokenizer:
    """`bos_id` and `eos_id` are None where the tokenizer has no such token; it is then not added."""

    def __init__(self, backend: tokenizers.Tokenizer, *, bos_id: int | None, eos_id: int | None) -> None:
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._has_tokens, self._num_chars = False, 0
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id: what a model's vocabulary must hold."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the ids that it gives for a text in which each of its tokens occurs; takes 0.2 s for 60,000 ids."""
        every_token = self.decode(range(self.vocab_size))
        special = [[] if index is None else [index] for index in (self.bos_id, self.eos_id)]
        try:
            ids = self._backend.encode(every_token, add_special_tokens=False).ids
        except Exception:  # one that does not know its own tokens, joined
            ids = [0]
        ids = special[0] + ids + special[1]
        return hashlib.sha256(json.dumps([self.vocab_size, ids]).encode()).hexdigest()[:16]

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos)[0]

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool, add_eos: bool) -> list[list[int]]:
        """On several threads, and without Python's lock, so that a training step beside it goes on."""
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        eos = [self.eos_id] if add_eos and self.eos_id is not None else []
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            raise self._explain(texts, error) from None
        encoded = [encoding.ids for encoding in encodings]
        if not self._has_tokens:
            self._check(texts, encoded)
        return [bos + ids + eos for ids in encoded]

    def _check(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> None:
        """Of the first texts: that there are tokens at all, and that little is dropped without a word."""
        self._num_chars += sum(map(len, texts))
        if not any(encoded):
            if self._num_chars > MAX_CHARS_WITHOUT_TOKEN:
                raise TokenizerError(
                    f"no token comes of {self._num_chars:,} characters, such as {texts[0][:40]!r}: the tokenizer is one"
                    " of other text"
                )
            return
        self._has_tokens = True
        num_chars = sum(len("".join(text.split())) for text in texts)
        kept = sum(len("".join(self.decode(ids, skip_special_tokens=False).split())) for ids in encoded)
        if kept < MIN_SHARE_KEPT * num_chars:
            logger.warning(
                f"The tokenizer drops what it does not know: {kept:,} of {num_chars:,} characters of the first"
                " documents become tokens"
            )

    def _explain(self, texts: Sequence[str], error: Exception) -> TokenizerError:
        for text in texts:
            try:
                self._backend.encode(text, add_special_tokens=False)
            except Exception as of_text:
                return UnknownTextError(
                    f"the tokenizer cannot encode the document that begins {text[:60]!r}: {of_text}; it has no token"
                    " for what it does not know",
                    text,
                )
        return TokenizerError(f"the tokenizer fails: {error}")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def build_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder with a tokenizer.json, or in that file.

    Raises:
        TokenizerError: the file is missing or broken, or tokenizer_config.json does not fit it.
    """
    file = find_tokenizer_file(Path(path))
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the only class that the library raises
        raise TokenizerError(
            f"{file} is not a tokenizer.json that the package tokenizers {tokenizers.__version__} can read: {error}"
        ) from None
    if backend.get_vocab_size() == 0:
        raise TokenizerError(f"{file} has an empty vocabulary")
    # A document is never cut, padded or scanned for special tokens, whatever the file was used for before.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    config = {
        **_read_config(file.with_name("special_tokens_map.json")),
        **_read_config(file.with_name("tokenizer_config.json")),
    }
    ids = _read_config(file.with_name("generation_config.json"))
    for key in ("bos_token", "eos_token"):
        index = ids.get(f"{key}_id")
        index = index[0] if isinstance(index, list) and index else index
        if key not in config and isinstance(index, int) and (token := backend.id_to_token(index)) is not None:
            config[key] = token
    eos_id = _find_special_token(backend, file, config, "eos_token", EOS_NAMES)
    if eos_id is None:
        logger.warning(
            f"{file} has no end token, so documents run together and the model never learns to stop; name one as"
            " eos_token in a tokenizer_config.json beside it"
        )
    return Tokenizer(backend, bos_id=_find_special_token(backend, file, config, "bos_token", BOS_NAMES), eos_id=eos_id)


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer.json at a path, which is the file or its folder; TokenizerError where there is none."""
    if not path.exists():
        raise TokenizerError(f"{path} does not exist; {PATH_ADVICE}")
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        what = "holds no tokenizer.json" if path.is_dir() else "is neither a file nor a folder"
        raise TokenizerError(f"{path} {what}; {PATH_ADVICE}")
    if file.suffix == ".model":
        raise TokenizerError(f"{file} is a tokenizer of another format; {PATH_ADVICE}")
    return file


def _read_config(file: Path) -> dict[str, Any]:
    return read_json(file, TokenizerError) if file.is_file() else {}


def _find_special_token(
    backend: tokenizers.Tokenizer, file: Path, config: dict[str, Any], key: str, names: Sequence[str]
) -> int | None:
    if key not in config:
        return next((i for name in names if (i := backend.token_to_id(name)) is not None), None)
    token = config[key]
    name = token.get("content") if isinstance(token, dict) else token
    if name is None:
        return None
    index = backend.token_to_id(name) if isinstance(name, str) else None
    if index is None:
        raise TokenizerError(f"tokenizer_config.json names {name!r} as {key}, which is not a token of {file}")
    return index
