"""Train a byte-level BPE tokenizer.

    torchtitan tokenizer --dataset_path my_texts/ --vocab_size 32000 --output my_tokenizer/

With --output alone it is the one that comes with the package, given Python 3.11.

Every byte is a token, so any text can be encoded, and decoded without loss. The same data gives the
same file. The data is the training part of a dataset, in memory: choose a sample of a large one.
"""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from torchtitan.config.errors import ConfigError
from torchtitan.datasets import open_dataset
from torchtitan.tools.terminal import Progress

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"


def make_output(folder: Path) -> None:
    """Raises ConfigError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}") from None


def main(parser: ArgumentParser, words: Sequence[str]) -> int:
    """Train one as the words say."""
    parser.add_argument("--dataset", default="python_stdlib", help="name of a registered dataset")
    parser.add_argument("--dataset_path", help="local file or folder to read instead")
    parser.add_argument("--vocab_size", type=int, default=2000, help="number of ids, the two special tokens included")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    args = parser.parse_args(words)
    make_output(args.output)
    source = open_dataset(args.dataset, args.dataset_path)
    documents: list[str] = []
    with Progress(f"Reading {source.name}", len(source)) as progress:
        for shard in range(len(source)):
            documents += (document for document in source.read(shard, 0, 1) if isinstance(document, str))
            progress.show(shard + 1)
    print(f"{source.name}: {len(documents)} documents")
    tokenizer = train(documents, args.vocab_size)

    tokenizer.save(str(args.output / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (args.output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{args.output}: {tokenizer.get_vocab_size()} ids")
    print(measure(tokenizer, documents))
    return 0


def train(documents: list[str], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ConfigError(f"--vocab_size {vocab_size}: 256 bytes and 2 special tokens need at least 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    tokenizer.train_from_iterator(documents, trainer)
    # As Llama 3's own: whoever encodes with special tokens gets the begin token.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(
            f"the data gives only {tokenizer.get_vocab_size()} ids: give more of it, or a lower --vocab_size"
        )
    return tokenizer


def measure(tokenizer: Tokenizer, documents: list[str]) -> str:
    begin = time.perf_counter()
    num_tokens = 0
    with Progress("Measuring it", len(documents)) as progress:
        for first in range(0, len(documents), 64):
            group = tokenizer.encode_batch_fast(documents[first : first + 64])
            num_tokens += sum(len(encoding.ids) for encoding in group)
            progress.show(first)
    seconds = time.perf_counter() - begin
    num_bytes = sum(len(document.encode()) for document in documents)
    return f"{num_bytes / num_tokens:.2f} bytes per token, {num_tokens / seconds:,.0f} tokens/s"
