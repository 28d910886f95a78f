"""Convert weights between a checkpoint of a run and a folder of Hugging Face transformers, both ways without loss.

    torchtitan convert to_hf outputs/checkpoint/step-1000 my-model/ --dtype bfloat16
    torchtitan convert from_hf Llama-3.1-8B/ outputs/checkpoint/step-0

to_hf writes .safetensors, config.json and the tokenizer's files. from_hf writes a checkpoint of weights, to start a run
from (checkpoint.initial_load_path), with config.json and the tokenizer beside them. No GPU is needed.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint import HuggingFaceFormat, find_pretrained, reason
from torchtitan.config.errors import CheckpointError


def parse_args(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    directions = parser.add_subparsers(required=True, metavar="to_hf | from_hf")
    to = directions.add_parser("to_hf", help="a checkpoint of ours to a folder of Hugging Face's")
    to.set_defaults(convert=to_hf)
    to.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are)")
    to.add_argument("--custom_import", default="", help="module that the run's experimental.custom_import may name")
    to.add_argument("--config", type=Path, help="config.toml of the run, where SRC has none")
    to.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder, where it is not the run's")
    back = directions.add_parser("from_hf", help="a folder of Hugging Face's to a checkpoint of ours")
    back.set_defaults(convert=from_hf)
    for direction in (to, back):
        direction.add_argument("source", type=Path, metavar="SRC", help="what is converted")
        direction.add_argument("target", type=Path, metavar="DST", help="a new folder")
    return parser.parse_args(words)


def to_hf(args: argparse.Namespace, target: Path) -> None:
    pretrained = find_pretrained(
        args.source, config=args.config, tokenizer=args.tokenizer, custom_import=args.custom_import
    )
    if pretrained.in_hf:
        raise CheckpointError(f"{args.source} is in Hugging Face's format already")
    pretrained.check_weights()
    tokenizer = pretrained.build_tokenizer()
    HuggingFaceFormat(
        pretrained.build_adapter(),
        tokenizer_path=pretrained.tokenizer_path,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    ).convert(args.source, target, dtype=getattr(torch, args.dtype) if args.dtype else None)


def from_hf(args: argparse.Namespace, target: Path) -> None:
    pretrained = find_pretrained(args.source)
    if not pretrained.in_hf:
        raise CheckpointError(f"{args.source} is a checkpoint of ours already")
    shapes = {name: weight.shape for name, weight in pretrained.build_on_meta().state_dict().items()}
    HuggingFaceFormat(pretrained.build_adapter()).convert_back(args.source, target, shapes)


def main(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Convert as the words say."""
    args = parse_args(parser, words)
    if args.target.exists():
        raise CheckpointError(f"{args.target} exists; name a folder that does not")
    incomplete = args.target.with_name(f"{args.target.name}.incomplete-conversion")
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        args.convert(args, incomplete)
        incomplete.rename(args.target)
    except (OSError, SafetensorError, CheckpointException) as error:  # the latter two of a full disk, among others
        raise CheckpointError(f"{args.target} was not written: {reason(error)}") from error
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    print(f"{args.target}: {', '.join(sorted(file.name for file in args.target.iterdir()))}")
    return 0
