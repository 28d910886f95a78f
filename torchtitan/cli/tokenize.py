"""Tokenise a dataset once, into files of token ids that runs read without a tokenizer's work.

    torchtitan tokenize --dataset_path my_texts/ --tokenizer_path my_tokenizer/ --output my_tokens/
    torchtitan train --training.dataset_path my_tokens/ --model.tokenizer_path my_tokenizer/

Documents are shuffled, each with its begin and end token. The files are numpy's: one row of uint16, or of uint32 where
the tokenizer has more than 65,536 ids.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from torchtitan.cli.tokenizer import make_output
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.datasets import DocumentStreams, Position, open_dataset
from torchtitan.datasets.tokens import META
from torchtitan.tools.terminal import Progress

FILE_TOKENS = 2**26
DOCUMENTS_TOGETHER = 256


def main(parser: ArgumentParser, words: Sequence[str]) -> int:
    """Tokenise as the words say."""
    parser.add_argument("--dataset", default="python_stdlib", help="name of a registered dataset")
    parser.add_argument("--dataset_path", help="local file or folder to read instead")
    parser.add_argument("--tokenizer_path", required=True, help="a tokenizer.json or its folder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result, new or empty")
    args = parser.parse_args(words)
    make_output(args.output)
    if any(args.output.iterdir()):
        raise ConfigError(f"--output {args.output}: is not empty; name a new folder")
    print(tokenize(args.dataset, args.dataset_path, args.tokenizer_path, args.output))
    return 0


def tokenize(dataset: str, dataset_path: str | None, tokenizer_path: str, output: Path) -> str:
    """Write the files; what was done. Raises ConfigError: see open_dataset and build_tokenizer."""
    began = time.perf_counter()
    tokenizer = build_tokenizer(tokenizer_path)
    source = open_dataset(dataset, dataset_path)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    documents = DocumentStreams(source, seed=0, infinite=False).read(0, Position())
    ids: list[int] = []
    num_tokens = num_files = 0
    with Progress(f"Tokenising {source.name}", len(source)) as progress:
        while group := list(islice(documents, DOCUMENTS_TOGETHER)):
            for encoded in tokenizer.encode_batch([str(text) for _, text in group], add_bos=True, add_eos=True):
                ids += encoded
            progress.show(group[-1][0].shard)
            if len(ids) >= FILE_TOKENS:
                np.save(output / f"tokens-{num_files:05}.npy", np.array(ids, dtype))
                num_tokens, num_files, ids = num_tokens + len(ids), num_files + 1, []
    if ids:
        np.save(output / f"tokens-{num_files:05}.npy", np.array(ids, dtype))
        num_tokens, num_files = num_tokens + len(ids), num_files + 1
    meta = {"tokenizer": tokenizer.fingerprint, "data": source.name, "tokens": num_tokens}
    (output / META).write_text(json.dumps(meta) + "\n")
    seconds = time.perf_counter() - began
    return f"{output}: {num_tokens:,} tokens in {num_files} files, {num_tokens / seconds:,.0f} tokens/s"
